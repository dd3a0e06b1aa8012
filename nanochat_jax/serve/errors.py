"""Turns errors into HTTP responses. Each has one line of text, which names the field at fault if there is one.

On the paths of the specification, the body of an error is {"detail": line}. On all other paths, the body has the format
of OpenAI's API. If the path does not exist, the request probably comes from an OpenAI client with a wrong address.
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

_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # rest: see openai_error
_TYPE_NAME = re.compile(r"^(str|int|float|bool|dict|.*\W.*)$")  # matches the types of a union in pydantic's `loc`
_JSON_TYPE = re.compile(r"\s*application/([^;]+\+)?json\s*(;|$)", re.IGNORECASE)


class ApiError(HTTPException):
    """A refused request. `param` names the field at fault, and `code` is a machine-readable reason."""

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
    """Returns `error` as an error object of OpenAI's API."""
    status = error.status_code
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"message": replace_surrogates(error.detail), "type": kind, "param": param, "code": code}


def error_response(path: str, error: HTTPException) -> JSONResponse:
    """Returns the response to a request for `path` that failed with `error`."""
    own = path in DETAIL_PATHS
    body = {"detail": replace_surrogates(error.detail)} if own else {"error": openai_error(error)}
    return JSONResponse(body, error.status_code, error.headers)


def replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which UTF-8 cannot encode: "\\ud83c" -> "?". Error messages may quote text with
    surrogates."""
    return text.encode("utf-8", "replace").decode()


def handlers() -> dict:
    """Returns exception handlers for FastAPI that cover every way in which a request can fail."""

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path
        if error.status_code == 404 and not isinstance(error, ApiError):  # from the router: no route has this path
            error = ApiError(404, f"there is no {path[:80]!r} here: the API is under /v1; /openapi.json describes it")
        if error.status_code == 400 and not isinstance(error, ApiError):  # from FastAPI: the body is not text
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
    """Turns FastAPI's validation error, a list of objects, into an ApiError 400 that names the field and what is wrong.

    Example: [{"loc": ["body", "messages", 0, "content"], "msg": "Field required"}] -> "messages[0].content: Field
    required". If a field may have several types, pydantic reports one error per type. Only the most deeply nested error
    is kept, because the client probably meant the type that this error is about. Among errors of equal depth, an error
    that does not merely reject the type is preferred.
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
