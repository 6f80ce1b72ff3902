"""A server in a thread of the tests' own process, on a free port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from edge.cli.generate import load_tokenizer
from edge.engine import open_engine
from edge.plan import EngineOptions
from edge.server.run import server_config
from edge.server.service import ServerSettings, Service
from edge.serving.batcher import BatchLimits


class Served:
    """Where it listens, and what is behind it."""

    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.url = f"http://127.0.0.1:{port}"
        self.port = port

    def wait_until_idle(self, seconds: float = 20) -> None:
        """No request is left, and no page is held."""
        cache, worker = self.service.engine.cache, self.service.worker
        end = time.monotonic() + seconds
        while worker.running or worker.waiting or cache.free_pages < cache.num_pages:
            assert time.monotonic() < end, (worker.running, worker.waiting, cache.free_pages)
            time.sleep(0.01)


@contextmanager
def serving(
    bundle: Path,
    options: EngineOptions | None = None,
    limits: BatchLimits | None = None,
    settings: ServerSettings | None = None,
    send_buffer: int | None = None,
) -> Iterator[Served]:
    """Served for as long as the context lasts. send_buffer: bytes that the system takes for who does not read."""
    engine = open_engine(
        bundle, options or EngineOptions(context=4096, chunk=256, threads=2, sequences=4, logits_rows=64)
    )
    service = Service(engine, load_tokenizer(engine), limits or BatchLimits(sequences=4), settings or ServerSettings())
    listening = socket.socket()
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(service))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Served(service, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
