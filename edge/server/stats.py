"""GET /stats: what the built-in page draws, as JSON. Nothing of it is gathered while nobody asks."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from edge.errors import EdgeError
from edge.memory.measured import Compared
from edge.server.errors import ApiError
from edge.server.service import Service
from edge.serving.batcher import Batcher
from plugins import PAGE_TOKENS

STATS_PATH = "/stats"
# However many ask: the engine's replies wait while a snapshot is made, and longer while memory is measured.
_LEAST_AGE, _LEAST_LEDGER_AGE = 0.5, 5.0
_PATIENCE = 0.5  # seconds to wait for the end of a long step before the last snapshot has to do


class Requests(BaseModel):
    """Requests in the batch, and in the queue."""

    running: int
    waiting: int


class Tokens(BaseModel):
    """Tokens since the start: of prompts computed and found in the prefix cache, and of replies."""

    prompt: int
    cached: int
    reply: int


class Pages(BaseModel):
    """Pages of the KV cache: used by requests, kept for those to come, and free."""

    used: int
    cached: int
    free: int
    page_tokens: int = PAGE_TOKENS


class LedgerLine(BaseModel):
    """Bytes planned, and measured (null: nothing measures it). Only those in memory count towards the budget."""

    name: str
    planned: int
    measured: int | None
    where: Literal["memory", "disk", "host"]


class Memory(BaseModel):
    """The plan's ledger beside what the run has taken. age: seconds since that was measured."""

    budget: int
    age: float
    lines: list[LedgerLine]


class Speculation(BaseModel):
    """Verified trees since the start, the tokens they proposed, and those that came of them."""

    name: str
    steps: int
    proposed: int
    accepted: int
    emitted: int


class Stats(BaseModel):
    """A snapshot between two steps. time: its seconds since the server's start; rates are differences of two.

    speculation: null if it is off.
    """

    model: str
    time: float
    requests: Requests
    tokens: Tokens
    pages: Pages
    memory: Memory
    speculation: Speculation | None


class Snapshots:
    """Takes snapshots of an engine on its own thread, and hands the latest to all who ask at about the same time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._started = time.monotonic()
        self._latest: Stats | None = None
        self._pending: Future[Stats] | None = None
        self._ledger: tuple[Compared, ...] = ()
        self._measured = float("-inf")

    async def get(self) -> Stats:
        """The latest; of requests, what there are just now. EdgeError if the engine does not run."""
        stats = await self._snapshot()
        worker = self._service.worker
        return stats.model_copy(update={"requests": Requests(running=worker.running, waiting=worker.waiting)})

    async def _snapshot(self) -> Stats:
        if (latest := self._latest) is not None and self._now() - latest.time < _LEAST_AGE:
            return latest
        if self._pending is None or self._pending.done():
            self._pending = self._service.worker.between_steps(self._take)
        waiting = asyncio.shield(asyncio.wrap_future(self._pending))  # others may wait for the same one
        if latest is None:
            return await waiting
        try:
            return await asyncio.wait_for(waiting, _PATIENCE)
        except asyncio.TimeoutError:  # not yet the built-in one in Python 3.10
            return latest

    def _now(self) -> float:
        return time.monotonic() - self._started

    def _take(self, batcher: Batcher) -> Stats:
        """On the engine's thread."""
        now, engine, totals = self._now(), batcher.engine, batcher.totals
        if now - self._measured >= _LEAST_LEDGER_AGE:
            self._ledger, self._measured = engine.ledger(), now
        cache = engine.cache
        lines = [LedgerLine(**vars(line)) for line in self._ledger]
        speculation = None
        if engine.speculation is not None:
            done = engine.speculation.totals
            counts = {name: getattr(done, name) for name in ("steps", "proposed", "accepted", "emitted")}
            speculation = Speculation(name=engine.speculation.name, **counts)
        self._latest = Stats(
            model=self._service.model,
            time=now,
            requests=Requests(running=len(batcher.running), waiting=len(batcher.queue)),
            tokens=Tokens(**vars(totals)),
            pages=Pages(used=cache.held_pages, cached=cache.cached_pages, free=cache.empty_pages),
            memory=Memory(budget=engine.plan.budget, age=now - self._measured, lines=lines),
            speculation=speculation,
        )
        return self._latest


def stats_router(service: Service) -> APIRouter:
    """The endpoint, for one service."""
    router, snapshots = APIRouter(), Snapshots(service)

    @router.get(STATS_PATH)
    async def stats() -> Stats:
        try:
            return await snapshots.get()
        except EdgeError as error:
            raise ApiError(503, str(error)) from None

    return router
