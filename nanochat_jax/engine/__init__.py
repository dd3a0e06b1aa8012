"""Text generation with a KV cache: continuous batching, chunked prefill, prefix caching.

In: Requests (token ids and sampling settings). Out: Events, which carry new tokens and their
log-probabilities during generation, or complete Samples. Terminal chat, the web server, evaluation and RL call the
engine.
"""
