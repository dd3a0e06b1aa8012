"""Text generation with a KV cache, continuous batching, chunked prefill and prefix caching.

A Request holds token ids and sampling settings. `Engine.step` returns Events, which hold new tokens and their
log-probabilities. `Engine.run` returns complete Samples. Terminal chat, the web server, evaluation and RL all use the
engine.

    engine.py         the steps: schedules, runs the model, stops finished samples, calls tools
    scheduler.py      the queue of requests, and what the next step computes
    model_runner.py   the weights, the cache, and the calls of the compiled functions
    programs.py       the compiled functions for prefill and decoding; a row ends at a stop token
    ahead.py          which functions can be compiled before a request needs them
    cache.py          the arrays of the KV cache
    slots.py          the state of each slot: tokens, forced tokens, limits
    sampler.py        chooses the next token from the logits
    calculator.py     evaluates the expressions of tool calls
    request.py        Request, Event and Sample
"""
