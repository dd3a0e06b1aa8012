"""What the data loader delivers, against what GPUs consume: text -> tokens -> packed rows, as training has them.

    python -m scripts.bench data --data_dir=FOLDER

The loader is that of `python -m scripts.train --stage=base`, with its settings and its workers: one thread reads and
packs ahead of whoever takes the batches, and the tokenizer encodes on all cores. It reads text, and the same files
tokenized before, in turn; each time the first epoch, with a tokenizer that has cached nothing yet.

The clock starts before the loader does: of what it reads ahead nothing is counted that was made before. What it has
made beyond the last batch taken is not counted either, so a pass must be long against that, or its figure is too low.
"""

import contextlib
import dataclasses
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nanochat_jax import config
from nanochat_jax.config import UserError, setting
from scripts.bench import measuring

GPU = 520_000  # tokens a second that one H100 takes in at depth 12: 54% of its peak at 1.04 GFLOPs a token
NAMES = {"text": "from text", "tokens": "from tokens made before"}
GPUS = {"one H100 at d12": 1, "eight": 8}
SHORTEST = 0.5  # seconds; in less, starting threads and taking turns weigh too much
AHEAD = 0.1  # of the batches counted, at most as many may be made and not taken


@dataclass(frozen=True)
class Settings:
    """Load pretraining batches as fast as possible, from text and from tokens."""

    prog: ClassVar[str] = "python -m scripts.bench data"
    data: str = setting("", "text source: fineweb-edu, climbmix or local (default: the tokenizer's)")
    data_dir: str = setting("", "folder of parquet, jsonl or txt files to use instead of --data")
    packing: str = setting("split", "how rows are made of documents: split, crop or stream")
    total_batch_size: int = setting(524288, "tokens a batch")
    max_seq_len: int = setting(2048, "tokens a row")
    steps: int = setting(50, "batches to measure; fewer where the text ends")
    rounds: int = setting(3, "measurements of each kind; their median counts")
    json: str = setting("", "file to add the line of JSON to")


def main(cfg: Settings) -> None:
    _check(cfg)
    from nanochat_jax.data import dataloader, sources, token_cache
    from nanochat_jax.tokenizer import Tokenizer

    dataloader.check_packing(cfg.packing)
    tokenizer = Tokenizer.load(config.base_dir() / "tokenizer")
    with contextlib.redirect_stdout(sys.stderr):
        source = sources.open(cfg.data, cfg.data_dir)
    source = dataclasses.replace(source, train_files=_needed(cfg, source, tokenizer), val_files=())

    found = {"text": [], "tokens": []}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            cache_dir = {"text": None, "tokens": token_cache.build(source, tokenizer, Path(folder))}
        for i, (kind, runs) in itertools.product(range(cfg.rounds), found.items()):
            runs.append(_measure(cfg, source, cache_dir[kind]))
            said = f"{runs[-1]['tokens']:,} tokens in {runs[-1]['seconds']:.2f} s"
            print(f"round {i + 1} of {cfg.rounds}: from {kind}, {said}", file=sys.stderr, flush=True)

    rows = [_row(kind, runs) for kind, runs in found.items()]
    about = measuring.about() | {
        "source": source.name, "files": len(source.train_files), "vocab_size": tokenizer.vocab_size,
        "packing": cfg.packing, "total_batch_size": cfg.total_batch_size, "max_seq_len": cfg.max_seq_len,
        "rounds": cfg.rounds, "gpu_tokens_per_s": GPU,
    }  # fmt: skip
    print(f"{about['cpu']}, {about['cores']} cores; Python {about['python']}; {about['code']}")
    shape = f"{cfg.total_batch_size // cfg.max_seq_len} x {cfg.max_seq_len:,} tokens, packing {cfg.packing}"
    print(f"{source.name}, vocabulary {tokenizer.vocab_size:,}; {rows[0]['batches']} batches of {shape};")
    print(f"medians of {cfg.rounds}; one thread reads and packs, the tokenizer encodes on all cores;")
    print(f"an H100 at d12 takes in {GPU:,} tokens/s\n")
    print(_table(rows))
    for row in rows:
        if row["too_short"]:
            print(f"\n{NAMES[row['from']]}: {row['too_short']}: no figure to rely on")
    measuring.report({"bench": "data", **about, "results": rows}, cfg.json)


