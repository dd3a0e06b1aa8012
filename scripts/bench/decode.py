"""Measures how fast our engine generates text, with a model that has random weights.

    python -m scripts.bench decode
    python -m scripts.bench decode --peer=hf --peer_python=ENVIRONMENT/bin/python

With --peer=hf, the benchmark also measures transformers' NanoChat with a KV cache. The prompts of a batch differ but
have the same length. Greedy decoding generates the same number of tokens for each prompt. Every measurement runs in a
new process (decode_job.py), which warms up first. A round measures every combination of batch size, tool (our engine or
NanoChat) and dtype. The table shows the medians over all rounds. At each batch size, the table compares our engine in
its fastest dtype with NanoChat in its fastest dtype.
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
AUTO = {  # the default settings for each platform
    "cpu": {"depth": 4, "vocab_size": 32768, "prompt": 256, "new": 256, "batches": "1,8,32",
            "dtypes": "float32,bfloat16"},
    "gpu": {"depth": 20, "vocab_size": 65536, "prompt": 1792, "new": 256, "batches": "1,8,32,128",
            "dtypes": "bfloat16"},
}  # fmt: skip


@dataclass(frozen=True)
class Settings(config.Settings):
    """Generate text with our engine and, for comparison, with NanoChat in transformers."""

    prog: ClassVar[str] = "python -m scripts.bench decode"
    device_type: str = setting("", config.DEVICE_TYPE_HELP, choices=config.DEVICES)
    depth: int = setting(0, "layers of the model (auto: 20 on a GPU, else 4)", auto=True, low=1)
    vocab_size: int = setting(0, "tokens in the vocabulary (auto: 65,536 on a GPU, else 32,768)", auto=True, low=1)
    prompt: int = setting(0, "tokens per prompt (auto: 1792 on a GPU, else 256)", auto=True, low=1)
    new: int = setting(0, "tokens generated per prompt, at least 2 (auto: 256)", auto=True, low=2)
    batches: str = setting("", "batch sizes, separated by commas (default: 1,8,32,128 on a GPU, else 1,8,32)")
    dtypes: str = setting("", "dtypes to try at each batch size (default: bfloat16 on a GPU, else float32,bfloat16)")
    chunk: int = setting(32, "number of tokens per row that our engine decodes in one step", low=1)
    rounds: int = setting(3, "number of times that each measurement runs; the median is reported", low=1)
    peer: str = setting("", "hf: also measure NanoChat in transformers, with a KV cache", choices=("hf",))
    peer_python: str = setting("", "path of a Python with torch and transformers (default: the current one)")
    json: str = setting("", "file to append the results to, as one line of JSON")


def main(cfg: Settings) -> None:
    _check(cfg)
    device = measuring.device(JOB, cfg.device_type)
    cfg = _complete(cfg, device["platform"])
    batches, dtypes = [int(size) for size in cfg.batches.split(",")], cfg.dtypes.split(",")
    model_cfg = config.ModelFlags(depth=cfg.depth, max_seq_len=cfg.prompt + cfg.new).gpt_config(cfg.vocab_size)
    tools, versions = {"ours": sys.executable}, {"ours": f"jax {device['version']}"}
    if cfg.peer:
        python = cfg.peer_python or sys.executable
        peer = measuring.probe(python, JOB)
        if "version" in peer:
            tools["hf"], versions["hf"] = python, peer["version"]
        else:
            print(f"hf: skipped, {python} has no torch and transformers ({peer['missing']})", file=sys.stderr)

    job = {
        "shape": dataclasses.asdict(model_cfg), "prompt": cfg.prompt, "new": cfg.new, "chunk": cfg.chunk,
        "device_type": cfg.device_type, "platform": device["platform"],
    }  # fmt: skip
    measured: dict[Kind, list[dict]] = {}
    failed: set[Kind] = set()
    for i in range(cfg.rounds):
        for kind in [(batch, tool, dtype) for batch in batches for tool in tools for dtype in dtypes]:
            if kind not in failed:
                _measure(kind, tools[kind[1]], job, measured, failed, f"round {i + 1} of {cfg.rounds}")
    rows = [_row(kind, runs, cfg, device["bandwidth"]) for kind, runs in measured.items() if kind not in failed]
    _compare(rows)

    about = measuring.about() | {name: device[name] for name in ("device", "platform")}
    settings = {name: getattr(cfg, name) for name in ("depth", "vocab_size", "prompt", "new", "chunk", "rounds")}
    print(f"{device['device']}; {about['cpu']}, {about['cores']} cores; Python {about['python']}; {about['code']}")
    print(", ".join(f"{tool}: {version}" for tool, version in versions.items()))
    print(
        f"depth {cfg.depth} ({model_cfg.num_params / 1e6:,.1f}M parameters), vocabulary {cfg.vocab_size:,}; prompts of"
    )
    print(f"{cfg.prompt} tokens, {cfg.new} new; chunks of {cfg.chunk}; medians of {cfg.rounds}; *: the fastest dtype\n")
    print(_table(rows))
    measuring.report({"bench": "decode", **about, **settings, "versions": versions, "results": rows}, cfg.json)


def _check(cfg: Settings) -> None:
    """Raises UserError if the settings are invalid."""
    if cfg.batches and not all(size.isascii() and size.isdigit() and int(size) for size in cfg.batches.split(",")):
        raise UserError(f"--batches={cfg.batches}: must be positive numbers joined by commas, like 1,8,32")
    if cfg.dtypes and not set(cfg.dtypes.split(",")) <= set(DTYPES):
        raise UserError(f"--dtypes={cfg.dtypes}: must be {' or '.join(DTYPES)}, or both joined by a comma")
    if cfg.peer_python and not cfg.peer:
        raise UserError("--peer_python needs --peer=hf")
    measuring.check_json(cfg.json)


def _complete(cfg: Settings, platform: str) -> Settings:
    """Returns `cfg`, with the platform's default for every setting that was not given."""
    auto = AUTO["gpu" if platform == "gpu" else "cpu"]
    return dataclasses.replace(cfg, **{name: value for name, value in auto.items() if not getattr(cfg, name)})


