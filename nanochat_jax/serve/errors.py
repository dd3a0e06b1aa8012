"""Turns errors into HTTP responses. An error message is one line of text, and names the invalid field if there is one.

On the paths in DETAIL_PATHS, the body of the response is {"detail": message}. On all other paths, the body has the
format of OpenAI's API. This includes unknown paths, because a client that requests one is probably an OpenAI client
with a wrong base URL.
"""

import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanochat_jax.serve.page import FILES
from nanochat_jax.serve.worker import EngineFailure, TimedOut

DETAIL_PATHS = (*FILES, "/chat/completions", "/health", "/stats", "/metrics", "/openapi.json")
NOT_JSON = "the body must be JSON, sent with the header Content-Type: application/json"

_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# If a field may have several types, pydantic adds a type's name to the path of the field (`loc`). This pattern matches
# the names of types.
_TYPE_NAME = re.compile(r"^(str|int|float|bool|dict|.*\W.*)$")
_JSON_TYPE = re.compile(r"\s*application/([^;]+\+)?json\s*(;|$)", re.IGNORECASE)


class ApiError(HTTPException):
    """An error response. `param` is the field that caused the error, and `code` is a machine-readable reason."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def openai_error(error: HTTPException) -> dict[str, Any]:
    """Converts `error` to an error object of OpenAI's API."""
    status = error.status_code
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"message": replace_surrogates(error.detail), "type": kind, "param": param, "code": code}


def error_response(path: str, error: HTTPException) -> JSONResponse:
    """Returns the response for `error`, in the format that clients of `path` expect."""
    own = path in DETAIL_PATHS
    body = {"detail": replace_surrogates(error.detail)} if own else {"error": openai_error(error)}
    return JSONResponse(body, error.status_code, error.headers)


def replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, because UTF-8 cannot encode them: "\\ud83c" -> "?".

    An error message contains surrogates if it quotes a request that contains them.
    """
    return text.encode("utf-8", "replace").decode()


def handlers() -> dict:
    """Returns exception handlers for FastAPI. Together they handle every exception."""

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path
        if error.status_code == 404 and not isinstance(error, ApiError):  # raised by the router: no route has this path
            error = ApiError(404, f"there is no {path[:80]!r} here: the API is under /v1; /openapi.json describes it")
        if error.status_code == 400 and not isinstance(error, ApiError):  # raised by FastAPI: the body is not text
            error = ApiError(400, "the body is not JSON in UTF-8", code="invalid_json")
        return error_response(path, error)

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        is_json = _JSON_TYPE.match(request.headers.get("content-type", ""))
        refusal = from_validation(error) if is_json else ApiError(400, NOT_JSON, code="invalid_content_type")
        return error_response(request.url.path, refusal)

    async def bug(request: Request, error: Exception) -> JSONResponse:
        return error_response(
            request.url.path, ApiError(500, "internal server error; the server's log has the details")
        )

    return {HTTPException: http, RequestValidationError: invalid, Exception: bug}


def from_validation(error: RequestValidationError) -> ApiError:
    """Returns an ApiError 400 that names an invalid field and says what is wrong with it.

    Example: loc ["body", "messages", 0, "content"] and msg "Field required" -> "messages[0].content: Field required".

    If a field may have several types, pydantic reports one error per type. The client probably meant the type with the
    most deeply nested error, so only this error is kept. If several errors are equally deep, an error about the value
    is preferred to an error about the type.
    """
    worst = max(error.errors(), key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
    field = ""
    for part in worst["loc"][1:]:
        if isinstance(part, int):
            field += f"[{part}]"
        elif not _TYPE_NAME.match(part):
            field += f".{part}" if field else part
    if worst["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    return ApiError(400, f"{field or 'body'}: {worst['msg']}", field or None)


def from_engine_failure(error: EngineFailure) -> ApiError:
    """Returns ApiError 504 if the answer took too long, or 503 if the engine has failed or is shutting down."""
    if isinstance(error, TimedOut):
        return ApiError(504, str(error), code="timeout")
    return ApiError(503, str(error), code="server_unavailable")
