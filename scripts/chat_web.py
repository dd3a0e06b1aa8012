"""Talk to the model in the browser.

    python -m scripts.chat_web

Open the address that the server prints. The page gets its answers from POST /chat/completions on the same server. Other
programs use OpenAI's API under /v1. Each slot generates one answer at a time, and all clients share the slots
(--slots). Running answers get 30 seconds to finish after SIGTERM, and 3 seconds after Ctrl-C.
"""

import dataclasses
import errno
import os
import signal
import socket
import sys
from contextlib import closing
from types import FrameType
from typing import TYPE_CHECKING

from nanochat_jax import commandline, config

if TYPE_CHECKING:  # importing these at run time would slow down --help and require the extra `serve`
    import uvicorn

    from nanochat_jax.serve.pool import Pool

# Tokens decoded per step. With a small number, text appears smoothly, and the slot of a client that left is soon free.
CHUNK = 8
DRAIN: dict[int, int] = {signal.SIGTERM: 30, signal.SIGINT: 3}  # signal -> seconds that running answers get to finish
UNREAD_SECONDS = 60  # a client that reads nothing for this long is disconnected


def main(cfg: config.ChatWeb) -> None:
    cfg = dataclasses.replace(cfg, api_key=cfg.api_key or os.environ.get("NANOCHAT_API_KEY", ""))

    # Bind the port before loading the model, so that a taken port is reported at once.
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
        from nanochat_jax.progress import count_of

        # There is one engine per device. Each engine has its own copy of the weights, cast to the compute dtype.
        chosen = jax.devices()[: cfg.num_gpus]
        if len(chosen) < cfg.num_gpus:
            found = count_of(len(chosen), "device")
            raise config.UserError(f"--num_gpus={cfg.num_gpus}: only {found} here; use --num_gpus={len(chosen)}")
        model = checkpoint.load_model(cfg.source, cfg.model_tag, cfg.step)
        dtype = devices.choose_precision(cfg.compute_dtype)
        engines = [
            Engine(
                jax.device_put(model.params, device),
                model.model_cfg,
                model.tokenizer,
                slots=cfg.slots,
                dtype=dtype,
                chunk=CHUNK,
            )
            for device in chosen
        ]
        model = dataclasses.replace(model, params={})  # frees the original copy of the weights

        # Compile only what a short prompt needs. The server compiles the rest while it is idle.
        warmups = [engine.warmup(cfg.temperature, cfg.top_k) for engine in engines]
        for warmup in warmups:
            next(warmup)

        app = create_app(engines, cfg, model.name, chosen[0].device_kind, warmups)
        listener.listen()  # clients can connect from now on, so the address can be printed
        print(f"chat at {url(listener)} (Ctrl-C stops the server)", flush=True)
        if cfg.host not in ("127.0.0.1", "localhost", "::1") and not cfg.api_key:
            print("anyone who can reach this address can use the model; --api_key=KEY requires a key", flush=True)
        # Log only warnings. An access log would record private data: who uses the server.
        serve(uvicorn.Config(app, log_level="warning"), app.state.pool, listener)


def serve(server_cfg: "uvicorn.Config", pool: "Pool", listener: socket.socket) -> None:
    """Serves until a signal comes, then ends the program."""
    import uvicorn

    class Server(uvicorn.Server):
        """Accepts no new requests after a signal. After DRAIN[signal] more seconds, ends all unfinished answers."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not self.should_exit:
                self.config.timeout_graceful_shutdown = DRAIN[sig] + 2
                pool.stop_after(DRAIN[sig])
            super().handle_exit(sig, frame)

    for sig in DRAIN:  # after its shutdown, uvicorn raises the signal again, and `leave` ends the program
        signal.signal(sig, leave)
    Server(server_cfg).run(sockets=[listener])


def leave(sig: int, frame: FrameType | None) -> None:
    """Ends the program. After SIGTERM, the exit code is 0, because this signal does not mean a failure.

    os._exit skips Python's own shutdown. That shutdown is slow, and it aborts if an engine's thread is compiling.
    """
    if sig == signal.SIGINT:
        print("stopped", file=sys.stderr, flush=True)
    os._exit(130 if sig == signal.SIGINT else 0)


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to host:port but not yet listening. Raises UserError if the address does not exist
    or is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise config.UserError(f"--host={host}: no such address; use 127.0.0.1 for local access") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # reuse the port of a server that has just stopped
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # only on Linux; accepted connections inherit this setting
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            reason = "not an address of this machine; use 127.0.0.1 for local access"
            raise config.UserError(f"--host={host}: {reason}") from None
        hint = f"try another, like --port={port + 1}" if port < 65535 else "try another"
        raise config.UserError(f"--port={port} on {host}: {error.strerror}; {hint}") from None
    return listener


def url(listener: socket.socket) -> str:
    """Returns the address to open in a browser on this machine, such as http://127.0.0.1:8000."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # the server listens on all interfaces
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    commandline.run(main, config.ChatWeb)
