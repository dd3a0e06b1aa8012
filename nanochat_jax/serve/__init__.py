"""The web server. It offers a chat page and an OpenAI-compatible API.

In: HTTP requests. Out: answers, each as one JSON object or as a stream of server-sent events. Each GPU has one engine,
and each engine runs in a worker thread. The folder ui/ holds the page: plain HTML, CSS and JavaScript.

    app.py                 the application: routes and start-up
    schema.py              the fields of request bodies; turns a body into a Request
    messages.py            turns the messages of a body into a conversation
    openai_api.py          the endpoints of OpenAI's API
    openai_choice.py       the parts of one choice in an answer
    responses.py           responses that notice when the client leaves
    errors.py              the bodies of error responses
    pool.py                chooses the worker with the shortest queue
    worker.py              runs one engine in a thread; refuses a request if too many wait
    compiler.py            compiles programs in a thread while the engine goes on
    connection.py          time limits and the maximum number of connections
    middleware.py          checks of every request: host, key, origin, size
    metrics.py, page.py    the numbers for Prometheus; the files of the page
"""
