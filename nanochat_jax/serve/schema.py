"""Defines the request bodies of the page's endpoint and of OpenAI's API, and converts them to engine requests.

If a field is omitted or null, the server's default applies. Unknown fields are ignored, as OpenAI's clients expect. But
a request to the OpenAI-compatible endpoints is refused if it has an unsupported field that would change the answer. If
the last message of a conversation has the role "assistant", the answer continues that message.
"""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from nanochat_jax.config import ChatWeb, UserError
from nanochat_jax.conversation import prompt, render
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import TOP_LOGPROBS, Request
from nanochat_jax.serve import errors
from nanochat_jax.serve.errors import ApiError
from nanochat_jax.serve.messages import OpenAIMessage, as_turns
from nanochat_jax.serve.pool import Pool
from nanochat_jax.serve.worker import Answer, Busy, EngineFailure, TooMany
from nanochat_jax.tokenizer import Tokenizer

# For the page's endpoint.
ROLES = ("user", "assistant", "system")
MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_CHARS = 32_000

# For OpenAI's API.
MAX_CHOICES = 128  # the maximum number of samples in one request, for all its prompts together
COMPLETION_TOKENS = 16  # OpenAI's default for max_tokens

# Unsupported fields. A request may set them only to null or to the values here, which do not change the answer.
NEUTRAL = {
    "audio": [],
    "best_of": [1],
    "frequency_penalty": [0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
}

RETRY_AFTER = {"Retry-After": "2"}  # seconds


class ContentPart(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: str


class Message(BaseModel):
    role: str
    content: str | list[ContentPart]

    @property
    def chars(self) -> int:
        return len(self.content) if isinstance(self.content, str) else sum(len(part.text) for part in self.content)


class ChatBody(BaseModel):
    """The body of POST /chat/completions. Omitted fields get the server's defaults. Unknown fields are ignored."""

    messages: list[Message]
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=200, description="0: no limit")
    max_tokens: int | None = Field(None, ge=1, le=4096)
    seed: int | None = Field(None, ge=0, lt=2**31)


class StreamOptions(BaseModel):
    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class GenerationBody(BaseModel):
    """The fields that chat completions and completions have in common."""

    model_config = ConfigDict(extra="allow")  # keeps unknown fields, for `check_unsupported`

    model: str | None = Field(None, description="the model id that /v1/models returns")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0: greedy")
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="0: no limit")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionBody(GenerationBody):
    """The body of POST /v1/chat/completions."""

    messages: list[OpenAIMessage] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)


TokenIds = Annotated[list[StrictInt], Field(min_length=1)]


class CompletionBody(GenerationBody):
    """The body of POST /v1/completions. The server puts <|bos|> before a text prompt, but not before token ids."""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1, max_length=MAX_CHOICES)] = ""
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Returns `prompt` as a list: "a" -> ["a"], [1, 2] -> [[1, 2]], ["a", [1, 2]] -> ["a", [1, 2]]."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


# -----------------------------------------------------------------------------
# Conversion of request bodies to engine requests. Functions that tokenize would block the event loop, so call
# them in another thread.


def chat_request(body: ChatBody, engine: Engine, cfg: ChatWeb) -> tuple[Request, int]:
    """Returns the engine request and the number of messages that were dropped. The oldest messages are dropped if the
    conversation does not fit into the context.

    Raises ApiError 400 if the conversation is invalid or its last turn is too long for the context.
    """
    check_messages(body.messages)
    max_tokens = body.max_tokens or cfg.max_new_tokens
    messages = [message.model_dump() for message in body.messages]
    try:
        ids, dropped = prompt(engine.tokenizer, messages, engine.model_cfg.sequence_len, max_tokens)
    except UserError as error:
        raise ApiError(400, str(error)) from None
    return engine_request(body, ids, max_tokens, engine, cfg), dropped


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ApiError 400 if the page's endpoint does not accept the messages."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise ApiError(400, f"messages: got {len(messages)}, expected 1 to {MAX_MESSAGES}")
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise ApiError(400, f"messages[{i}].role: got {message.role[:40]!r}, expected one of {', '.join(ROLES)}")
        # The client sends the model's earlier answers back. An answer may be longer than MAX_MESSAGE_CHARS.
        longest = MAX_CHARS if message.role == "assistant" else MAX_MESSAGE_CHARS
        if not 1 <= message.chars <= longest:
            raise ApiError(400, f"messages[{i}].content: has {message.chars} characters, expected 1 to {longest}")
        if not isinstance(message.content, str) and message.role != "assistant":
            raise ApiError(400, f"messages[{i}].content: only the assistant's content may be a list of parts")
    if (total := sum(message.chars for message in messages)) > MAX_CHARS:
        raise ApiError(400, f"messages: {total} characters in total, expected at most {MAX_CHARS}")
    if messages[-1].role == "system":
        raise ApiError(400, f"messages[{len(messages) - 1}].role: got system, but the last must be user or assistant")


