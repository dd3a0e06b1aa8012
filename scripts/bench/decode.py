"""Generating text: our engine, alone or beside transformers' NanoChat with its cache, with random weights.

    python -m scripts.bench decode
    python -m scripts.bench decode --peer=hf --peer_python=ENVIRONMENT/bin/python

A batch of different prompts, all of one length, each continued greedily by as many tokens. Every measurement is a
process of its own (decode_job.py), in which the same work was done once before; rounds go through all of them in turn,
and medians are shown. Each batch is measured in every dtype of --dtypes, and the best of them counts.
"""

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nanochat_jax import config
from nanochat_jax.config import UserError, setting
from scripts.bench import measuring

JOB = Path(__file__).with_name("decode_job.py")
DTYPES = ("float32", "bfloat16")
AUTO = {  # by platform: what is measured where nothing else is asked for
    "cpu": {"depth": 4, "vocab_size": 32768, "prompt": 256, "new": 256, "batches": "1,8,32",
            "dtypes": "float32,bfloat16"},
    "gpu": {"depth": 20, "vocab_size": 65536, "prompt": 1792, "new": 256, "batches": "1,8,32,128",
            "dtypes": "bfloat16"},
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Generate with our engine, and with transformers' NanoChat beside it."""

    prog: ClassVar[str] = "python -m scripts.bench decode"
    device_type: str = setting("", "cpu or gpu (default: the best there is)")
    depth: int = setting(0, "layers of the model (auto: 20 on a GPU, else 4)", auto=True)
    vocab_size: int = setting(0, "tokens (auto: 65,536 on a GPU, else 32,768)", auto=True)
    prompt: int = setting(0, "tokens of each prompt (auto: 1792 on a GPU, else 256)", auto=True)
    new: int = setting(0, "tokens generated after each, at least 2 (auto: 256)", auto=True)
    batches: str = setting("", "batch sizes, joined by commas (default: 1,8,32, and 128 on a GPU)")
    dtypes: str = setting("", "dtypes to try at each batch (default: bfloat16 on a GPU, else float32,bfloat16)")
    chunk: int = setting(32, "tokens our engine decodes between two looks of the host")
    rounds: int = setting(3, "measurements of each kind; their median counts")
    peer: str = setting("", "hf: also time transformers' NanoChat with its cache")
    peer_python: str = setting("", "Python that has torch and transformers (default: this one)")
    json: str = setting("", "file to add the line of JSON to")


def main(cfg: Settings) -> None:
    _check(cfg)
    try:
        device = measuring.run(sys.executable, JOB, {"job": "device", "device_type": cfg.device_type}, ours=True)
    except measuring.JobFailed as error:
        raise UserError(f"--device_type={cfg.device_type}: JAX finds no such device ({error})") from error
    cfg = _complete(cfg, device["platform"])
    batches, dtypes = [int(size) for size in cfg.batches.split(",")], cfg.dtypes.split(",")
    shape = config.ModelFlags(depth=cfg.depth, max_seq_len=cfg.prompt + cfg.new).gpt_config(cfg.vocab_size)
    tools, versions = {"ours": sys.executable}, {"ours": f"jax {device['version']}"}
    if cfg.peer:
        python = cfg.peer_python or sys.executable
        found = measuring.probe(python, JOB)
        if "version" in found:
            tools["hf"], versions["hf"] = python, found["version"]
        else:
            print(f"hf: skipped, {python} has no torch and transformers ({found['missing']})", file=sys.stderr)

    job = {"shape": dataclasses.asdict(shape), "prompt": cfg.prompt, "new": cfg.new, "chunk": cfg.chunk}
    job |= {"device_type": cfg.device_type, "platform": device["platform"]}
    found, failed = {}, set()
    for i in range(cfg.rounds):
        for kind in [(batch, tool, dtype) for batch in batches for tool in tools for dtype in dtypes]:
            if kind not in failed:
                _measure(kind, tools[kind[1]], job, found, failed, f"round {i + 1} of {cfg.rounds}")
    rows = [_row(kind, runs, cfg, device["bandwidth"]) for kind, runs in found.items() if kind not in failed]
    _compare(rows)

    about = measuring.about() | {name: device[name] for name in ("device", "platform")}
    asked = {name: getattr(cfg, name) for name in ("depth", "vocab_size", "prompt", "new", "chunk", "rounds")}
    print(f"{device['device']}; {about['cpu']}, {about['cores']} cores; Python {about['python']}; {about['code']}")
    print(", ".join(f"{tool}: {version}" for tool, version in versions.items()))
    print(f"depth {cfg.depth} ({shape.num_params / 1e6:,.1f}M parameters), vocabulary {cfg.vocab_size:,}; prompts of")
    print(f"{cfg.prompt} tokens, {cfg.new} new; chunks of {cfg.chunk}; medians of {cfg.rounds}; *: the best dtype\n")
    print(_table(rows))
    measuring.report({"bench": "decode", **about, **asked, "versions": versions, "results": rows}, cfg.json)


def _check(cfg: Settings) -> None:
    """UserError for what can be told before anything is started."""
    for name, least in (("depth", 1), ("vocab_size", 1), ("prompt", 1), ("new", 2)):
        if getattr(cfg, name) and getattr(cfg, name) < least:
            raise UserError(f"--{name}={getattr(cfg, name)}: must be at least {least}, or auto")
    for name in ("chunk", "rounds"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name}={getattr(cfg, name)}: must be at least 1")
    if cfg.batches and not all(size.isascii() and size.isdigit() and int(size) for size in cfg.batches.split(",")):
        raise UserError(f"--batches={cfg.batches}: must be positive numbers joined by commas, like 1,8,32")
    if cfg.dtypes and not set(cfg.dtypes.split(",")) <= set(DTYPES):
        raise UserError(f"--dtypes={cfg.dtypes}: must be {' or '.join(DTYPES)}, or both joined by a comma")
    if cfg.peer not in ("", "hf"):
        raise UserError(f"--peer={cfg.peer}: must be hf")
    if cfg.peer_python and not cfg.peer:
        raise UserError("--peer_python needs --peer=hf")
    measuring.check_json(cfg.json)


def _complete(cfg: Settings, platform: str) -> Settings:
    """With what the platform decides."""
    auto = AUTO["gpu" if platform == "gpu" else "cpu"]
    return dataclasses.replace(cfg, **{name: value for name, value in auto.items() if not getattr(cfg, name)})


# -----------------------------------------------------------------------------
# Measuring

Kind = tuple[int, str, str]  # batch, tool, dtype


def _measure(kind: Kind, python: str, job: dict, found: dict[Kind, list[dict]], failed: set[Kind], where: str) -> None:
    """One process; what fails once is not tried again, and must not be ours."""
    (batch, tool, dtype), start = kind, time.monotonic()
    try:
        done = measuring.run(python, JOB, job | {"job": tool, "batch": batch, "dtype": dtype}, ours=tool == "ours")
    except measuring.JobFailed as error:
        if tool == "ours":
            raise UserError(f"batch {batch} in {dtype} failed: {error}") from error
        failed.add(kind)
        print(f"{tool}, batch {batch}, {dtype}: left out, it failed ({error})", file=sys.stderr)
        return
    found.setdefault(kind, []).append(done)
    print(f"{where}: batch {batch}, {tool}, {dtype}, {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _row(kind: Kind, runs: list[dict], cfg: Settings, bandwidth: float | None) -> dict:
    """Figures of one kind of measurement. A step reads `bytes`; the first token of each row is the prefill's."""
    batch, tool, dtype = kind
    first = statistics.median(run["first"] for run in runs)
    step = statistics.median((run["seconds"] - run["first"]) / (cfg.new - 1) for run in runs)
    needed = runs[0].get("bytes")
    return {
        "batch": batch,
        "tool": tool,
        "dtype": dtype,
        "first_token_s": round(first, 6),
        "token_s": round(step, 8),
        "tokens_per_s": round(batch / step, 2),
        "bandwidth": round(needed / step / bandwidth, 4) if needed and bandwidth else None,
        "gb_per_s": round(needed / step / 1e9, 3) if needed else None,
        "runs": [[round(run["first"], 6), round(run["seconds"], 6)] for run in runs],
    }


def _compare(rows: list[dict]) -> None:
    """Marks the best dtype of each batch and tool, and says how many times as fast ours is, each in its best."""
    best = {}
    for row in rows:
        key = row["batch"], row["tool"]
        if key not in best or row["tokens_per_s"] > best[key]["tokens_per_s"]:
            best[key] = row
    for row in rows:
        row["best"] = best[row["batch"], row["tool"]] is row
        ours = best[row["batch"], "ours"]["tokens_per_s"]
        row["ours_is"] = round(ours / row["tokens_per_s"], 3) if row["best"] and row["tool"] != "ours" else None


def _table(rows: list[dict]) -> str:
    cells = [["batch", "", "dtype", "first token", "a token", "tokens/s", "memory bandwidth", "ours is"]]
    for row in rows:
        share = "n/a" if row["bandwidth"] is None else f"{row['bandwidth']:.0%}"
        ratio = "" if row["ours_is"] is None else f"{row['ours_is']:.2f}x"
        first, step = f"{row['first_token_s'] * 1e3:,.1f} ms", f"{row['token_s'] * 1e3:.3f} ms"
        dtype, speed = row["dtype"] + " *" * row["best"], f"{row['tokens_per_s']:,.0f}"
        cells.append([str(row["batch"]), row["tool"], dtype, first, step, speed, share, ratio])
    return measuring.table(cells, (False, True, True, False, False, False, False, False))
