"""Runs one measurement of one tokenizer for `python -m scripts.bench tokenizer`.

The benchmark pipes this file into its own Python or into the peers' Python, which has the other tokenizers. The only
argument is the job as JSON. The output is one line of JSON. This file imports nothing from this project, because the
peers' Python may lack it.
"""

from __future__ import annotations  # the peers' Python may be an older version

import ctypes
import gc
import hashlib
import importlib
import itertools
import json
import sys
import time
from array import array
from collections.abc import Callable
from importlib import metadata
from typing import Any

Job = dict[str, Any]
Ids = list[int]
# The job "single" encodes texts of these lengths, in characters.
SIZES = {
    "100 B": 100,
    "1 KB": 1000,
    "100 KB": 100_000,
}
SINGLE_CHARS = 2_000_000  # at most this many characters are encoded for each size
PACKAGES = ("rustbpe", "tokenizers", "tiktoken")


def read(path: str) -> list[str]:
    """Reads texts from a file. An 8-byte integer before each text gives the text's length in bytes.

    Reading the file text by text takes less memory than reading it whole.
    """
    texts = []
    with open(path, "rb") as file:
        while head := file.read(8):
            texts.append(file.read(int.from_bytes(head, "little")).decode("utf-8"))
    return texts


class Memory:
    """Measures the peak memory in bytes, minus the memory in use when this object was made.

    The system's peak also includes the memory that reading the texts took, and the parent process's memory at the fork.
    `reset` clears this peak where Linux allows it.
    """

    def __init__(self) -> None:
        gc.collect()
        try:
            self.before = self._status("VmRSS")
        except OSError:
            self.before = self._rusage()

    def reset(self) -> None:
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except (OSError, AttributeError):
            pass

    def peak(self) -> int:
        try:
            return self._status("VmHWM") - self.before
        except OSError:
            return self._rusage() - self.before

    def _status(self, name: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

    def _rusage(self) -> int:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -----------------------------------------------------------------------------
# The tokenizers. All of them except tiktoken can train. `one` encodes a single text. `lists` encodes many texts, and
# returns one list of ids per text. `flat` encodes many texts, and returns one array of ids.


class Ours:
    """This project's tokenizer, built from the crate in the folder rustbpe/."""

    def __init__(self, job: Job) -> None:
        import rustbpe

        self.job = job
        self.tokenizer = rustbpe.Tokenizer()  # ty: ignore[missing-attribute]  # ty finds the folder, not the package

    def train(self, texts: list[str]) -> None:
        self.tokenizer.train_from_iterator(iter(texts), self.job["vocab_size"], pattern=self.job["pattern"])

    def merges(self) -> list[tuple[int, int]] | None:
        """Returns the merges as pairs of ids, in the order in which they were learned.

        `Tokenizers.load` needs the merges of our tokenizer. In the other classes, `merges` returns None.
        """
        return self.tokenizer.get_merges()

    def tokens(self) -> list[bytes]:
        """Returns the tokens in the order of their ids."""
        return [token for token, _ in sorted(self.tokenizer.get_mergeable_ranks(), key=lambda pair: pair[1])]

    def load(self, tokens: list[bytes], merges: list[tuple[int, int]]) -> None:
        ranks = [(token, rank) for rank, token in enumerate(tokens)]
        self.tokenizer = type(self.tokenizer).from_mergeable_ranks(self.job["pattern"], ranks)

    def one(self, text: str) -> Ids:
        return self.tokenizer.encode(text)

    def lists(self, texts: list[str]) -> list[Ids]:
        return self.tokenizer.batch_encode(texts)

    def flat(self, texts: list[str]) -> tuple[Any, Any]:
        return self.tokenizer.encode_batch(texts)


class Rustbpe(Ours):
    """PyPI's package rustbpe. It cannot load a vocabulary, so `load` learns the vocabulary again from the same
    texts."""

    def merges(self) -> list[tuple[int, int]] | None:
        return None

    def load(self, tokens: list[bytes], merges: list[tuple[int, int]]) -> None:
        self.train(read(self.job["train"]))

    def flat(self, texts: list[str]) -> tuple[Any, Any]:
        return flattened(self.lists(texts))


class Tokenizers:
    """Hugging Face's package tokenizers."""

    def __init__(self, job: Job) -> None:
        import tokenizers  # ty: ignore[import-not-found]  # installed only for the peers

        self.job, self.lib = job, tokenizers
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = (b for b in range(256) if b not in visible)
        self.letters = {**{b: chr(b) for b in visible}, **{b: chr(0x100 + i) for i, b in enumerate(others)}}
        self.tokenizer = self._around(tokenizers.models.BPE())

    def _around(self, model: Any) -> Any:
        """Returns a byte-level tokenizer that splits text by our pattern and then applies `model`."""
        pre = self.lib.pre_tokenizers
        tokenizer = self.lib.Tokenizer(model)
        split = pre.Split(self.lib.Regex(self.job["pattern"]), behavior="isolated")
        tokenizer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        return tokenizer

    def train(self, texts: list[str]) -> None:
        alphabet = self.lib.pre_tokenizers.ByteLevel.alphabet()
        trainer = self.lib.trainers.BpeTrainer(
            vocab_size=self.job["vocab_size"], show_progress=False, initial_alphabet=alphabet
        )
        self.tokenizer.train_from_iterator(iter(texts), trainer, length=len(texts))

    def merges(self) -> list[tuple[int, int]] | None:
        return None

    def tokens(self) -> list[bytes]:
        byte_of = {letter: b for b, letter in self.letters.items()}
        vocab = sorted(self.tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        return [bytes(byte_of[letter] for letter in name) for name, _ in vocab]

    def load(self, tokens: list[bytes], merges: list[tuple[int, int]]) -> None:
        names = ["".join(self.letters[b] for b in token) for token in tokens]
        vocab = {name: i for i, name in enumerate(names)}
        self.tokenizer = self._around(self.lib.models.BPE(vocab, [(names[a], names[b]) for a, b in merges]))

    def one(self, text: str) -> Ids:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def lists(self, texts: list[str]) -> list[Ids]:
        fast = getattr(self.tokenizer, "encode_batch_fast", self.tokenizer.encode_batch)  # faster: computes no offsets
        return [encoding.ids for encoding in fast(texts, add_special_tokens=False)]

    def flat(self, texts: list[str]) -> tuple[Any, Any]:
        return flattened(self.lists(texts))


class Tiktoken:
    """OpenAI's package tiktoken. It cannot train."""

    def __init__(self, job: Job) -> None:
        import tiktoken

        self.job, self.lib = job, tiktoken

    def load(self, tokens: list[bytes], merges: list[tuple[int, int]]) -> None:
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self.encoding = self.lib.Encoding(
            "bench", pat_str=self.job["pattern"], mergeable_ranks=ranks, special_tokens={}
        )

    def one(self, text: str) -> Ids:
        return self.encoding.encode_ordinary(text)

    def lists(self, texts: list[str]) -> list[Ids]:
        return self.encoding.encode_ordinary_batch(texts, num_threads=self.job["threads"])

    def flat(self, texts: list[str]) -> tuple[Any, Any]:  # calling encode_to_numpy in threads was no faster
        return flattened(self.lists(texts))


TRAINERS = {"ours": Ours, "rustbpe": Rustbpe, "tokenizers": Tokenizers}
TOOLS = {**TRAINERS, "tiktoken": Tiktoken}


def flattened(lists: list[Ids]) -> tuple[Any, Any]:
    """Joins lists of ids into one array. Returns the array, and the offsets at which the lists begin.

    This was the fastest of several methods.
    """
    import numpy as np

    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])]).astype(np.int64)
    return np.frombuffer(b"".join([array("I", ids) for ids in lists]), np.uint32), offsets


