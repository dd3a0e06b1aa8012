"""The web server. It offers a chat page and an OpenAI-compatible API.

In: HTTP requests. Out: answers, sent whole or streamed as server-sent events. Each engine has its own worker thread.
The folder ui/ holds the page, as plain HTML, CSS and JavaScript modules that need no build step.
"""
