"""Evaluates a model with CORE, with chat tasks, and by its bits per byte.

In: parameters, their GPTConfig, a tokenizer, and the data (the CORE bundle, a chat task, or batches of text).
Out: a score with its standard error and the number of problems. For batches of text, the score is bits per byte, and
tokens are counted instead of problems.
"""
