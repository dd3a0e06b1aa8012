"""The web server: a chat page and an OpenAI-compatible API in front of the engine.

In: HTTP requests. Out: answers, whole or streamed as server-sent events. Each engine is driven by its own worker
thread. The folder ui/ holds the page: plain HTML, CSS and JavaScript modules, without a build step.
"""
