"""Scores of a model: CORE, chat tasks, bits per byte.

In: parameters, their GPTConfig, a tokenizer, and a task, the CORE bundle or batches of text. Out: scores, each with
its standard error and the number of problems behind it.
"""
