"""Failures as OpenAI's clients expect them: a status, and a body with message, type, param and code."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from edge.errors import EdgeError
from edge.server.protocol import Body
from edge.serving.batcher import QueueFullError

log = logging.getLogger("edge.server")


class Json(JSONResponse):
    """A body of UTF-8, whatever a client's text had in it: half a character becomes a question mark."""

    def render(self, content: Any) -> bytes:
        """See JSONResponse."""
        return dumps(content).encode("utf-8", "replace")


def ignored_fields(body: Body) -> dict[str, str]:
    """A header that names what a body had and nobody read."""
    if not body.ignored:
        return {}
    names = ", ".join(body.ignored)[:1000]
    log.warning("ignored", extra={"facts": {"fields": names}})
    visible = "".join(c if " " <= c <= "~" else "?" for c in names)  # a header has no other characters
    return {"X-Ignored-Fields": visible.strip()}


def dumps(value: Any) -> str:
    """JSON in one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class ApiError(Exception):
    """A refusal. param: the field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, Any]:
        """As OpenAI has it."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Json:
        """The whole answer."""
        return Json(self.body(), self.status, headers=dict(self.headers or {}))


_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def of_edge_error(error: EdgeError, status: int = 400) -> ApiError:
    """Whatever the runtime refuses is the request's fault unless `status` says otherwise."""
    code = "context_length_exceeded" if "the context is limited" in str(error) else None
    return ApiError(status, str(error), code)


def install(app: FastAPI) -> None:
    """Answer every failure in this form."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Json:
        return error.response()

    @app.exception_handler(EdgeError)
    async def wrong(request: Request, error: EdgeError) -> Json:
        assert not isinstance(error, QueueFullError)
        return of_edge_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Json:
        if "json" not in request.headers.get("content-type", ""):
            return ApiError(400, "the body must be JSON and say so; send 'Content-Type: application/json'").response()
        return _malformed(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Json:
        if error.status_code == 400 and error.__cause__ is not None:  # FastAPI could not read the body
            return ApiError(400, f"the body is not JSON ({error.__cause__})").response()
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(RecursionError)
    async def deep(request: Request, error: RecursionError) -> Json:
        return ApiError(400, "a value of the body is nested too deeply; flatten it").response()

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> Json:
        return ApiError(500, f"internal error ({type(error).__name__}); the server's log has more").response()


def _malformed(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON ({first.get('ctx', {}).get('error', first['msg'])})")
    # A field that may be several things has an error for each of them.
    alike = [other for other in error.errors() if other["loc"][:2] == first["loc"][:2]]
    places = zip(*(other["loc"] for other in alike), strict=False)
    where = ".".join(str(parts[0]) for parts in places if len(set(parts)) == 1 and parts[0] != "body")
    what = ", or: ".join(dict.fromkeys(other["msg"] for other in alike))
    message = f"{where}: {what}" if where else f"the body is not what is expected here: {what}"
    return ApiError(400, message, param=where or None)
