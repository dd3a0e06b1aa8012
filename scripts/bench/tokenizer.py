"""Measures how fast our tokenizer and others train and encode, on the same text and the same cores.

    python -m scripts.bench tokenizer --corpus=FOLDER --peer_python=ENVIRONMENT/bin/python

Of every four documents, three are used to train the vocabulary and warm up the encoders, and the fourth is used to time
the encoders. All tokenizers encode with the vocabulary that our tokenizer learned. Each measurement runs in its own
process (tokenizer_job.py). A round runs every measurement once for every tokenizer. The table shows the medians over
all rounds.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nanochat_jax import config
from nanochat_jax.config import UserError, setting
from scripts.bench import measuring

UNSEEN = 4  # one in this many documents is kept for timing the encoders
UNSEEN_CHARS = 300_000  # the documents for timing must have at least this many characters in total
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
class Settings(config.Settings):
    """Compare our tokenizer with others in training and encoding."""

    prog: ClassVar[str] = "python -m scripts.bench tokenizer"
    corpus: str = setting("", "text (required): a .txt, .json, .jsonl or .parquet file, or a folder of these files")
    peer_python: str = setting("", "path of a Python with PyPI's rustbpe, tokenizers or tiktoken (default: this one)")
    vocab_size: int = setting(32768, "number of tokens in the vocabulary, not counting special tokens", low=257)
    rounds: int = setting(3, "number of times that each measurement runs; the median is reported", low=1)
    json: str = setting("", "file to append the results to, as one line of JSON")


def main(cfg: Settings) -> None:
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
    settings = {"corpus": Path(cfg.corpus).name, **sizes, "vocab_size": cfg.vocab_size, "rounds": cfg.rounds}
    about = measuring.about() | settings
    print(f"{about['cpu']}, {about['cores']} cores; Python {about['python']}; {about['code']}")
    print(f"medians of {cfg.rounds}; vocabulary {cfg.vocab_size:,}; trained on {sizes['train_bytes'] / 1e6:.1f} MB,")
    print(f"which also warm up the encoders; encoded {sizes['unseen_bytes'] / 1e6:.1f} MB of other documents\n")
    print(_table(rows, versions))
    measuring.report({"bench": "tokenizer", **about, "versions": versions, "results": rows}, cfg.json)


def _split(corpus: str) -> tuple[list[str], list[str]]:
    """Returns (documents to train on, documents to encode). Raises UserError if there is too little text."""
    from nanochat_jax.data import parquet, text_files

    path = config.user_path(corpus)
    if not corpus:
        raise UserError("--corpus is missing: a file or folder of text, see --help")
    if not path.exists():
        raise UserError(f"--corpus={corpus}: no such file or folder")
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".") if path.is_dir() else [path]
    files = [p for p in files if text_files.form(p)]
    if not files:
        raise UserError(f"--corpus={corpus}: no files ending in {text_files.READABLE}")
    documents = [text for file in files for whole in text_files.documents(file) for text in parquet.split_long(whole)]
    unseen = documents[UNSEEN - 1 :: UNSEEN]
    if sum(map(len, unseen)) < UNSEEN_CHARS:
        chars, least = sum(map(len, documents)), UNSEEN_CHARS * UNSEEN
        raise UserError(f"--corpus={corpus}: {chars:,} characters of text are too few, use about {least:,} or more")
    return [text for i, text in enumerate(documents) if i % UNSEEN != UNSEEN - 1], unseen


# -----------------------------------------------------------------------------
# Measuring


def _tools(peer_python: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns ({tool: path of its Python}, {tool: version}). Our tokenizer comes first."""
    own = measuring.run(sys.executable, JOB, {"job": "probe"})["tools"]
    if "ours" not in own:
        raise UserError("this version's Rust tokenizer is not built: run pip install ./rustbpe in the repository")
    pythons, versions = {"ours": sys.executable}, {"ours": own["ours"]}
    peers = measuring.probe(peer_python, JOB)["tools"] if peer_python else own
    for tool in PEERS:
        if tool in peers:
            pythons[tool], versions[tool] = peer_python or sys.executable, peers[tool]
        else:
            print(f"{tool}: skipped, not in {peer_python or 'this environment; see --peer_python'}", file=sys.stderr)
    return pythons, versions


