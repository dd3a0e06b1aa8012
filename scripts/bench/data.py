"""Measures how many tokens per second the data loader delivers.

    python -m scripts.bench data --data_dir=FOLDER

The table compares this rate with the training speed of one H100 and of eight H100s. Pretraining uses the same data
loader. One thread reads, packs and prefetches batches, and the tokenizer encodes on all cores. Every round makes two
passes over the same files. The first pass reads text, and the second pass reads a cache of the text's tokens. Each pass
loads the tokenizer again, so that the tokenizer's own cache is empty.

The clock starts before the loader is created, because the loader starts to prefetch at once. When the clock stops, some
batches are prefetched but not used. They are not counted, so a short pass seems slower than it is.
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
from typing import TYPE_CHECKING, ClassVar

from nanochat_jax import config
from nanochat_jax.config import UserError, setting
from scripts.bench import measuring

if TYPE_CHECKING:  # importing these at run time would slow down --help
    from nanochat_jax.data.sources import Source
    from nanochat_jax.tokenizer import Tokenizer

GPU = 520_000  # tokens/s that one H100 consumes at depth 12; with 1.04 GFLOPs per token, the MFU is 54%
NAMES = {"text": "from text", "tokens": "from the token cache"}
GPUS = {"one H100 at d12": 1, "eight": 8}
SHORTEST = 0.5  # seconds; a shorter pass would mostly measure how long threads take to start
AHEAD = 0.1  # maximum number of prefetched but uncounted batches, as a fraction of the counted batches


@dataclass(frozen=True)
class Settings(config.Settings):
    """Load pretraining batches as fast as possible, from text and from a token cache."""

    prog: ClassVar[str] = "python -m scripts.bench data"
    data: str = setting("", "text source: fineweb-edu, climbmix or local (default: the tokenizer's training text)")
    data_dir: str = setting("", config.DATA_DIR_HELP)
    packing: str = setting("split", config.PACKING_HELP, choices=config.PACKINGS)
    total_batch_size: int = setting(524288, "tokens per batch", low=1)
    max_seq_len: int = setting(2048, "tokens per row", low=1)
    steps: int = setting(50, "number of batches to measure; fewer if the text ends first", low=1)
    rounds: int = setting(3, "number of times that each measurement runs; the median is reported", low=1)
    json: str = setting("", "file to append the results to, as one line of JSON")


def main(cfg: Settings) -> None:
    _check(cfg)
    from nanochat_jax.data import sources, token_cache
    from nanochat_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(config.base_dir() / "tokenizer")
    with contextlib.redirect_stdout(sys.stderr):
        source = sources.open(cfg.data, cfg.data_dir)
    source = dataclasses.replace(source, train_files=_needed(cfg, source, tokenizer), val_files=())

    measured = {"text": [], "tokens": []}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            cache_dir = {"text": None, "tokens": token_cache.build(source, tokenizer, Path(folder))}
        for i, (kind, runs) in itertools.product(range(cfg.rounds), measured.items()):
            runs.append(_measure(cfg, source, cache_dir[kind]))
            result = f"{runs[-1]['tokens']:,} tokens in {runs[-1]['seconds']:.2f} s"
            print(f"round {i + 1} of {cfg.rounds}: from {kind}, {result}", file=sys.stderr, flush=True)

    rows = [_row(kind, runs) for kind, runs in measured.items()]
    about = measuring.about() | {
        "source": source.name, "files": len(source.train_files), "vocab_size": tokenizer.vocab_size,
        "packing": cfg.packing, "total_batch_size": cfg.total_batch_size, "max_seq_len": cfg.max_seq_len,
        "rounds": cfg.rounds, "gpu_tokens_per_s": GPU,
    }  # fmt: skip
    print(f"{about['cpu']}, {about['cores']} cores; Python {about['python']}; {about['code']}")
    shape = f"{cfg.total_batch_size // cfg.max_seq_len} x {cfg.max_seq_len:,} tokens, packing {cfg.packing}"
    print(f"{source.name}, vocabulary {tokenizer.vocab_size:,}; {rows[0]['batches']} batches of {shape};")
    print(f"medians of {cfg.rounds}; one thread reads and packs, the tokenizer encodes on all cores;")
    print(f"an H100 at d12 consumes {GPU:,} tokens/s\n")
    print(_table(rows))
    for row in rows:
        if row["too_short"]:
            print(f"\n{NAMES[row['from']]}: {row['too_short']}: the figure is unreliable")
    measuring.report({"bench": "data", **about, "results": rows}, cfg.json)


def _check(cfg: Settings) -> None:
    """Raises UserError if the settings are invalid."""
    if cfg.total_batch_size % cfg.max_seq_len:
        raise UserError(
            f"--total_batch_size={cfg.total_batch_size}: must be a multiple of --max_seq_len={cfg.max_seq_len}"
        )
    measuring.check_json(cfg.json)


def _needed(cfg: Settings, source: "Source", tokenizer: "Tokenizer") -> tuple[Path, ...]:
    """Returns enough training files for --steps batches. Ignores files that are not on this machine yet.

    Raises UserError if no file is left.
    """
    from nanochat_jax.data import documents

    files = tuple(path for path in source.train_files if path.exists())
    available = documents.epoch_tokens(files, tokenizer)
    if not available > 0:  # `available` is NaN if there are no files
        raise UserError(f"{source.name}: none of its training files has arrived yet")
    needed = (cfg.steps + 1) * cfg.total_batch_size  # one extra batch, since some documents stay in the packing buffer
    return files[: math.ceil(1.1 * needed / available * len(files))]


# -----------------------------------------------------------------------------
# Measuring


def _measure(cfg: Settings, source: "Source", cache_dir: Path | None) -> dict:
    """Makes one pass over the files.

    In the result, `tokens` is the number of tokens that have a target. `ended` says whether the text ended before
    --steps batches.
    """
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
    """Returns why a pass is too short for a reliable figure, or "" if it is long enough."""
    from nanochat_jax.data.dataloader import PREFETCH

    if run["seconds"] < SHORTEST:
        return f"a pass of {run['seconds']:.2f} s is too short (at least {SHORTEST} s): use more text and raise --steps"
    if not run["ended"] and run["batches"] * AHEAD < PREFETCH:
        return f"{run['batches']} batches are too few where {PREFETCH} are prefetched: raise --steps"
    return ""


def _row(kind: str, runs: Sequence[dict]) -> dict:
    """Summarizes all passes of one kind, which is "text" or "tokens"."""
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
        ratios = (f"{ratio:.2f}x" for ratio in row["against"].values())
        cells.append([NAMES[row["from"]], f"{row['tokens_per_s']:,}", f"{row['cores_busy']:.1f}", *ratios])
    return measuring.table(cells, (True, False, False, False, False))
