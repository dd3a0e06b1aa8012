"""Scores of a model: CORE, chat tasks, bits per byte.

In: parameters, their GPTConfig, a tokenizer, and the data to evaluate on (a task, the CORE bundle or batches of text).
Out: for tasks and CORE, scores with their standard errors and numbers of problems; for text, bits per byte.
"""
