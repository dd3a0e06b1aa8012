"""Text generation with a KV cache: continuous batching, chunked prefill, prefix caching.

In: Requests (token ids and sampling settings). Out: Events (new tokens and their log-probabilities) as they are
generated, or complete Samples. It is called by terminal chat, the web server, evaluation and reinforcement learning.
"""
