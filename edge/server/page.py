"""The built-in page: a chat, and charts of what /stats says. Its files are the four beside this one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE_PATHS = tuple(_FILES)  # open to whoever asks: a browser asks for them before anybody can give it a key
# Nothing comes from anywhere else, nothing inline runs, and no other page may frame this one.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        *(f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors")),
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """The page's files, read once. They are no part of the API, so the OpenAPI document does not have them."""
    router = APIRouter()
    for path, (name, kind) in _FILES.items():
        content = Path(__file__).with_name(name).read_bytes()
        router.add_api_route(path, _sender(content, kind), methods=["GET", "HEAD"], include_in_schema=False)
    return router


def _sender(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=_HEADERS)

    return send
