"""Evaluates a model: CORE, chat tasks and bits per byte.

In: parameters, their GPTConfig, a tokenizer, and the data (the CORE bundle, a chat task, or batches of text).
Out: bits per byte for batches of text. Otherwise, a score, its standard error and the number of problems.
"""
