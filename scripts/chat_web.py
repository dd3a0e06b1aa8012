"""Talk to the model in the browser: python -m scripts.chat_web, then open the address it prints.

The page streams from POST /chat/completions of the same server; everybody on --host and --port shares its --slots.
"""

import os
import socket
from contextlib import closing

from nanochat_jax import commandline, config

CHUNK = 8  # tokens decoded between two looks: small, so that text appears evenly and a client can leave quickly
LIMITS = {"temperature": (0, 2), "top_k": (0, 200), "max_new_tokens": (1, 4096), "slots": (1, 1024)}


def main(cfg: config.ChatWeb) -> None:
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(cfg, name) <= high:
            raise config.UserError(f"--{name}={getattr(cfg, name)}: must be from {low} to {high}")
    # The port first: loading a model only to learn that it is taken would be a waste.
    with closing(bind(cfg.host, cfg.port)) as listener:
        from nanochat_jax import parallel

        parallel.start(cfg.device_type)
        try:
            import uvicorn

            from nanochat_jax.serve.app import create_app
        except ModuleNotFoundError as error:
            raise config.UserError(f"{error.name} is missing: run pip install '.[serve]' in the repository") from None
        import jax

        from nanochat_jax import checkpoint
        from nanochat_jax.engine.engine import Engine, Request

        model = checkpoint.load_model(cfg.source, cfg.model_tag, cfg.step)
        dtype = parallel.precision(cfg.compute_dtype)
        engine = Engine(model.params, model.config, model.tokenizer, slots=cfg.slots, dtype=dtype, chunk=CHUNK)
        # Two tokens for nobody: what has to be compiled is compiled before the first visitor waits for it.
        for _ in engine.stream(Request([model.tokenizer.bos], 2, cfg.temperature, cfg.top_k)):
            pass
        app = create_app(engine, cfg, model.name, device=jax.devices()[0].device_kind)
        listener.listen()  # whoever follows the address right away waits for a moment instead of being refused
        print(f"chat at {url(listener)} (Ctrl-C ends it)", flush=True)

        # Answers under way get three seconds to end after Ctrl-C. No access log: who asks is nobody's business.
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
        server.run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket at host:port that does not listen yet. UserError if there is no such address or it is taken."""
    if not 0 <= port < 65536:
        raise config.UserError(f"--port={port}: a port is a number up to 65535, like 8000")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise config.UserError(f"--host={host}: no such address; 127.0.0.1 is this machine alone") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a server just stopped
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        hint = f"try another, like --port={port + 1}" if port < 65535 else "try another"
        raise config.UserError(f"--port={port} on {host}: {os.strerror(error.errno)}; {hint}") from None
    return listener


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # every interface; this one the reader can open
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    commandline.run(main, config.ChatWeb)
