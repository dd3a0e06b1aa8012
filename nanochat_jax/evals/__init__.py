"""Evaluates a model with CORE, with chat tasks, and by its bits per byte.

In: parameters, their GPTConfig, a tokenizer, and the data (the CORE bundle, a chat task, or batches of text).
Out: a score with its standard error and the number of problems. For batches of text, the score is bits per byte, and
tokens are counted instead of problems.

    core.py       CORE: 22 in-context learning tasks
    bundle.py     the data of CORE
    chat.py       chat tasks
    bpb.py        bits per byte
    model.py      a model and its tokenizer, ready for evaluation
    batching.py   makes batches of prompts
    score.py      a score with its standard error
"""
