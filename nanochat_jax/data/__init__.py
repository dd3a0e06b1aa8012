"""Turns text from the hub or from disk into batches of token ids.

In: the name of a text source, a folder, or a task's conversations. Out: parquet files with one column `text`, and an
iterator of batches (inputs and targets int32 [b,t]). Every checkpoint saves the position of the iterator.

sources.py finds the parquet files. Either hub.py has downloaded them, or sources.py writes them from the text that
local_corpus.py and text_files.py collect. parquet.py reads and writes the files, and token_cache.py keeps their tokens.
packing.py fills rows with documents, and dataloader.py joins these steps into one resumable iterator.
"""
