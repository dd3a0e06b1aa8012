"""Our tokenizer against those it could be replaced by: training and encoding, on the same text and the same cores.

    python -m scripts.bench tokenizer --corpus=FOLDER --peer_python=ENVIRONMENT/bin/python

Of every four documents three train the vocabulary and warm the encoders; the fourth is what they encode, text that no
cache has seen. All encode with the vocabulary that ours learned. Each measurement is a process of its own
(tokenizer_job.py), rounds go through all tools in turn, and medians are shown.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nanochat_jax.config import UserError, setting
from scripts.bench import measuring

UNSEEN = 4  # one document of this many
UNSEEN_CHARS = 300_000  # at least, for the three sizes of single texts
JOB = Path(__file__).with_name("tokenizer_job.py")
PEERS = ("rustbpe", "tokenizers", "tiktoken")
JOBS = {
    "train": {"job": "train"},
    "flat": {"job": "encode", "way": "flat", "warm": True},
    "flat, fresh": {"job": "encode", "way": "flat", "warm": False},
    "lists": {"job": "encode", "way": "lists", "warm": True},
    "lists, fresh": {"job": "encode", "way": "lists", "warm": False},
    "single": {"job": "single"},
}


@dataclass(frozen=True)
class Settings:
    """Train and encode with our tokenizer and with others, side by side."""

    prog: ClassVar[str] = "python -m scripts.bench tokenizer"
    corpus: str = setting("", "file or folder of .txt, .jsonl, .jsonl.gz or .parquet files with text (required)")
    peer_python: str = setting("", "Python that has PyPI's rustbpe, tokenizers or tiktoken (default: this one)")
    vocab_size: int = setting(32768, "tokens, without special ones")
    rounds: int = setting(3, "measurements of each kind; their median counts")
    json: str = setting("", "file to add the line of JSON to")


def main(cfg: Settings) -> None:
    for name, least in (("vocab_size", 257), ("rounds", 1)):
        if getattr(cfg, name) < least:
            raise UserError(f"--{name}={getattr(cfg, name)}: must be at least {least}")
    measuring.check_json(cfg.json)
    trained_on, unseen = _split(cfg.corpus)
    pythons, versions = _tools(cfg.peer_python)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(cfg, Path(folder), pythons, trained_on, unseen)
        for i in range(cfg.rounds):
            for name, job in JOBS.items():
                for tool in pythons:
                    if tool != "tiktoken" or name != "train":
                        bench.measure(tool, name, job, f"round {i + 1} of {cfg.rounds}")
        rows = bench.rows()

    sizes = {"train_bytes": bench.bytes["train"], "unseen_bytes": bench.bytes["unseen"]}
    asked = {"corpus": Path(cfg.corpus).name, **sizes, "vocab_size": cfg.vocab_size, "rounds": cfg.rounds}
    about = measuring.about() | asked
    print(f"{about['cpu']}, {about['cores']} cores; Python {about['python']}; {about['code']}")
    print(f"medians of {cfg.rounds}; vocabulary {cfg.vocab_size:,}; trained on {sizes['train_bytes'] / 1e6:.1f} MB,")
    print(f"which also warm the encoders; encoded {sizes['unseen_bytes'] / 1e6:.1f} MB of other documents\n")
    print(_table(rows, versions))
    measuring.report({"bench": "tokenizer", **about, "versions": versions, "results": rows}, cfg.json)


def _split(corpus: str) -> tuple[list[str], list[str]]:
    """Documents to train on and documents to encode."""
    from nanochat_jax.data import text_files

    path = Path(corpus).expanduser()
    if not corpus:
        raise UserError("--corpus is missing: a file or folder of text, see --help")
    if not path.exists():
        raise UserError(f"--corpus={corpus}: no such file or folder")
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".") if path.is_dir() else [path]
    files = [p for p in files if p.name.endswith(text_files.SUFFIXES)]
    if not files:
        raise UserError(f"--corpus={corpus}: no files ending in {', '.join(text_files.SUFFIXES)}")
    documents = [text for file in files for text in text_files.documents(file)]
    unseen = documents[UNSEEN - 1 :: UNSEEN]
    if sum(map(len, unseen)) < UNSEEN_CHARS:
        chars, least = sum(map(len, documents)), UNSEEN_CHARS * UNSEEN
        raise UserError(f"--corpus={corpus}: {chars:,} characters of text are too few, give about {least:,} or more")
    return [text for i, text in enumerate(documents) if i % UNSEEN != UNSEEN - 1], unseen


# -----------------------------------------------------------------------------
# Measuring


def _tools(peer_python: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The Python of each tool, ours first, and their versions."""
    here = measuring.run(sys.executable, JOB, {"job": "probe"})
    if "ours" not in here["tools"]:
        raise UserError("this version's Rust tokenizer is not built: run pip install ./rustbpe in the repository")
    pythons, versions = {"ours": sys.executable}, {"ours": here["tools"]["ours"]}
    there = here
    if peer_python:
        there = measuring.probe(peer_python, JOB)
    for tool in PEERS:
        if tool in there["tools"]:
            pythons[tool], versions[tool] = peer_python or sys.executable, there["tools"][tool]
        else:
            print(f"{tool}: skipped, not in {peer_python or 'this environment; see --peer_python'}", file=sys.stderr)
    return pythons, versions


