"""From text on the hub or on disk to batches of token ids.

In: the name of a text source, a folder, or a task's conversations. Out: parquet files with one column `text`, and an
iterator of batches (inputs and targets int32 [b,t]) whose position is saved with every checkpoint.

sources.py finds the files. They are downloaded by hub.py, or written by sources.py from the text that local_corpus.py
and text_files.py collect. parquet.py reads and writes the files, and token_cache.py keeps their tokens. packing.py
fills rows with documents, and dataloader.py turns all of this into one resumable iterator.
"""