class Bench:
    """Runs the jobs, writes the files that all jobs share, and holds the results so far."""

    def __init__(
        self, cfg: Settings, folder: Path, pythons: dict[str, str], trained_on: list[str], unseen: list[str]
    ) -> None:
        from nanochat_jax.tokenizer import SPLIT_PATTERN

        self.cfg, self.folder, self.pythons = cfg, folder, pythons
        self.bytes = {"train": _store(folder / "train", trained_on), "unseen": _store(folder / "unseen", unseen)}
        self.job = {
            "train": str(folder / "train"),
            "unseen": str(folder / "unseen"),
            "vocabulary": str(folder / "ours.json"),  # the vocabulary that our tokenizer learned
            "pattern": SPLIT_PATTERN,
            "vocab_size": cfg.vocab_size,
            "threads": measuring.cores(),
        }
        self.results: dict[tuple[str, str], list[dict]] = {}
        self.failed: set[tuple[str, str]] = set()

    def measure(self, tool: str, name: str, job: dict, where: str) -> None:
        """Runs a job with a tool. Does nothing if this job has failed with this tool before.

        Raises UserError if the job fails with our tokenizer.
        """
        if (name, tool) in self.failed:
            return
        start = time.monotonic()
        try:
            job = self.job | job | {"tool": tool, "trained": str(self.folder / f"{tool}.json")}
            self.results.setdefault((name, tool), []).append(measuring.run(self.pythons[tool], JOB, job))
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
                problem = f"the corpus runs out of pairs at {learned:,} tokens"
                raise UserError(f"--vocab_size={self.cfg.vocab_size}: {problem}; lower it or use more text")

    def rows(self) -> list[dict]:
        """Returns the rows of the table, one per measurement and tool. Our tokenizer comes first."""
        train, unseen = self.bytes["train"], self.bytes["unseen"]
        rows = []
        for name, runs in self._by_name().items():
            if name == "train":
                rows += self._rows("train", runs, lambda r: (train, r["seconds"], r["peak"]), self._merges)
            elif name == "single":
                for size in runs["ours"][0]:
                    what = f"encode single texts of {size}"
                    rows += self._rows(what, runs, lambda r, size=size: (r[size]["bytes"], r[size]["seconds"], None))
            else:
                way, _, state = name.partition(", ")
                what = f"encode into {'flat arrays' if way == 'flat' else 'lists'}, "
                state = f"{state} process" if state else "after warm-up"
                rows += self._rows(what + state, runs, lambda r: (unseen, r["seconds"], r["peak"]), self._ids)
                if state != "after warm-up":
                    rows += self._rows(what + "the same text again", runs, lambda r: (unseen, r["again"], None))
        return rows

    def _by_name(self) -> dict[str, dict[str, list[dict]]]:
        """Returns {job: {tool: results}}, without failed jobs."""
        good = {key: runs for key, runs in self.results.items() if key not in self.failed}
        return {name: {tool: runs for (n, tool), runs in good.items() if n == name} for name in JOBS}

    def _rows(
        self,
        what: str,
        results: dict[str, list[dict]],
        figures: Callable[[dict], tuple[int, float, int | None]],
        compare: Callable[[str, list[dict], list[dict]], str] = lambda tool, runs, ours: "",
    ) -> Iterator[dict]:
        """Yields one row per tool.

        `figures` returns (bytes, seconds, peak memory in bytes) for one run. `compare` returns a text that says whether
        a tool and our tokenizer have the same results.
        """
        speed = {}
        for tool, runs in results.items():
            sizes, seconds, peaks = zip(*map(figures, runs), strict=True)
            speed[tool] = sizes[0] / statistics.median(seconds) / 1e6
            yield {
                "what": what,
                "tool": tool,
                "mb_per_s": round(speed[tool], 3),
                "seconds": [round(s, 6) for s in seconds],
                "peak_mb": None if peaks[0] is None else round(statistics.median(peaks) / 1e6, 1),
                "ours_is": round(speed["ours"] / speed[tool], 3),
                "same": compare(tool, runs, results["ours"]),
            }

    def _merges(self, tool: str, runs: list[dict], ours: list[dict]) -> str:
        """Compares the tokens that `tool` learned with the tokens that our tokenizer learned.

        Returns "yes" if they are the same in the same order. Otherwise, returns the share of our tokens that `tool`
        learned.
        """
        theirs, ours_learned = self._tokens(tool), self._tokens("ours")
        shared = len({*theirs} & {*ours_learned}) / len(ours_learned)
        return "yes" if theirs == ours_learned else f"{shared:.2%} of tokens"

    @staticmethod
    def _ids(tool: str, runs: list[dict], ours: list[dict]) -> str:
        """Returns "yes" if all runs of a tool produced the same ids as our tokenizer, else "NO"."""
        return "yes" if {run["ids"] for run in runs} == {run["ids"] for run in ours} else "NO"

    def _tokens(self, tool: str) -> list[str]:
        return json.loads((self.folder / f"{tool}.json").read_text(encoding="utf-8"))["tokens"]


def _store(path: Path, texts: list[str]) -> int:
    """Writes each text to a file as its length in bytes, followed by its UTF-8 bytes. Returns the total length."""
    total = 0
    with open(path, "wb") as file:
        for text in texts:
            data = text.encode("utf-8")  # cannot fail, because text_files.documents removes lone surrogates
            file.write(len(data).to_bytes(8, "little") + data)
            total += len(data)
    return total


# -----------------------------------------------------------------------------
# Showing


def _table(rows: list[dict], versions: dict[str, str]) -> str:
    cells, last = [["", "", "MB/s", "peak MB", "ours vs. peer", "same result"]], ""
    for row in rows:
        what, last = row["what"] if row["what"] != last else "", row["what"]
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}"
        ratio, same = ("", "") if row["tool"] == "ours" else (f"{row['ours_is']:.2f}x", row["same"])
        cells.append([what, f"{row['tool']} {versions[row['tool']]}", f"{row['mb_per_s']:,.1f}", peak, ratio, same])
    return measuring.table(cells, (True, True, False, False, False, True))
