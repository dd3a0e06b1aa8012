"""Trains the tokenizer on the first training documents of a text source, up to --max_chars characters.

    python -m scripts.tok_train --max_chars=2000000000

Without --data and --data_dir, the command reads the text that was downloaded. If several texts were downloaded, the
user must choose one with --data.

Writes tokenizer.json, nanochat.json, source.json and log.jsonl to the folder $NANOCHAT_BASE_DIR/tokenizer. The file
source.json names the text that the tokenizer was trained on. Later stages read the same text by default. A second run
with the same settings finds the tokenizer and trains nothing.
"""

import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_jax import commandline, config
from nanochat_jax.files import read_json
from nanochat_jax.progress import Progress, short

if TYPE_CHECKING:  # importing this at run time would slow down --help
    from nanochat_jax.data.sources import Source

SAMPLE = """Hello world! This is a test.
Numbers: 123, 4567, 89
Contractions: I'm, you're, it's
Special chars: @#$%^&*()
Unicode: 你好世界 🌍"""


def main(cfg: config.TokTrain) -> None:
    from nanochat_jax import run_log
    from nanochat_jax.data import parquet, sources
    from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer

    folder = config.base_dir() / "tokenizer"
    source = sources.open(cfg.data, cfg.data_dir, cfg.num_files or -1, sources.downloaded, preset=cfg.preset)
    recipe = _recipe(cfg, source)
    if not cfg.fresh and _recorded(folder, cfg, recipe):
        print(f"{folder} was already trained with these settings; --fresh trains it again")
        return
    for aside in [] if cfg.fresh else sorted(folder.parent.glob(f"{folder.name}-{'[0-9a-f]' * 8}")):
        if _recorded(aside, cfg, recipe):
            print(f"{aside} was trained with these settings: moving it back; --fresh trains it again")
            _swap(aside, folder)
            return

    # One pass over the text counts how often each word occurs. The merges are then learned from these counts alone.
    print(f"training a tokenizer of {cfg.vocab_size:,} tokens on {source.name}")
    start = time.monotonic()
    reading = Reading()
    with Meter(_expected_chars(cfg, source, parquet.SHARD_CHARS)) as meter:
        texts = _documents(source, cfg.max_chars, cfg.doc_cap, reading, meter.chars)
        tokenizer = Tokenizer.train(texts, cfg.vocab_size, progress=meter.merges)
    seconds = time.monotonic() - start - reading.waited
    if reading.chars <= cfg.max_chars:
        print(_too_little(cfg, source, reading))
    if cfg.num_files == 0 and recipe["num_files"]:
        recipe["num_files"] = reading.files
    if tokenizer.vocab_size < cfg.vocab_size:
        print(
            f"warning: the text ran out of pairs to merge, so there are {tokenizer.vocab_size:,} tokens instead of"
            f" --vocab_size={cfg.vocab_size}; use more text or a lower --vocab_size"
        )
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE, "decoding does not restore the encoded text"

    # Write all files to a new folder, and then swap the folders, so that no folder ever mixes files of two tokenizers.
    new = folder.with_name("tokenizer.new")
    shutil.rmtree(new, ignore_errors=True)
    tokenizer.save(new)
    (new / "source.json").write_text(json.dumps(recipe | {"hash": tokenizer.hash}, indent=2) + "\n", encoding="utf-8")
    lengths = tokenizer.token_bytes()[: -len(SPECIAL_TOKENS)]
    run_log.append(
        new, kind="tok_train", stage="tok", step=0, task="train", **recipe, documents=reading.documents,
        chars=reading.chars, seconds=round(seconds, 3),
        reached_vocab_size=tokenizer.vocab_size, special_tokens=len(SPECIAL_TOKENS), peak_memory_bytes=_peak_memory(),
        token_bytes_min=int(lengths.min()), token_bytes_max=int(lengths.max()),
        token_bytes_mean=float(lengths.mean()), token_bytes_std=float(lengths.std()),
    )  # fmt: skip
    _swap(new, folder)
    print(
        f"{reading.documents:,} documents, {reading.chars:,} characters in {seconds:.1f} s"
        f" ({reading.chars / max(seconds, 1e-9) / 1e6:.1f}M/s), peak memory {_peak_memory() / 1e6:,.0f} MB"
    )
    print(f"{tokenizer.vocab_size:,} tokens in {folder}")


def _recipe(cfg: config.TokTrain, source: "Source") -> dict:
    """Returns the text and the settings that determine the tokenizer.

    In the result, `num_files` is the number of shards that may be read. With --num_files=auto, `main` replaces this by
    the number of shards that were read. If the text was not downloaded, `num_files` is None.
    """
    from nanochat_jax.data import hub

    return {
        "source": source.name,
        "data_dir": str(source.folder) if source.folder else None,
        "source_hash": source.hash,
        "num_files": len(source.train_files) if source.name in hub.SOURCES and not source.folder else None,
        "max_chars": cfg.max_chars,
        "doc_cap": cfg.doc_cap,
        "vocab_size": cfg.vocab_size,
    }


