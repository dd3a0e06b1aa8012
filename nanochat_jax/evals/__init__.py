"""Scores of a model: CORE, chat tasks, bits per byte.

In: parameters, their GPTConfig, a tokenizer, and a task, the CORE bundle or batches of text. Out: scores, each with the
number of problems it is the mean of and its standard error.
"""
