"""Turns text from the Hugging Face hub or from disk into batches of token ids.

In: the name of a text source, a folder of text, or a task's conversations. Out: parquet files with one column `text`,
and an iterator over batches (inputs and targets, int32 [b, t]). Every checkpoint saves the iterator's position.

    sources.py            chooses a text source, and finds its training and validation files
    text_folder.py        divides a user's folder into training and validation text
    hub.py                downloads parquet files from the Hugging Face hub
    transfer.py           downloads single files, with retries, and verifies them
    download_estimate.py  estimates how long a download will take
    local_corpus.py       collects the documentation installed with Python
    text_files.py         reads and shuffles a user's documents
    parquet.py            reads and writes parquet files
    token_cache.py        stores the tokens of parquet files
    packing.py            fills rows with documents
    documents.py          reads documents and conversations as tokens, from a position that can be saved
    dataloader.py         joins reading, tokenizing and packing into one resumable iterator
"""
