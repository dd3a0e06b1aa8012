"""The web server: a chat page and an OpenAI-compatible API in front of the engine.

In: HTTP requests. Out: answers, whole or streamed as server-sent events. One worker thread drives each engine; ui/
holds the page, plain HTML, CSS and JavaScript modules without a build step.
"""
