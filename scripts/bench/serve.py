"""Compares the throughput of the server with the throughput of the engine alone, on one device.

    python -m scripts.bench serve

The server (scripts.chat_web) runs in its own process and listens on the loopback interface. The model has the shape
that --preset gives, and random weights. All clients run in this process, on the same cores as the server. Each client
sends its requests to /v1/completions one after another. It reads each answer as a stream with one event per chunk. Then
the engine alone serves the same requests, with the same number of slots and the same chunk size. Before each
measurement, one warm-up request per client is served, so that nothing compiles during the measurement.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nanochat_jax import commandline, config
from nanochat_jax.config import REPOSITORY, UserError, setting
from scripts.bench import measuring

JOB = Path(__file__).with_name("serve_job.py")
SAMPLING = {"temperature": 0.8, "top_k": 50}  # the server's defaults
GAPS = {
    "gap": "longest gap between two events of a stream",
    "gap_compiling": "the same, while another client's first top-p answer is compiled",
    "compiling": "that answer took",
}
GOAL = 0.8  # the server should reach this fraction of the engine's throughput


@dataclass(frozen=True)
class Settings(config.Settings):
    """Compare the server under load with the engine alone."""

    prog: ClassVar[str] = "python -m scripts.bench serve"
    preset: str = setting("cpu", "preset that gives the shape of the model; the weights are random")
    clients: int = setting(64, "number of concurrent clients; the server has as many slots", low=1)
    requests: int = setting(4, "number of requests that each client sends, one after another", low=1)
    prompt: int = setting(64, "tokens per prompt", low=1)
    new: int = setting(128, "tokens generated per prompt, at least 2", low=2)
    rounds: int = setting(3, "number of times that each measurement runs; the median is reported", low=1)
    device_type: str = setting("", config.DEVICE_TYPE_HELP, choices=config.DEVICES)
    json: str = setting("", "file to append the results to, as one line of JSON")


def main(cfg: Settings) -> None:
    model_cfg = _model_cfg(cfg)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with _base_dir(base):
            made = _job(cfg, {"job": "make", "shape": dataclasses.asdict(model_cfg)})
            requests = _requests(cfg)
            served, alone = [], []
            for i in range(cfg.rounds):
                served.append(_serve(cfg, base, requests))
                alone.append(_job(cfg, {"job": "engine", "requests": requests, "clients": cfg.clients}))
                print(f"round {i + 1} of {cfg.rounds}", file=sys.stderr, flush=True)

    result = _result(served, alone)
    about = measuring.about() | {"device": made["device"]} | {
        name: getattr(cfg, name) for name in ("preset", "clients", "requests", "prompt", "new", "rounds")
    }  # fmt: skip
    print(f"{about['device']}; {about['cpu']}, {about['cores']} cores; Python {about['python']}; {about['code']}")
    print(f"shape of the preset {cfg.preset} ({made['params'] / 1e6:,.1f}M parameters), random weights;")
    print(
        f"{cfg.clients} clients and slots, {cfg.requests} requests each: prompts of {cfg.prompt} tokens, {cfg.new} new;"
    )
    print(f"medians of {cfg.rounds}\n")
    print(_table(result))
    measuring.report({"bench": "serve", **about, **result}, cfg.json)


def _model_cfg(cfg: Settings) -> config.GPTConfig:
    """Returns the shape of the preset's model. Raises UserError if the settings are invalid."""
    measuring.check_json(cfg.json)
    try:
        path = commandline.find_preset(cfg.preset)
    except UserError as error:
        raise UserError(str(error).replace("--config", "--preset", 1)) from None
    flags = [f"--config={path}"]
    vocab_size = commandline.parse(config.TokTrain, flags).vocab_size
    model_cfg = commandline.parse(config.Base, flags).gpt_config(vocab_size)
    if cfg.prompt + cfg.new > model_cfg.sequence_len:
        context = f"the context of {cfg.preset} holds {model_cfg.sequence_len} tokens"
        raise UserError(f"--prompt={cfg.prompt} and --new={cfg.new}: {context}")
    return model_cfg


def _requests(cfg: Settings) -> list[dict]:
    """Returns all requests. Client i sends the requests i, i + clients, i + 2 * clients and so on.

    The first request of each client is its warm-up. The prompts are different sequences of random bytes, so prefix
    caching saves nothing.
    """
    rng = random.Random(0)
    return [
        {"prompt": rng.choices(range(256), k=cfg.prompt), "max_tokens": cfg.new, "seed": seed} | SAMPLING
        for seed in range(cfg.clients * (cfg.requests + 1))
    ]


@contextlib.contextmanager
def _base_dir(base: Path) -> Generator[None]:
    """Makes `base` the base folder of all child processes that start inside the `with` block."""
    before = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    try:
        yield
    finally:
        os.environ.pop("NANOCHAT_BASE_DIR")
        if before is not None:
            os.environ["NANOCHAT_BASE_DIR"] = before


def _job(cfg: Settings, job: dict) -> dict:
    """Runs a job of serve_job.py and returns its result. Raises UserError if the job fails."""
    try:
        return measuring.run(sys.executable, JOB, job | {"device_type": cfg.device_type}, ours=True)
    except measuring.JobFailed as error:
        raise UserError(f"{job['job']} failed: {error}") from error


# -----------------------------------------------------------------------------
# The clients


