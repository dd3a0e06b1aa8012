"""Talk to the model in the browser: python -m scripts.chat_web, then open the address it prints.

The page streams from POST /chat/completions of the same server, programs use OpenAI's API at /v1; everybody on --host
and --port shares its --slots. SIGTERM lets answers under way end before the server does, Ctrl-C only for a moment.
"""

import dataclasses
import errno
import os
import signal
import socket
import sys
from contextlib import closing

from nanochat_jax import commandline, config

CHUNK = 8  # tokens decoded between two looks: small, so that text appears evenly and a client can leave quickly
DRAIN = {signal.SIGTERM: 30, signal.SIGINT: 3}  # seconds that answers under way get after a signal
UNREAD = 60  # seconds after which the connection of a client that has stopped reading is given up


def main(cfg: config.ChatWeb) -> None:
    cfg = dataclasses.replace(cfg, api_key=cfg.api_key or os.environ.get("NANOCHAT_API_KEY", ""))
    # The port first: loading a model only to learn that it is taken would be a waste.
    with closing(bind(cfg.host, cfg.port)) as listener:
        from nanochat_jax.parallel import devices

        devices.start(cfg.device_type)
        try:
            import uvicorn

            from nanochat_jax.serve.app import create_app
        except ModuleNotFoundError as error:
            raise config.UserError(f"{error.name} is missing: run pip install '.[serve]' in the repository") from None
        import jax

        from nanochat_jax import checkpoint
        from nanochat_jax.engine.engine import Engine

        chosen = jax.devices()[: cfg.num_gpus]
        if len(chosen) < cfg.num_gpus:
            raise config.UserError(f"--num_gpus={cfg.num_gpus}: there is no more than {len(chosen)} device(s) here")
        model = checkpoint.load_model(cfg.source, cfg.model_tag, cfg.step)
        dtype = devices.choose_precision(cfg.compute_dtype)
        engines = [
            Engine(
                jax.device_put(model.params, device), model.model_cfg, model.tokenizer, slots=cfg.slots, dtype=dtype,
                chunk=CHUNK,
            )
            for device in chosen
        ]  # fmt: skip
        model = dataclasses.replace(model, params={})  # the engines hold their own, cast
        warming = [engine.warmup(cfg.temperature, cfg.top_k) for engine in engines]
        for engine_warming in warming:  # what a short prompt needs; longer ones' turn comes while nobody asks anything
            next(engine_warming)
        app = create_app(engines, cfg, model.name, chosen[0].device_kind, warming)
        listener.listen()  # whoever follows the address right away waits for a moment instead of being refused
        print(f"chat at {url(listener)} (Ctrl-C ends it)", flush=True)
        if cfg.host not in ("127.0.0.1", "localhost", "::1") and not cfg.api_key:
            print("whoever reaches this address can use it; --api_key=KEY asks for a key", flush=True)

        class Server(uvicorn.Server):
            """Nobody new is let in after a signal; at the end of the time for it, open answers are ended properly."""

            def handle_exit(self, sig, frame):
                if not self.should_exit:
                    self.config.timeout_graceful_shutdown = DRAIN[sig] + 2
                    app.state.worker.stop_after(DRAIN[sig])
                super().handle_exit(sig, frame)

        for sig in DRAIN:  # uvicorn raises the signal again once it is done
            signal.signal(sig, leave)
        # No access log: who asks is nobody's business.
        Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def leave(sig: int, frame) -> None:
    """Ends the program; having been asked to is no failure.

    Not by sys.exit: taking Python down takes longer than all the rest, and aborts if an engine's thread is compiling.
    """
    if sig == signal.SIGINT:
        print("stopped", file=sys.stderr, flush=True)
    os._exit(130 if sig == signal.SIGINT else 0)


def bind(host: str, port: int) -> socket.socket:
    """A socket at host:port that does not listen yet. UserError if there is no such address or it is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise config.UserError(f"--host={host}: no such address; 127.0.0.1 is this machine alone") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a server just stopped
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD * 1000)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise config.UserError(f"--host={host}: no address of this machine; 127.0.0.1 is it alone") from None
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