# -----------------------------------------------------------------------------
# The jobs


def probe(job: Job) -> dict:
    """Returns the versions of Python and of the packages that can be imported.

    The module rustbpe is either this project's crate or PyPI's package. The result calls the crate "ours".
    """
    tools = {}
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
            version = metadata.version(name)
        except Exception:  # importing a broken package may raise any exception
            continue
        own = name == "rustbpe" and hasattr(getattr(module, "Tokenizer", None), "encode_batch")
        tools["ours" if own else name] = version
    return {"python": sys.version.split()[0], "tools": tools}


def train(job: Job) -> dict:
    """Trains once, and writes the learned tokens and merges to a file.

    The benchmark compares the tokens of all tokenizers. The jobs "encode" and "single" load the tokens and merges of
    our tokenizer.
    """
    tool, texts = TRAINERS[job["tool"]](job), read(job["train"])
    memory = Memory()
    memory.reset()
    seconds, _ = timed(lambda: tool.train(texts))
    peak = memory.peak()
    with open(job["trained"], "w") as file:
        json.dump({"tokens": [token.hex() for token in tool.tokens()], "merges": tool.merges()}, file)
    return {"seconds": seconds, "peak": peak}


def encode(job: Job) -> dict:
    """Encodes the unseen texts into lists or into a flat array.

    With a warm-up, the training texts are encoded first. Without a warm-up, the unseen texts are encoded twice, and
    both times are measured. The peak memory includes the vocabulary, the tokenizer's cache and the result.
    """
    if job["way"] == "flat":
        import numpy  # noqa: F401, imported here so that no tool's time includes it
    tool, texts, other = TOOLS[job["tool"]](job), read(job["unseen"]), read(job["train"]) if job["warm"] else []
    way, memory = getattr(tool, job["way"]), Memory()
    load(tool, job)
    if job["warm"]:
        way(other)
    memory.reset()
    seconds, result = timed(lambda: way(texts))
    figures = {"seconds": seconds, "peak": memory.peak(), "ids": digest(result)}
    if not job["warm"]:
        del result
        figures["again"], _ = timed(lambda: way(texts))
    return figures