def _serve(cfg: Settings, base: Path, requests: list[dict]) -> dict:
    """Starts the server, warms it up, and returns the results of `_gaps`, and of `_clients` for the other requests."""
    command = [
        sys.executable, "-m", "scripts.chat_web", "--port=0", "-g", "bench", f"--slots={cfg.clients}",
        f"--max_waiting={cfg.clients}", f"--max_new_tokens={cfg.new}", "--timeout=0",
        f"--device_type={cfg.device_type}",
    ]  # fmt: skip
    log = base / "server.log"
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None  # stdout is a pipe
        words = (word for line in process.stdout for word in line.split())
        address = next((word for word in words if word.startswith("http://")), None)
        if not address:
            raise UserError(f"the server did not start: {log.read_text(encoding='utf-8').strip().splitlines()[-1:]}")
        port = int(address.rpartition(":")[2])
        gaps = asyncio.run(_gaps(port, requests[0]))
        asyncio.run(_clients(port, requests[: cfg.clients], cfg.clients))
        while _stats(address)["warming"]:  # compiling in the server would disturb the measurement
            time.sleep(0.1)
        return asyncio.run(_clients(port, requests[cfg.clients :], cfg.clients)) | gaps
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _stats(address: str) -> dict:
    with urllib.request.urlopen(f"{address}/stats", timeout=60) as response:
        return json.load(response)


async def _gaps(port: int, request: dict) -> dict:
    """Measures the longest time between two events of a stream, in seconds: while nothing else happens, and while
    another client's first request with top-p waits for its program to be compiled."""
    await _ask(port, request)  # compiles what this request needs
    gap = (await _ask(port, request))["gap"]
    start, gaps = time.perf_counter(), []
    first_of_its_kind = asyncio.create_task(_ask(port, request | {"top_k": 0, "top_p": 0.9}))
    while not first_of_its_kind.done():
        gaps.append((await _ask(port, request))["gap"])
    await first_of_its_kind
    return {"gap": gap, "gap_compiling": max(gaps), "compiling": time.perf_counter() - start}


async def _clients(port: int, requests: list[dict], clients: int) -> dict:
    """Runs all clients concurrently. Returns the total seconds, the total tokens, and the time to first token of each
    request."""

    async def client(mine: list[dict]) -> list[dict]:
        return [await _ask(port, request) for request in mine]

    start = time.perf_counter()
    answers = await asyncio.gather(*(client(requests[i::clients]) for i in range(clients)))
    seconds = time.perf_counter() - start
    answers = [answer for mine in answers for answer in mine]
    return {"seconds": seconds, "tokens": sum(a["tokens"] for a in answers), "first": [a["first"] for a in answers]}


async def _ask(port: int, request: dict) -> dict:
    """Sends a request and reads the whole answer. Returns the answer's number of tokens, the seconds until its first
    event, and the longest time between two of its events."""
    body = json.dumps(request | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    start, first, last, gap, tokens = time.perf_counter(), None, None, 0.0, None
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status = (await reader.readline()).decode()
        if status.split()[1:2] != ["200"]:
            raise UserError(f"the server answered {status.strip() or 'nothing'}")
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            now = time.perf_counter()
            if first is None:
                first = now - start
            gap = max(gap, now - (last or now))
            last = now
            if "error" in event:
                raise UserError(f"the server answered: {event['error']['message']}")
            if event["usage"]:
                tokens = event["usage"]["completion_tokens"]
    finally:
        writer.close()
    if tokens is None:
        raise UserError("an answer ended before its last event")
    return {"first": first, "tokens": tokens, "gap": gap}


# -----------------------------------------------------------------------------
# Showing


def _result(served: list[dict], alone: list[dict]) -> dict:
    """Returns the median throughputs of the server and of the engine, and their ratio.

    Also returns percentiles of the time to first token, computed over the requests of all rounds.
    """
    speed = statistics.median(run["tokens"] / run["seconds"] for run in served)
    engine_speed = statistics.median(run["tokens"] / run["seconds"] for run in alone)
    first = sorted(seconds for run in served for seconds in run["first"])

    def percentile(p: int) -> float:
        return first[min(len(first) - 1, p * len(first) // 100)]

    return {
        "server_tokens_per_s": round(speed, 2),
        "engine_tokens_per_s": round(engine_speed, 2),
        "share": round(speed / engine_speed, 4),
        "goal": GOAL,
        "first_token_p50_s": round(percentile(50), 6),
        "first_token_p95_s": round(percentile(95), 6),
        **{f"{name}_s": round(statistics.median(run[name] for run in served), 6) for name in GAPS},
        "runs": [[round(run["seconds"], 6), run["tokens"]] for run in served],
        "engine_runs": [[round(run["seconds"], 6), run["tokens"]] for run in alone],
    }


def _table(result: dict) -> str:
    cells = [
        ["", ""],
        ["the server, tokens/s", f"{result['server_tokens_per_s']:,.0f}"],
        ["the engine alone, tokens/s", f"{result['engine_tokens_per_s']:,.0f}"],
        [f"share of the engine's (the goal is {GOAL:.0%})", f"{result['share']:.1%}"],
        ["time to first token, median", f"{result['first_token_p50_s'] * 1e3:,.0f} ms"],
        ["time to first token, 95th percentile", f"{result['first_token_p95_s'] * 1e3:,.0f} ms"],
    ]
    cells += [[label, f"{result[f'{name}_s'] * 1e3:,.0f} ms"] for name, label in GAPS.items()]
    return measuring.table(cells, (True, False))
