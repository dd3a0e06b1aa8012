"""Callers send a Request to the engine, and get back Events or complete Samples."""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_STOP_IDS = 8
# The maximum of `Request.top_logprobs`. For each new token, the device returns either this many alternatives or none.
# Any other number would need another compiled program.
TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """Asks the engine for `n` samples that continue `ids`."""

    ids: Sequence[int]
    max_tokens: int = 256  # maximum number of new tokens, including calculator results; 0 is allowed only with `score`
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 42
    stop_ids: Sequence[int] | None = None  # None: <|assistant_end|> and <|bos|>
    n: int = 1
    tools: bool = True  # whether the calculator answers the model's tool calls
    top_logprobs: int = 0  # how many of the most likely tokens to report at each position, at most TOP_LOGPROBS
    score: bool = False  # whether to report the log-probabilities of the prompt's tokens


TopLogprobs = list[tuple[int, float]]  # (token id, log-probability), the most likely token first


@dataclass(frozen=True)
class Scores:
    """The scores of a prompt. The entries for the first token are None."""

    logprobs: list[float | None]  # the log-probability of each token, given the tokens before it
    top: list[TopLogprobs | None]  # the most likely tokens at each position; `Request.top_logprobs` is their number


@dataclass(frozen=True)
class Event:
    """New tokens of one sample."""

    request: int  # the id that `Engine.add` returned
    sample: int
    ids: list[int]
    mask: list[int]  # 1: sampled by the model, 0: inserted by the engine
    logprobs: list[float]  # log-probabilities of all new tokens, before temperature, top-k and top-p are applied
    finish_reason: str | None  # "stop" or "length" in the sample's last event, None in all earlier events
    top: list[TopLogprobs] | None = None  # the most likely tokens at each position, if requested
    scores: Scores | None = None  # the prompt's scores, if requested; set only in a sample's first event
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
