"""Text generation with a KV cache, continuous batching, chunked prefill and prefix caching.

A Request holds token ids and sampling settings. `Engine.step` returns Events, which hold new tokens and their
log-probabilities. `Engine.run` returns complete Samples. Terminal chat, the web server, evaluation and RL all use the
engine.
"""
