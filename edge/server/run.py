"""Runs the application on uvicorn until a signal, and then until the replies in progress have ended."""

from __future__ import annotations

import json
import logging
import socket
import sys
import time
from collections.abc import Generator
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from types import FrameType

import uvicorn

from edge.errors import EdgeError, UsageError
from edge.server.app import make_app
from edge.server.notify import Watchdog, notify
from edge.server.service import Service

log = logging.getLogger("edge.server")


class JsonLines(logging.Formatter):
    """A line of JSON for each event: time, level, what happened, and its facts."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        values = {"time": f"{moment}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        values |= {"event": record.getMessage(), **getattr(record, "facts", {})}
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)


def log_to_stderr() -> None:
    """All of the server's log, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("edge", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def listen(host: str, port: int) -> socket.socket:
    """UsageError if the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); choose another --port or --host"
        ) from None


class _Draining(uvicorn.Server):
    """At the first signal no more requests are taken and those in progress go on; at the second they end, too."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._watchdog: Watchdog | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, but that a signal which was obeyed is not raised again at the end."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        await super().startup(sockets)
        if self.started:
            notify("READY=1")
            self._watchdog = Watchdog(lambda seconds: engine_moves(self._service, seconds))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn.Server."""
        self.force_exit = self.force_exit or self.should_exit
        self._service.draining = True
        if self._watchdog is not None:
            self._watchdog.stop()
        notify("STOPPING=1")
        super().handle_exit(sig, frame)


def engine_moves(service: Service, seconds: float) -> bool:
    """Whether requests are taken and the engine's thread comes to the end of a step within `seconds`."""
    if service.draining or not service.worker.accepting:
        return False
    try:
        service.worker.between_steps(lambda batcher: None).result(seconds)
    except (EdgeError, TimeoutError, FutureTimeout):  # the last two are one from Python 3.11 on
        return False
    return True


def server_config(service: Service) -> uvicorn.Config:
    """How uvicorn serves one service."""
    return uvicorn.Config(
        make_app(service),
        http="h11",  # httptools, where it is installed, has no limit for headers
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(service.settings.drain),
        timeout_keep_alive=30,
    )


def serve(service: Service, listening: socket.socket, host: str) -> None:
    """Until SIGTERM or SIGINT."""
    name = f"[{host}]" if ":" in host else host
    where = f"http://{name}:{listening.getsockname()[1]}/v1"
    facts = {"address": where, "model": service.model, "context": service.engine.max_context}
    run = service.engine.plan.run
    log.info("serving", extra={"facts": {**facts, "sequences": run.sequences, "kv_pages": run.pages}})
    _Draining(server_config(service), service).run(sockets=[listening])
    log.info("stopped")
