"""Computes scores of a model: CORE, chat tasks, bits per byte.

In: parameters, their GPTConfig, a tokenizer, and the data: a task, the CORE bundle or batches of text.
Out: for a task or CORE, the score, its standard error and the number of problems; for text, bits per byte.
"""
