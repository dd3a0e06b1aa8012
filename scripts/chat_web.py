"""Talk to the model in the browser.

    python -m scripts.chat_web

Open the address that the server prints. The page gets its answers from POST /chat/completions on the same server. Other
programs use OpenAI's API under /v1. Each slot generates one answer at a time, and all clients share the slots
(--slots). Running answers get 30 seconds to finish after SIGTERM, and 3 seconds after Ctrl-C or SIGHUP. The terminal
sends SIGHUP when it is closed.
"""

import dataclasses
import errno
import os
import signal
import socket
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from nanochat_jax import commandline, config

if TYPE_CHECKING:  # importing these at run time would slow down --help and require the extra `serve`
    import uvicorn

    from nanochat_jax.serve.pool import Pool

# Tokens decoded per step. With a small number, text appears smoothly, and the slot of a client that left is soon free.
CHUNK = 8
SUGGESTIONS = 5  # number of questions that the empty page suggests
# Signal -> seconds that running answers get to finish.
DRAIN: dict[int, int] = {signal.SIGTERM: 30, signal.SIGINT: 3, signal.SIGHUP: 3}
BACKLOG = 2048  # maximum number of connections that wait to be accepted
UNREAD_SECONDS = 60  # a client that reads nothing for this long is disconnected


def main(cfg: config.ChatWeb) -> None:
    cfg = dataclasses.replace(cfg, api_key=cfg.api_key or os.environ.get("NANOCHAT_API_KEY", ""))

    # Take the port before loading the model, so that a taken port is reported at once.
    with closing(bind(cfg.host, cfg.port)) as listener:
        from nanochat_jax.parallel import devices

        devices.start(cfg.device_type)
        try:
            from nanochat_jax.serve.app import create_app
            from nanochat_jax.serve.connection import server_config
            from nanochat_jax.serve.middleware import is_loopback_address
        except ModuleNotFoundError as error:
            raise config.UserError(f"{error.name} is missing: run pip install '.[serve]' in the repository") from None
        import jax

        from nanochat_jax import tasks, trained_model
        from nanochat_jax.engine.engine import Engine
        from nanochat_jax.engine.request import Request
        from nanochat_jax.progress import count_of

        # There is one engine per device. Each engine has its own copy of the weights, cast to the compute dtype.
        chosen = jax.devices()[: cfg.num_gpus]
        if len(chosen) < cfg.num_gpus:
            found = count_of(len(chosen), "device")
            raise config.UserError(f"--num_gpus={cfg.num_gpus}: only {found} here; use --num_gpus={len(chosen)}")
        model = trained_model.load(cfg.source, cfg.model_tag, cfg.step, cfg.preset)
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

        # Compile only what a short prompt needs. The server compiles the rest while it is idle. Then generate one
        # answer, to check that everything works and fits in memory.
        warmups = [engine.warmup(cfg.temperature, cfg.top_k) for engine in engines]
        for engine, warmup in zip(engines, warmups, strict=True):
            next(warmup)
            bos = model.tokenizer.bos
            engine.run([Request([bos], max_tokens=2, temperature=cfg.temperature, top_k=cfg.top_k, stop_ids=())])

        suggestions = tasks.suggestions(model.task_names)[:SUGGESTIONS]
        app = create_app(engines, cfg, model.name, chosen[0].device_kind, warmups, suggestions)
        print(f"chat at {url(listener)} (Ctrl-C stops the server)", flush=True)
        if cfg.max_new_tokens > (context := model.model_cfg.sequence_len):
            limit = f"--max_new_tokens={cfg.max_new_tokens}"
            print(f"an answer ends at the context of {context} tokens, which is shorter than {limit}", flush=True)
        if model.stage == "base":
            print("this model has not learned to chat: it only continues text", flush=True)
        if not is_loopback_address(listener.getsockname()[0]) and not cfg.api_key:
            print("anyone who can reach this address can use the model; --api_key=KEY requires a key", flush=True)
        answers = cfg.num_gpus * cfg.slots + cfg.max_waiting
        serve(server_config(app, cfg.keep_alive, answers), app.state.pool, listener)


def serve(server_cfg: "uvicorn.Config", pool: "Pool", listener: socket.socket) -> None:
    """Serves until a signal comes, then ends the program."""
    import uvicorn

    class Server(uvicorn.Server):
        """Accepts no new requests after a signal. After DRAIN[signal] more seconds, ends all unfinished answers."""

        drain = 0

        @contextmanager
        def capture_signals(self) -> Generator[None]:
            with super().capture_signals():  # handles only SIGINT and SIGTERM
                before = signal.getsignal(signal.SIGHUP)
                if before != signal.SIG_IGN:  # nohup makes a command ignore SIGHUP
                    signal.signal(signal.SIGHUP, self.handle_exit)
                try:
                    yield
                finally:
                    signal.signal(signal.SIGHUP, before)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # A signal may come in the middle of any line, for example while a log message is being written or a thread
            # is being started. So the handler neither prints nor takes a lock. `shutdown` does the rest.
            if not self.should_exit:
                self.drain = DRAIN[sig]
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            self.config.timeout_graceful_shutdown = self.drain + 2
            pool.stop_after(self.drain)
            await super().shutdown(sockets)

    for sig in DRAIN:  # after its shutdown, uvicorn raises the signal again, and `leave` ends the program
        if sig != signal.SIGHUP or signal.getsignal(sig) != signal.SIG_IGN:
            signal.signal(sig, leave)
    Server(server_cfg).run(sockets=[listener])


def leave(sig: int, frame: FrameType | None) -> None:
    """Ends the program. After SIGTERM, the exit code is 0, because this signal does not mean a failure.

    os._exit skips Python's own shutdown. That shutdown is slow, and it aborts if an engine's thread is compiling. The
    message is written with os.write, because a signal handler cannot use sys.stderr while the program writes to it.
    """
    if sig == signal.SIGTERM:
        os._exit(0)
    with suppress(OSError):  # after SIGHUP, the terminal may be closed
        os.write(2, b"stopped\n")
    os._exit(128 + sig)


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on host:port. Raises UserError if the address does not exist or is taken.

    The socket listens before the model is loaded, so that no other server can take the same port in the meantime.
    Clients that connect early wait for their answers.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise config.UserError(f"--host={host}: no such address; use 127.0.0.1 for local access") from None
    errors = []
    for family, kind, protocol, _, address in found:  # a name may have several addresses, such as ::1 and 127.0.0.1
        try:
            return _listen(socket.socket(family, kind, protocol), address)
        except OSError as error:
            errors.append(error)
    raise config.UserError(_why_not(host, port, errors[0]))


def _listen(listener: socket.socket, address: tuple) -> socket.socket:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # reuse the port of a server that has just stopped
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # only on Linux; accepted connections inherit this setting
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _why_not(host: str, port: int, error: OSError) -> str:
    """Returns the message for an error in `bind`. It contains the flag, the reason, and a value to try."""
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f"--host={host}: not an address of this machine; use 127.0.0.1 for local access"
    if error.errno in (errno.EACCES, errno.EPERM) and port < 1024:
        return f"--port={port}: only root may use the ports below 1024; use --port=8000, behind a proxy if need be"
    other = port + 1 if port < 65535 else 8000
    return f"--port={port} on {host}: {error.strerror}; try another, like --port={other}"


def url(listener: socket.socket) -> str:
    """Returns the address to open in a browser on this machine, such as http://127.0.0.1:8000."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # the server listens on all interfaces
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    commandline.run(main, config.ChatWeb)
