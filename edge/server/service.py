"""What all endpoints share: the engine's worker, the tokenizer, and replies that are read as they come."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from starlette.requests import Request as HttpRequest

from edge.bundle import TOKENIZER
from edge.chooser import Constraint
from edge.engine import Engine
from edge.errors import EdgeError, UsageError
from edge.sampler import SamplingParams, sampling_params
from edge.server.errors import ApiError, of_edge_error
from edge.server.metrics import Metrics
from edge.server.protocol import GenerationBody, ResponseFormat
from edge.serving.batcher import Batcher, BatchLimits, QueueFullError
from edge.serving.guidance import Guidance
from edge.serving.request import Output, Request, Ticket
from edge.serving.worker import Worker
from edge.stream import TextStream
from edge.text import Tokenizer

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "ignore_eos",
)
log = logging.getLogger("edge.server")


@dataclass(frozen=True)
class ServerSettings:
    """What a server is told. model: the name it answers to; None: the bundle's. timeout, drain: seconds. body: bytes.

    max_tokens: of a reply, at most; None: what the context holds. log_prompts: they go to the log, too.
    """

    model: str | None = None
    api_key: str | None = None
    timeout: float = 600.0
    drain: float = 30.0
    body: int = 8 << 20
    max_tokens: int | None = None
    log_prompts: bool = False


class Service:
    """One engine behind the endpoints."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, limits: BatchLimits, settings: ServerSettings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.model = settings.model or engine.bundle.manifest.name
        self.metrics = Metrics()
        self.worker = Worker(Batcher(engine, limits, self.metrics))
        self.draining = False

    @cached_property
    def guidance(self) -> Guidance:
        """Made when it is first needed: it reads the whole vocabulary."""
        path: Path = self.engine.bundle.file(TOKENIZER)
        return Guidance(path, self.engine.vocab_size, self.engine.eos_token_ids)

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not served."""
        if name is not None and name != self.model:
            message = f"the model {name!r} is not served here; ask for {self.model!r}"
            raise ApiError(404, message, "model_not_found", "model")

    def params(self, body: GenerationBody, max_tokens: int, **further: object) -> SamplingParams:
        """How a body wants its tokens; what it leaves open is the model's default, and OpenAI's where it has none."""
        limit = self.settings.max_tokens
        if limit is not None and max_tokens > limit:
            raise ApiError(400, f"max_tokens is {max_tokens} and this server allows {limit}", param="max_tokens")
        stop = [body.stop] if isinstance(body.stop, str) else body.stop
        chosen = {name: getattr(body, name) for name in _SAMPLING}
        if body.logit_bias is not None:
            chosen["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
        of_model = {name: value for name, value in self.engine.bundle.manifest.generation.items() if value is not None}
        defaults = {"temperature": 1.0, **of_model}
        return sampling_params(defaults, **chosen, max_tokens=max_tokens, stop=stop or None, **further)

    def constraint(self, wanted: ResponseFormat | None) -> Callable[[], Constraint] | None:
        """Of a response_format; UsageError if it is not usable."""
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return self.guidance.json_object()
        if wanted.type == "json_schema" and wanted.json_schema is not None:
            return self.guidance.json_schema(wanted.json_schema.schema_)
        if wanted.type == "grammar" and wanted.grammar is not None:
            return self.guidance.lark(wanted.grammar)
        if wanted.type == "regex" and wanted.regex is not None:
            return self.guidance.regex(wanted.regex)
        raise UsageError(f"response_format is {wanted.type} and has no {wanted.type}; give it, or leave the format out")

    def text(self, params: SamplingParams, *, after_prompt: bool) -> Callable[[], TextStream]:
        """Makes what turns a reply's tokens into text."""
        return partial(TextStream, self.tokenizer, params.stop, after_prompt=after_prompt)

    def submit(self, groups: Sequence[Sequence[Request]]) -> Replies:
        """Queue the choices of each of several prompts. ApiError if any of them is refused; then none is queued."""
        replies = Replies(self.worker)
        if not self.worker.accepting:
            what = "is shutting down" if self.worker.failure is None else "has failed; its log says why"
            raise ApiError(503, f"the server {what}", headers={"Retry-After": "5"})
        if self.settings.log_prompts:
            for requests in groups:
                log.info("prompt", extra={"facts": {"text": self.tokenizer.decode(requests[0].prompt_ids)}})
        try:
            for requests in groups:
                replies.add(self.worker.submit(requests, replies.wake))
        except QueueFullError as error:
            replies.cancel()
            raise ApiError(429, str(error), "queue_full", headers={"Retry-After": str(self._retry_after())}) from None
        except EdgeError as error:
            replies.cancel()
            raise of_edge_error(error) from None
        return replies

    def _retry_after(self) -> int:
        """Seconds until there is room, by how long requests took lately."""
        rounds = (1 + self.worker.waiting) / max(1, self.worker.running)
        return min(60, max(1, math.ceil(self.metrics.mean_seconds * rounds)))


def client_of(body: GenerationBody, http: HttpRequest) -> str:
    """Whose request it is: clients take turns."""
    return f"{http.client.host if http.client else ''}/{body.user or ''}"


def choices(request: Request, count: int) -> list[Request]:
    """The request so many times; if it has a seed, the next ones for those after the first."""
    seed = request.params.seed
    if seed is None:
        return [request] * count
    return [replace(request, params=replace(request.params, seed=(seed + i) % 2**64)) for i in range(count)]


class Replies:
    """Several replies, read in one task of asyncio's loop, whichever thread wakes it."""

    def __init__(self, worker: Worker) -> None:
        self.tickets: list[Ticket] = []
        self._worker = worker
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def add(self, tickets: Sequence[Ticket]) -> None:
        """More of them."""
        self.tickets += tickets

    def wake(self) -> None:
        """One of them has an output; from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._event.set)

    def cancel(self) -> None:
        """End those that have not ended."""
        self._worker.cancel(self.tickets)

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """(index of the reply, output), as they come, until all replies have ended. Leaving early ends them."""
        left = set(range(len(self.tickets)))
        try:
            while left:
                self._event.clear()
                for index in sorted(left):
                    for output in self.tickets[index].outbox.take():
                        if output.finish_reason is not None:
                            left.discard(index)
                        yield index, output
                if left:
                    await self._event.wait()
        finally:
            self.cancel()

    async def all(self, http: HttpRequest) -> list[list[Output]]:
        """All outputs of each reply. Who hangs up meanwhile ends them."""
        outputs: list[list[Output]] = [[] for _ in self.tickets]

        async def read() -> None:
            async for index, output in self.outputs():
                outputs[index].append(output)

        reading = asyncio.ensure_future(read())
        gone = asyncio.ensure_future(_hung_up(http))
        try:
            await asyncio.wait({reading, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise ApiError(499, "the client hung up")
            await reading
        finally:
            reading.cancel()
            gone.cancel()
            self.cancel()
        return outputs


async def _hung_up(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def check_output(output: Output) -> None:
    """ApiError if a reply ended otherwise than by itself."""
    if (error := failure_of(output)) is not None:
        raise error


def failure_of(output: Output) -> ApiError | None:
    """Why a reply ended before its time; None if it did not."""
    if output.finish_reason == "timeout":
        return ApiError(408, "the request took longer than the server allows; ask for fewer tokens", "timeout")
    if output.finish_reason == "abort":
        return ApiError(499, "the request was cancelled")
    if output.error is not None:
        return of_edge_error(output.error, 500 if not isinstance(output.error, UsageError) else 400)
    return None