class Bench:
    """The measurements so far, and the files that the jobs share."""

    def __init__(self, cfg: Settings, folder: Path, pythons: dict[str, str], trained_on: list[str], unseen: list[str]):
        from nanochat_jax.tokenizer import SPLIT_PATTERN

        self.cfg, self.folder, self.pythons = cfg, folder, pythons
        self.bytes = {"train": _store(folder / "train", trained_on), "unseen": _store(folder / "unseen", unseen)}
        self.job = {
            "train": str(folder / "train"),
            "unseen": str(folder / "unseen"),
            "vocabulary": str(folder / "ours.json"),  # that of all encoders
            "pattern": SPLIT_PATTERN,
            "vocab_size": cfg.vocab_size,
            "threads": measuring.cores(),
        }
        self.found: dict[tuple[str, str], list[dict]] = {}
        self.failed = set()

    def measure(self, tool: str, name: str, job: dict, where: str) -> None:
        """One job of one tool; what fails once is not tried again, and must not be ours."""
        if (name, tool) in self.failed:
            return
        start = time.monotonic()
        try:
            job = self.job | job | {"tool": tool, "trained": str(self.folder / f"{tool}.json")}
            self.found.setdefault((name, tool), []).append(measuring.run(self.pythons[tool], JOB, job))
        except measuring.JobFailed as error:
            if tool == "ours":
                raise UserError(f"{name} failed: {error}") from error
            self.failed.add((name, tool))
            print(f"{tool}, {name}: left out, it failed ({error})", file=sys.stderr)
            return
        print(f"{where}: {name}, {tool}, {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        if (name, tool) == ("train", "ours"):
            learned = len(self._tokens("ours"))
            if learned < self.cfg.vocab_size:
                raise UserError(
                    f"--vocab_size={self.cfg.vocab_size}: the corpus runs out of pairs at {learned:,} tokens;"
                    " ask for fewer or give more text"
                )

    def rows(self) -> list[dict]:
        """What the table shows: a row for each kind of measurement and tool, ours first."""
        train, unseen = self.bytes["train"], self.bytes["unseen"]
        rows = []
        for name, found in self._by_name().items():
            if name == "train":
                rows += self._rows("train", found, lambda r: (train, r["seconds"], r["peak"]), self._merges)
            elif name == "single":
                for size in found["ours"][0]:
                    what = f"encode single texts of {size}"
                    rows += self._rows(what, found, lambda r, size=size: (r[size]["bytes"], r[size]["seconds"], None))
            else:
                way, _, state = name.partition(", ")
                what = f"encode into {'flat arrays' if way == 'flat' else 'lists'}, "
                state = f"{state} process" if state else "warmed on other text"
                rows += self._rows(what + state, found, lambda r: (unseen, r["seconds"], r["peak"]), self._ids)
                if state != "warmed on other text":
                    rows += self._rows(what + "the same text again", found, lambda r: (unseen, r["again"], None))
        return rows

    def _by_name(self) -> dict[str, dict[str, list[dict]]]:
        good = {key: found for key, found in self.found.items() if key not in self.failed}
        return {name: {tool: found for (n, tool), found in good.items() if n == name} for name in JOBS}

    def _rows(self, what: str, found: dict[str, list[dict]], figures, compare=lambda tool, runs, ours: ""):
        speed = {}
        for tool, runs in found.items():
            sizes, seconds, peaks = zip(*map(figures, runs), strict=True)
            speed[tool] = sizes[0] / statistics.median(seconds) / 1e6
            yield {
                "what": what,
                "tool": tool,
                "mb_per_s": round(speed[tool], 3),
                "seconds": [round(s, 6) for s in seconds],
                "peak_mb": None if peaks[0] is None else round(statistics.median(peaks) / 1e6, 1),
                "ours_is": round(speed["ours"] / speed[tool], 3),
                "same": compare(tool, runs, found["ours"]),
            }

    def _merges(self, tool: str, runs: list[dict], ours: list[dict]) -> str:
        """Whether the other learned our tokens in our order, or else how many of them."""
        found, expected = self._tokens(tool), self._tokens("ours")
        return "yes" if found == expected else f"{len({*found} & {*expected}) / len(expected):.2%} of tokens"

    @staticmethod
    def _ids(tool: str, runs: list[dict], ours: list[dict]) -> str:
        """Whether all runs gave our ids."""
        return "yes" if {run["ids"] for run in runs} == {run["ids"] for run in ours} else "NO"

    def _tokens(self, tool: str) -> list[str]:
        return json.loads((self.folder / f"{tool}.json").read_text(encoding="utf-8"))["tokens"]


def _store(path: Path, texts: list[str]) -> int:
    """Writes texts for the jobs, each after its length; their bytes."""
    total = 0
    with open(path, "wb") as file:
        for text in texts:
            data = text.encode("utf-8")  # text_files.documents leaves no lone surrogates
            file.write(len(data).to_bytes(8, "little") + data)
            total += len(data)
    return total


# -----------------------------------------------------------------------------
# Showing


def _table(rows: list[dict], versions: dict[str, str]) -> str:
    """Markdown that can be read as it is."""
    cells, last = [["", "", "MB/s", "peak MB", "ours is", "same result"]], ""
    for row in rows:
        what, last = row["what"] if row["what"] != last else "", row["what"]
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}"
        ratio, same = ("", "") if row["tool"] == "ours" else (f"{row['ours_is']:.2f}x", row["same"])
        cells.append([what, f"{row['tool']} {versions[row['tool']]}", f"{row['mb_per_s']:,.1f}", peak, ratio, same])
    return measuring.table(cells, (True, True, False, False, False, True))