# -----------------------------------------------------------------------------
# Measuring

Kind = tuple[int, str, str]  # batch size, tool, dtype


def _measure(
    kind: Kind, python: str, job: dict, measured: dict[Kind, list[dict]], failed: set[Kind], where: str
) -> None:
    """Makes one measurement in a new process and adds it to `measured`. If a peer fails, adds `kind` to `failed`.

    Raises UserError if our own engine fails.
    """
    (batch, tool, dtype), start = kind, time.monotonic()
    try:
        result = measuring.run(python, JOB, job | {"job": tool, "batch": batch, "dtype": dtype}, ours=tool == "ours")
    except measuring.JobFailed as error:
        if tool == "ours":
            raise UserError(f"batch {batch} in {dtype} failed: {error}") from error
        failed.add(kind)
        print(f"{tool}, batch {batch}, {dtype}: left out, it failed ({error})", file=sys.stderr)
        return
    measured.setdefault(kind, []).append(result)
    print(f"{where}: batch {batch}, {tool}, {dtype}, {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _row(kind: Kind, runs: list[dict], cfg: Settings, bandwidth: float | None) -> dict:
    """Returns a row of the table.

    The prefill yields the first token of an answer, so decoding takes `cfg.new` - 1 steps.
    """
    batch, tool, dtype = kind
    first = statistics.median(run["first"] for run in runs)
    step = statistics.median((run["seconds"] - run["first"]) / (cfg.new - 1) for run in runs)
    read = runs[0].get("bytes")
    return {
        "batch": batch,
        "tool": tool,
        "dtype": dtype,
        "first_token_s": round(first, 6),
        "token_s": round(step, 8),
        "tokens_per_s": round(batch / step, 2),
        "bandwidth": round(read / step / bandwidth, 4) if read and bandwidth else None,
        "gb_per_s": round(read / step / 1e9, 3) if read else None,
        "runs": [[round(run["first"], 6), round(run["seconds"], 6)] for run in runs],
    }


def _compare(rows: list[dict]) -> None:
    """Marks the fastest dtype of each tool at each batch size.

    In the row of the peer's fastest dtype, `ours_is` says how many times faster our engine is.
    """
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
    cells = [["batch", "", "dtype", "first token", "per token", "tokens/s", "memory bandwidth", "ours vs. peer"]]
    for row in rows:
        share = "n/a" if row["bandwidth"] is None else f"{row['bandwidth']:.0%}"
        ratio = "" if row["ours_is"] is None else f"{row['ours_is']:.2f}x"
        first, step = f"{row['first_token_s'] * 1e3:,.1f} ms", f"{row['token_s'] * 1e3:.3f} ms"
        dtype, speed = row["dtype"] + " *" * row["best"], f"{row['tokens_per_s']:,.0f}"
        cells.append([str(row["batch"]), row["tool"], dtype, first, step, speed, share, ratio])
    return measuring.table(cells, (False, True, True, False, False, False, False, False))