def _recorded(folder: Path, cfg: config.TokTrain, recipe: dict) -> bool:
    """Returns whether `folder` holds a tokenizer trained with this recipe. A damaged tokenizer counts as missing."""
    from nanochat_jax import run_log
    from nanochat_jax.tokenizer import Tokenizer

    record = read_json(folder / "source.json")
    changed = {key for key, value in recipe.items() if record.get(key) != value}
    if cfg.num_files == 0 and (record.get("num_files") or 0) < (recipe["num_files"] or 0):
        # Further shards change nothing if --max_chars was reached in the first ones.
        trained = [r for r in run_log.read(folder) if r["kind"] == "tok_train"] if folder.exists() else []
        if trained and trained[-1]["chars"] > cfg.max_chars:
            changed.discard("num_files")
    if changed:
        return False
    try:
        return Tokenizer.load(folder).hash == record.get("hash")
    except config.UserError as error:
        print(f"training again: {error}")
        return False


def _swap(new: Path, folder: Path) -> None:
    """Moves `new` to `folder`.

    If `folder` holds a different tokenizer, first moves the old tokenizer to a folder named after its hash. Models that
    were trained with the old tokenizer still need it.
    """
    old_hash = read_json(folder / "source.json").get("hash")
    if old_hash == read_json(new / "source.json")["hash"]:
        for path in new.iterdir():  # the user's own files in `folder` stay
            os.replace(path, folder / path.name)
        new.rmdir()
        return
    if folder.exists():
        name = old_hash[:8] if isinstance(old_hash, str) and re.fullmatch("[0-9a-f]{64}", old_hash) else "damaged"
        numbers = itertools.chain([""], (f".{i}" for i in itertools.count(2)))
        asides = (f"tokenizer-{name}{number}" for number in numbers)
        aside = next(path for path in map(folder.with_name, asides) if not path.exists())
        os.replace(folder, aside)
        print(f"the previous tokenizer is now in {aside}; models trained with it still need it")
    os.replace(new, folder)


@dataclass
class Reading:
    """What has been read so far."""

    documents: int = 0
    chars: int = 0  # after truncation to --doc_cap
    files: int = 0
    waited: float = 0.0  # seconds spent waiting for shards that were still downloading


def _documents(
    source: "Source", max_chars: int, doc_cap: int, reading: Reading, report: Callable[[int], None]
) -> Iterator[str]:
    """Yields the training documents, each truncated to `doc_cap` characters.

    Stops when the total exceeds `max_chars` characters. Updates `reading`. After every 256 documents, calls `report`
    with the number of characters so far.
    """
    from nanochat_jax.data import hub, parquet

    for path in source.train_files:
        start = time.monotonic()
        try:
            hub.wait_for_shard(path)
        except config.UserError as error:
            fewer = f"train on the {reading.files} shards before it (--num_files={reading.files})"
            raise config.UserError(f"{error}, or {fewer}" if reading.files else str(error)) from None
        reading.waited += time.monotonic() - start
        reading.files += 1
        for text in filter(None, parquet.texts_of(path)):
            text = text[:doc_cap]
            reading.documents += 1
            reading.chars += len(text)
            yield text
            if reading.documents % 256 == 0:
                report(reading.chars)
            if reading.chars > max_chars:
                return


def _too_little(cfg: config.TokTrain, source: "Source", reading: Reading) -> str:
    """Says that the text has fewer than --max_chars characters, and how to get more text."""
    from nanochat_jax.data import hub

    if source.name not in hub.SOURCES or source.folder:
        return f"the whole text of {source.name} was read: {short(reading.chars)} characters"
    lacks = f"{source.name} has only {short(reading.chars)} of --max_chars={short(cfg.max_chars)} characters"
    if cfg.num_files > 0:
        return f"{lacks} in its first {cfg.num_files} shards: read more with --num_files=auto"
    wanted = min(hub.SOURCES[source.name][1], math.ceil(cfg.max_chars / max(1, reading.chars) * reading.files))
    more = f"python -m nanochat_jax.dataset --data={source.name} -n {wanted}"
    return f"{lacks}: all {reading.files} shards were read; download more with {more}"


def _expected_chars(cfg: config.TokTrain, source: "Source", shard_chars: int) -> int | None:
    """Estimates how many characters will be read, for the progress bar.

    Returns None for a single file, because it may have any length.
    """
    files = len(source.train_files)
    return min(cfg.max_chars, files * shard_chars) if files > 1 else None


def _peak_memory() -> int:
    """Returns the peak memory of this process in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Shows the progress of the two phases, reading and merging."""

    def __init__(self, expected_chars: int | None) -> None:
        self.phase = Progress("reading, characters", expected_chars)
        self.merging = False

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *error: object) -> None:
        self.phase.__exit__(*error)

    def chars(self, done: int) -> None:
        """Reports that `done` characters have been read."""
        self.phase.reach(done, f"{done / 1e6 / max(self.phase.seconds, 1e-9):.1f}M/s")

    def merges(self, done: int, total: int) -> None:
        """Reports that `done` of `total` merges have been learned. The first call ends the reading phase."""
        if not self.merging:
            self.merging = True
            self.phase.__exit__()
            self.phase = Progress("merges", total)
        self.phase.reach(done)


if __name__ == "__main__":
    commandline.run(main, config.TokTrain)
