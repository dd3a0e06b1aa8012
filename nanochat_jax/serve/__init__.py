"""The web server. It offers a chat page and an OpenAI-compatible API.

In: HTTP requests. Out: answers, each as one JSON object or as a stream of server-sent events. Each GPU has one engine,
and each engine runs in a worker thread. The folder ui/ holds the page: plain HTML, CSS and JavaScript.
"""
