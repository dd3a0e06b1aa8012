"""From text on the hub or on disk to batches of token ids.

In: the name of a text source or a folder, or the conversations of a task. Out: parquet files with one column `text`,
and an iterator of batches (inputs and targets int32 [b,t]) whose position is saved with every checkpoint.

sources chooses the files (hub downloads them, local_corpus and text_files make them, parquet reads them), token_cache
keeps them tokenized, packing fills rows with documents, and dataloader puts it all into one resumable iterator.
"""
