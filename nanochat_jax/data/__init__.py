"""Turns text from the hub or from disk into batches of token ids.

In: the name of a text source, a folder, or a task's conversations. Out: parquet files with one column `text`, and an
iterator of batches (inputs and targets int32 [b,t]). Every checkpoint saves the position of the iterator.

sources.py finds the parquet files that hub.py has downloaded, or writes parquet files from the text that
local_corpus.py and text_files.py collect. parquet.py reads and writes parquet files, and token_cache.py stores the
tokens of these files. packing.py fills rows with documents. dataloader.py joins reading, tokenizing and packing into
one resumable iterator.
"""