def single(job: Job) -> dict:
    """Encodes unseen texts of each size, one text per call. Before that, encodes the training texts as a warm-up."""
    tool = TOOLS[job["tool"]](job)
    load(tool, job)
    for text in read(job["train"]):
        tool.one(text)
    texts, figures = "".join(read(job["unseen"])), {}
    share = min(SINGLE_CHARS, len(texts) // len(SIZES))
    for i, (name, size) in enumerate(SIZES.items()):
        part = texts[i * share : (i + 1) * share]
        pieces = [part[start : start + size] for start in range(0, len(part) - size + 1, size)]
        seconds, _ = timed(lambda pieces=pieces: [tool.one(piece) for piece in pieces])
        figures[name] = {"seconds": seconds, "texts": len(pieces), "bytes": sum(len(p.encode("utf-8")) for p in pieces)}
    return figures


def load(tool: Ours | Tokenizers | Tiktoken, job: Job) -> None:
    """Makes a tool use the vocabulary that our tokenizer learned."""
    with open(job["vocabulary"]) as file:
        vocabulary = json.load(file)
    tool.load([bytes.fromhex(token) for token in vocabulary["tokens"]], vocabulary["merges"])


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the duration of `call` in seconds, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def digest(result: Any) -> str:
    """Returns a hash of the ids and of the offsets at which the texts begin. Lists and a flat array with the same ids
    have the same hash."""
    if isinstance(result, tuple):
        tokens, offsets = array("I", result[0].astype("uint32").tobytes()), array("q", result[1].tobytes())
    else:
        tokens = array("I", itertools.chain.from_iterable(result))
        offsets = array("q", itertools.accumulate(map(len, result), initial=0))
    return hashlib.sha256(tokens.tobytes() + offsets.tobytes()).hexdigest()


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps({"probe": probe, "train": train, "encode": encode, "single": single}[job["job"]](job)))
