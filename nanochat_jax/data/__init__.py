"""From text on the hub or on disk to batches of token ids.

In: the name of a text source, a folder, or a task's conversations. Out: parquet files with one column `text`, and an
iterator of batches (inputs and targets int32 [b,t]) whose position is saved with every checkpoint.

sources finds the files: hub downloads them, or sources writes them from what local_corpus and text_files collect.
parquet reads and writes them, token_cache keeps them tokenized, packing fills rows with documents, and dataloader turns
all of this into one resumable iterator.
"""