def check_unsupported(body: GenerationBody) -> None:
    """Raises ApiError 400 if the body has an unsupported field whose value would change the answer."""
    for field, neutral in NEUTRAL.items():
        value = (body.model_extra or {}).get(field)
        if value is not None and value not in neutral and (field, value) != ("best_of", body.n):
            raise ApiError(400, f"{field}: not supported by this server", field, "unsupported_parameter")


def chat_completion_request(body: ChatCompletionBody, engine: Engine, cfg: ChatWeb) -> Request:
    """Returns the engine request for a chat completion.

    Raises ApiError 400 if the request is invalid or its prompt is too long.
    """
    ids = chat_prompt(engine.tokenizer, body.messages)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs: requires logprobs to be true", "top_logprobs")
    max_tokens = body.max_completion_tokens or body.max_tokens or cfg.max_new_tokens
    return openai_request(body, ids, max_tokens, "messages", engine, cfg, top_logprobs=body.top_logprobs or 0)


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[OpenAIMessage]) -> list[int]:
    """Returns the conversation as the token ids of a prompt. Raises ApiError 400 if a message is malformed."""
    turns = as_turns(messages)
    try:
        return render(tokenizer, turns)
    except UserError as error:
        raise ApiError(400, f"messages: {error}", "messages") from None


def completion_requests(body: CompletionBody, engine: Engine, cfg: ChatWeb) -> list[Request]:
    """Returns one engine request per prompt. Raises ApiError 400 if the request is invalid or a prompt is too long."""
    prompts = body.prompts
    if len(prompts) * (body.n or 1) > MAX_CHOICES:
        raise ApiError(400, f"n: {len(prompts)} prompts x {body.n} choices, expected at most {MAX_CHOICES} in all", "n")
    max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    top_logprobs = body.logprobs or 0
    score = max_tokens == 0 or bool(body.echo and body.logprobs is not None)
    requests = []
    for item in prompts:
        ids = engine.tokenizer.encode(item, "<|bos|>") if isinstance(item, str) else item
        requests.append(openai_request(body, ids, max_tokens, "prompt", engine, cfg, top_logprobs, score))
    return requests


def openai_request(
    body: GenerationBody,
    ids: Sequence[int],
    max_tokens: int,
    param: str,
    engine: Engine,
    cfg: ChatWeb,
    top_logprobs: int = 0,
    score: bool = False,
) -> Request:
    """Returns the engine request that continues `ids` by at most `max_tokens` tokens.

    Raises ApiError 400 if the prompt leaves no room for an answer, or if the engine refuses the request. `param` is the
    field that the error names.
    """
    context = engine.model_cfg.sequence_len
    if len(ids) + min(max_tokens, 1) > context:
        reason = f"{param}: {len(ids)} tokens, but the model's context holds {context}, including the answer"
        raise ApiError(400, reason, param, "context_length_exceeded")
    request = dataclasses.replace(
        engine_request(body, ids, max_tokens, engine, cfg),
        top_p=1.0 if body.top_p is None else max(body.top_p, 1e-6),  # the engine refuses 0; 1e-6 also keeps one token
        n=body.n or 1,
        top_logprobs=top_logprobs,
        score=score,
    )
    try:
        engine.check(request)
    except UserError as error:
        raise ApiError(400, f"{param}: {error}", param) from None
    return request


def engine_request(
    body: ChatBody | GenerationBody, ids: Sequence[int], max_tokens: int, engine: Engine, cfg: ChatWeb
) -> Request:
    """Returns the engine request that continues `ids` by at most `max_tokens` tokens. The limit is lower if the context
    has less room. Settings that the body omits get the server's defaults."""
    return Request(
        ids=ids,
        max_tokens=min(max_tokens, engine.model_cfg.sequence_len - len(ids)),
        temperature=cfg.temperature if body.temperature is None else body.temperature,
        top_k=cfg.top_k if body.top_k is None else body.top_k,
        seed=secrets.randbits(31) if body.seed is None else body.seed,
    )


def submit(pool: Pool, *requests: Request) -> Answer:
    """Queues `requests` and returns one Answer for all of them.

    Raises ApiError 400 if the engine refuses a request or the server could never take all samples at once, 429 if the
    server is busy, and 503 if the engine has failed or is shutting down.
    """
    try:
        return pool.submit(*requests)
    except TooMany as error:
        raise ApiError(400, f"n: {error}", "n") from None
    except UserError as error:
        raise ApiError(400, str(error)) from None
    except Busy:
        reason = "the server is busy; try again in a moment"
        raise ApiError(429, reason, code="server_busy", headers=RETRY_AFTER) from None
    except EngineFailure as error:
        raise errors.from_engine_failure(error) from None