def _check(cfg: Settings) -> None:
    for name in ("total_batch_size", "max_seq_len", "steps", "rounds"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name}={getattr(cfg, name)}: must be at least 1")
    if cfg.total_batch_size % cfg.max_seq_len:
        raise UserError(
            f"--total_batch_size={cfg.total_batch_size}: must be a multiple of --max_seq_len={cfg.max_seq_len}"
        )
    measuring.check_json(cfg.json)


def _needed(cfg: Settings, source, tokenizer) -> tuple[Path, ...]:
    """The first training files, as many as the batches to measure are made of, of those that are here."""
    from nanochat_jax.data import dataloader

    here = tuple(path for path in source.train_files if path.exists())
    there = dataloader.epoch_tokens(here, tokenizer)
    if not there > 0:  # NaN as well
        raise UserError(f"{source.name}: none of its training files is here yet")
    tokens = (cfg.steps + 1) * cfg.total_batch_size  # and what waits to be packed
    return here[: math.ceil(1.1 * tokens / there * len(here))]


# -----------------------------------------------------------------------------
# Measuring


def _measure(cfg: Settings, source, cache_dir: Path | None) -> dict:
    """One pass over the files: batches, tokens to predict, seconds, seconds of the CPU, and whether the text ended."""
    from nanochat_jax.data import dataloader
    from nanochat_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(config.base_dir() / "tokenizer")
    rows, counts = cfg.total_batch_size // cfg.max_seq_len, []
    start, cpu = time.perf_counter(), time.process_time()
    loader = dataloader.base_loader(
        source.train_files, tokenizer, rows, cfg.max_seq_len, packing=cfg.packing, epochs=1, cache_dir=cache_dir
    )
    try:
        while len(counts) < cfg.steps and (batch := next(loader, None)) is not None:
            counts.append(int((batch["targets"] >= 0).sum()))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    finally:
        loader.close()
    ended = len(counts) < cfg.steps
    return {"batches": len(counts), "tokens": sum(counts), "seconds": seconds, "cpu_seconds": cpu, "ended": ended}


def _too_short(run: dict) -> str:
    """What makes a pass too short to say how fast the loader is; "" if nothing does."""
    from nanochat_jax.data.dataloader import PREFETCH

    if run["seconds"] < SHORTEST:
        return f"a pass of {run['seconds']:.2f} s is too short (at least {SHORTEST} s): give more text and --steps"
    if not run["ended"] and run["batches"] * AHEAD < PREFETCH:
        return f"{run['batches']} batches are too few where {PREFETCH} are made ahead: give more --steps"
    return ""


def _row(kind: str, runs: Sequence[dict]) -> dict:
    """What the table shows of one kind."""
    speed = statistics.median(run["tokens"] / run["seconds"] for run in runs)
    return {
        "from": kind,
        "batches": runs[0]["batches"],
        "tokens": runs[0]["tokens"],
        "seconds": [round(run["seconds"], 6) for run in runs],
        "tokens_per_s": round(speed),
        "cores_busy": round(statistics.median(run["cpu_seconds"] / run["seconds"] for run in runs), 2),
        "too_short": next(filter(None, map(_too_short, runs)), ""),
        "against": {name: round(speed / (GPU * count), 3) for name, count in GPUS.items()},
    }


def _table(rows: list[dict]) -> str:
    cells = [["", "tokens/s", "cores busy", *(f"against {name}" for name in GPUS)]]
    for row in rows:
        times = (f"{times:.2f}x" for times in row["against"].values())
        cells.append([NAMES[row["from"]], f"{row['tokens_per_s']:,}", f"{row['cores_busy']:.1f}", *times])
    return measuring.table(cells, (True, False, False, False, False))
