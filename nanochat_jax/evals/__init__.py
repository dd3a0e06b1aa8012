"""Evaluates a model: CORE, chat tasks and bits per byte.

In: parameters, their GPTConfig, a tokenizer, and the data (the CORE bundle, a chat task, or batches of text).
Out: for CORE or a chat task, a score with its standard error and the number of problems. For batches of text, the
result is bits per byte.
"""
