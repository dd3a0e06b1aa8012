"""Callers give the engine Requests, and get back Events or complete Samples."""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_STOP_IDS = 8
TOP_LOGPROBS = 20  # per token, the device returns this many alternatives or none, so a program has only two variants


@dataclass(frozen=True)
class Request:
    """Asks the engine for `n` samples that continue `ids`."""

    ids: Sequence[int]
    max_tokens: int = 256  # the maximum number of new tokens, including forced tokens; 0 is allowed only with `score`
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 42
    stop_ids: Sequence[int] | None = None  # None: <|assistant_end|> and <|bos|>
    n: int = 1
    tools: bool = True  # whether the calculator runs the python blocks that the model writes
    top_logprobs: int = 0  # the number of most likely tokens to report at each position; at most TOP_LOGPROBS
    score: bool = False  # whether to report the log-probabilities of the prompt's tokens


TopLogprobs = list[tuple[int, float]]  # (token id, log-probability), the most likely token first


@dataclass(frozen=True)
class Scores:
    """The log-probability of each token of a prompt, given the tokens before it. The entry for the first token is
    None."""

    logprobs: list[float | None]
    top: list[TopLogprobs | None]  # the `Request.top_logprobs` most likely tokens at each position


@dataclass(frozen=True)
class Event:
    """New tokens of one sample. `finish_reason` is "stop" or "length" in the sample's last event, and None before."""

    request: int  # the id that `Engine.add` returned
    sample: int
    ids: list[int]
    mask: list[int]  # 1: sampled, 0: forced
    logprobs: list[float]  # of sampled and of forced tokens, under the full softmax at temperature 1
    finish_reason: str | None
    top: list[TopLogprobs] | None = None  # the most likely tokens at each position; None without `Request.top_logprobs`
    scores: Scores | None = None  # the prompt's scores, in a sample's first event; None without `Request.score`
    cached_tokens: int = 0  # the number of prompt tokens found in the cache; set only in the first event of sample 0


@dataclass(frozen=True)
class Sample:
    """All generated tokens of one sample. If finish_reason is "stop", the last token is the stop token."""

    ids: list[int]
    mask: list[int]
    logprobs: list[float]
    finish_reason: str

    @property
    def content(self) -> list[int]:
        """The ids without the stop token."""
        return self.ids[:-1] if self.finish_reason == "stop" else self.ids
