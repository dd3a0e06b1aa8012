"""Serves the files of the web page, which are read once, at startup. No other file in the folder ui/ is served. Clients
need no key to load the page."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

UI = Path(__file__).parent / "ui"
SCRIPTS = (
    "page.js",
    "chats.js",
    "settings.js",
    "conversation.js",
    "message.js",
    "markdown.js",
    "composer.js",
    "server.js",
    "storage.js",
    "log.js",
    "dom.js",
)
FILES = {"/": "index.html"} | {f"/{name}": name for name in ("page.css", "logo.svg", *SCRIPTS)}  # URL path -> file
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

# With these headers, the browser runs only the page's own scripts and loads files only from this server. The browser
# also stops scripts from parsing text as HTML, so the model's output cannot become part of the page's code.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes() -> APIRouter:
    """Returns a router with one GET route per file."""
    router = APIRouter()
    for address, name in FILES.items():
        router.add_api_route(address, _serve(UI / name), include_in_schema=False)
    return router


def _serve(path: Path) -> Callable[[], Awaitable[Response]]:
    content = path.read_bytes()

    async def serve() -> Response:
        return Response(content, media_type=TYPES[path.suffix], headers=HEADERS)

    return serve
