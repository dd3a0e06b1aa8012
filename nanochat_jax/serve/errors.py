"""How the server says no: a line that names the field. The specification's own paths answer with {"detail": line}, all
others in OpenAI's shape, paths that do not exist included: who asks for one has likely mistaken the API's address.
"""

import re

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanochat_jax.serve.page import FILES

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # else by hundred
_OWN = (*FILES, "/chat/completions", "/health", "/stats", "/metrics", "/openapi.json")
_TYPE_NAME = re.compile(r"^(str|int|float|bool|dict|.*\W.*)$")  # pydantic names the member of a union it tried
_JSON_TYPE = re.compile(r"\s*application/([^;]+\+)?json\s*(;|$)", re.IGNORECASE)
NOT_JSON = "the body must be JSON, sent with the header Content-Type: application/json"


class ApiError(HTTPException):
    """A refusal; `param` is the field it is about, `code` a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def describe(error: HTTPException) -> dict:
    """OpenAI's error object."""
    status = error.status_code
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"message": plain(error.detail), "type": kind, "param": param, "code": code}


def response(path: str, error: HTTPException) -> JSONResponse:
    """The answer to a request for `path` that ends with `error`."""
    body = {"detail": plain(error.detail)} if path in _OWN else {"error": describe(error)}
    return JSONResponse(body, error.status_code, error.headers)


def plain(text: str) -> str:
    """Text that can be sent: clients may send, and would get back, halves of characters."""
    return text.encode("utf-8", "replace").decode()


def handlers() -> dict:
    """For FastAPI: every way in which a request can fail."""

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path
        if error.status_code == 404 and not isinstance(error, ApiError):  # no route has said so, there is none
            error = ApiError(404, f"there is no {path[:80]!r} here: the API is under /v1, /openapi.json describes it")
        if error.status_code == 400 and not isinstance(error, ApiError):  # FastAPI, of bytes that are no text
            error = ApiError(400, "the body is not JSON in UTF-8", code="invalid_json")
        return response(path, error)

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        is_json = _JSON_TYPE.match(request.headers.get("content-type", ""))
        refusal = from_validation(error) if is_json else ApiError(400, NOT_JSON, code="invalid_content_type")
        return response(request.url.path, refusal)

    async def bug(request: Request, error: Exception) -> JSONResponse:
        return response(request.url.path, ApiError(500, "the server has made a mistake; its log says which"))

    return {HTTPException: http, RequestValidationError: invalid, Exception: bug}


def from_validation(error: RequestValidationError) -> ApiError:
    """FastAPI's 422 with its list of objects becomes 400 with one line: the field and what is wrong with it.

    Of a field that may have several types, the complaint that got deepest is about the type that was meant, or else
    the one that is not about the type.
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
