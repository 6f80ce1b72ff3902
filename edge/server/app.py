"""The application: endpoints, who may use them, and what a body may weigh."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from edge.errors import UsageError
from edge.server import errors
from edge.server.chat import chat_router
from edge.server.completions import completions_router
from edge.server.errors import ApiError, Json
from edge.server.page import PAGE_PATHS, page_router
from edge.server.protocol import TokenizeBody
from edge.server.replies import METRICS, REFUSALS, Health, Ready, ServedModel, ServedModels, Tokens, streamed_schemas
from edge.server.service import Service
from edge.server.stats import STATS_PATH, stats_router

log = logging.getLogger("edge.server")
_OPEN = ("/health", "/ready", *PAGE_PATHS)  # to whoever asks, without a key

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def make_app(service: Service) -> FastAPI:
    """The OpenAI protocol for one service. When the application ends, so do the service's requests."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        yield
        await run_in_threadpool(service.worker.stop)

    app = FastAPI(
        title="minicpm-edge",
        version=version("minicpm-edge"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=REFUSALS,
    )
    app.openapi = partial(_schema, app, service.settings.api_key is not None)  # type: ignore[method-assign]
    errors.install(app)
    app.include_router(chat_router(service))
    app.include_router(completions_router(service))
    app.include_router(stats_router(service))
    app.include_router(page_router())
    _add_others(app, service)
    app.add_middleware(_Gate, service=service)
    return app


def _schema(app: FastAPI, has_key: bool) -> dict[str, Any]:
    """The OpenAPI document, without FastAPI's own answer to bodies that are wrong: they get 400 here."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if path in _OPEN:
                    operation["security"] = []
        components = document["components"]
        for unused in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(unused, None)
        components["schemas"] |= streamed_schemas()
        if has_key:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


def _add_others(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    @app.get("/v1/models", responses={200: {"model": ServedModels}})
    async def models() -> Json:
        return Json({"object": "list", "data": [_model(service, started)]})

    @app.get("/v1/models/{name:path}", responses={200: {"model": ServedModel}})
    async def model(name: str) -> Json:
        service.check_model(name)
        return Json(_model(service, started))

    @app.post("/tokenize", responses={200: {"model": Tokens}})
    async def tokenize(body: TokenizeBody) -> Json:
        service.check_model(body.model)
        ids = await run_in_threadpool(_tokens, service, body)
        return Json({"tokens": ids, "count": len(ids), "max_model_len": service.engine.max_context})

    @app.get("/health", responses={200: {"model": Health}})
    async def health() -> Json:
        if (failure := service.worker.failure) is not None:
            raise ApiError(503, f"the engine has failed ({type(failure).__name__}); restart the server")
        return Json({"status": "ok"})

    @app.get("/ready", responses={200: {"model": Ready}})
    async def ready() -> Json:
        if service.draining or not service.worker.accepting:
            raise ApiError(503, "the server takes no new requests", headers={"Retry-After": "5"})
        worker = service.worker
        return Json({"status": "ok", "model": service.model, "running": worker.running, "waiting": worker.waiting})

    @app.get("/metrics", response_class=Response, responses=METRICS)
    async def metrics() -> Response:
        page = service.metrics.page(service.engine, service.worker.running, service.worker.waiting)
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(service: Service, started: int) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": started,
        "owned_by": "minicpm-edge",
        "max_model_len": service.engine.max_context,
    }


def _tokens(service: Service, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise UsageError("give either a prompt or messages")
    if body.messages is not None:
        return service.tokenizer.encode_chat(body.messages)
    assert body.prompt is not None
    add_bos = body.add_special_tokens and service.tokenizer.settings.add_bos
    return service.tokenizer.encode(body.prompt, add_bos=add_bos)


class _Gate:
    """Before any endpoint: the key, the body's size; after it: the log."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        started, status = time.perf_counter(), 0

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if (refusal := self._refusal(scope["path"], headers)) is not None:
                await refusal.response()(scope, receive, sending)
            else:
                await self._app(scope, self._limited(receive), sending)
        finally:
            if status >= 400:
                self._service.metrics.refused(status)
            milliseconds = round(1000 * (time.perf_counter() - started), 1)
            client = (scope.get("client") or ("",))[0]
            facts = {"method": scope["method"], "path": scope["path"], "status": status, "client": client}
            level = logging.DEBUG if scope["path"] == STATS_PATH and status < 400 else logging.INFO  # a page polls it
            log.log(level, "request", extra={"facts": {**facts, "milliseconds": milliseconds}})

    def _refusal(self, path: str, headers: dict[str, bytes]) -> ApiError | None:
        key, most = self._service.settings.api_key, self._service.settings.body
        if key is not None and path not in _OPEN:
            given = headers.get("authorization", b"").removeprefix(b"Bearer ").strip()
            if not hmac.compare_digest(given, key.encode()):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                return ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", b"0")
        if length.isdigit() and int(length) > most:
            return ApiError(413, f"the body has {int(length)} bytes and this server takes {most}; send less")
        return None

    def _limited(self, receive: Receive) -> Receive:
        """For bodies that do not say how long they are."""
        left = self._service.settings.body

        async def limited() -> MutableMapping[str, Any]:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the body has more than {self._service.settings.body} bytes")
            return message

        return limited
