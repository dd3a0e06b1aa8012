"""What callers of the engine give it and get from it."""

from collections.abc import Sequence
from dataclasses import dataclass

TOP_LOGPROBS = 20  # the device names as many alternatives as this, or none: two programs, not twenty


@dataclass(frozen=True)
class Request:
    """What to generate: `n` samples that continue `ids`."""

    ids: Sequence[int]
    max_tokens: int = 256  # generated tokens at most, forced ones included; 0 only with `score`
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 42
    stop_ids: Sequence[int] | None = None  # default: <|assistant_end|> and <|bos|>
    n: int = 1
    tools: bool = True  # whether python blocks are answered by the calculator
    top_logprobs: int = 0  # how many of the likeliest tokens to name beside each token, at most TOP_LOGPROBS
    score: bool = False  # whether the prompt's tokens get log-probabilities too


TopLogprobs = list[tuple[int, float]]  # tokens and their log-probabilities, the likeliest first


@dataclass(frozen=True)
class Scores:
    """How likely each token of a prompt was after those before it; of the first nothing is known."""

    logprobs: list[float | None]
    top: list[TopLogprobs | None]  # as many as `top_logprobs` asked for


@dataclass(frozen=True)
class Event:
    """New tokens of one sample. `finish_reason` is None but for the last event of a sample: "stop" or "length"."""

    request: int  # the id that `Engine.add` gave
    sample: int
    ids: list[int]
    mask: list[int]  # 1: sampled, 0: forced
    logprobs: list[float]  # under the full softmax at temperature 1; of forced tokens too
    finish_reason: str | None
    top: list[TopLogprobs] | None = None  # beside each token, if `top_logprobs` asked for it
    scores: Scores | None = None  # with the first event of a sample, if `score` asked for it
    cached_tokens: int = 0  # tokens of the prompt that were computed before, with the first event of the first sample


@dataclass(frozen=True)
class Sample:
    """All generated tokens of one sample; with finish_reason "stop" the last one is the stop token."""

    ids: list[int]
    mask: list[int]
    logprobs: list[float]
    finish_reason: str

    @property
    def content(self) -> list[int]:
        """The ids without the token that ended them."""
        return self.ids[:-1] if self.finish_reason == "stop" else self.ids
