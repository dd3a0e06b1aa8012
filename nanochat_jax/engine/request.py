"""What callers give the engine and what they get back: Requests, and Events or complete Samples."""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_STOP_IDS = 8
TOP_LOGPROBS = 20  # the device returns this many alternatives or none, so that each program has only two variants


@dataclass(frozen=True)
class Request:
    """What to generate: `n` samples that continue `ids`."""

    ids: Sequence[int]
    max_tokens: int = 256  # the most tokens to generate, forced ones included; 0 is allowed only with `score`
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 42
    stop_ids: Sequence[int] | None = None  # None: <|assistant_end|> and <|bos|>
    n: int = 1
    tools: bool = True  # whether the calculator answers python blocks
    top_logprobs: int = 0  # how many of the most likely tokens to report at each position, at most TOP_LOGPROBS
    score: bool = False  # whether the prompt's tokens get log-probabilities too


TopLogprobs = list[tuple[int, float]]  # token ids and their log-probabilities, the most likely token first


@dataclass(frozen=True)
class Scores:
    """How likely each token of a prompt was, given the tokens before it; None for the first token."""

    logprobs: list[float | None]
    top: list[TopLogprobs | None]  # the most likely tokens at each position, as many as `Request.top_logprobs`


@dataclass(frozen=True)
class Event:
    """New tokens of one sample. `finish_reason` is None until a sample's last event, where it is "stop" or "length"."""

    request: int  # the id that `Engine.add` returned
    sample: int
    ids: list[int]
    mask: list[int]  # 1: sampled, 0: forced
    logprobs: list[float]  # under the full softmax at temperature 1, for forced tokens too
    finish_reason: str | None
    top: list[TopLogprobs] | None = None  # the most likely tokens at each position, if the request has `top_logprobs`
    scores: Scores | None = None  # the prompt's scores, in a sample's first event, if the request has `score`
    cached_tokens: int = 0  # prompt tokens that came from the cache; 0 except in the first sample's first event


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
