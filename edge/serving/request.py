"""A request, what came of it, and the place where its reader finds that."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edge.chooser import Constraint, TokenLogprobs
from edge.errors import EdgeError
from edge.generation import Generation, TokenEvent
from edge.sampler import SamplingParams
from edge.scheduler import Sequence as ScheduledSequence
from edge.speculation.statistics import Speculated
from edge.stream import TextStream


@dataclass(frozen=True)
class Request:
    """A prompt and what is wanted of its reply.

    client: whose it is; clients take turns. timeout: seconds from its arrival. text: makes what turns its tokens into
    text, and ends it at a stop string; None: tokens only. constraint: makes what its tokens must keep to.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    client: str = ""
    timeout: float | None = None
    text: Callable[[], TextStream] | None = None
    constraint: Callable[[], Constraint] | None = None


@dataclass(frozen=True)
class Output:
    """What a step brought: tokens, and the text that is certain with them (the end token has none).

    prompt_logprobs: in the first output with tokens, if they were asked for; of all tokens of the prompt but the first.
    finish_reason: None while there is more; 'stop' and 'length' are a reply's own ends, the others are 'abort'
    (cancelled), 'timeout' and 'error', which `error` explains.
    """

    tokens: tuple[TokenEvent, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    error: EdgeError | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass
class RequestStatistics:
    """When things happened, in the clock's seconds, and what was computed. None: not yet."""

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0
    tokens: int = 0
    preemptions: int = 0
    speculated: Speculated | None = None


class Outbox:
    """Outputs on their way from the thread that makes them to the one that reads them.

    `full`: `most` tokens are unread, so no more should be made. The reader calls `take` when `on_output` was called,
    and `on_room` is called when a full one was emptied; both calls come from the other side's thread.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._outputs: deque[Output] = deque()
        self._unread = 0
        self.on_output: Callable[[], None] = _nothing
        self.on_room: Callable[[], None] = _nothing

    @property
    def full(self) -> bool:
        """Must the reader read first?"""
        return self._unread >= self._most

    def put(self, output: Output) -> None:
        """Add an output, also to a full box: an end is never lost."""
        with self._lock:
            self._outputs.append(output)
            self._unread += len(output.tokens)
        self.on_output()

    def take(self) -> list[Output]:
        """All outputs since the last call."""
        with self._lock:
            was_full, outputs = self.full, list(self._outputs)
            self._outputs.clear()
            self._unread = 0
        if was_full:
            self.on_room()
        return outputs


def _nothing() -> None:
    pass


@dataclass(eq=False)
class Ticket:
    """A request on its way through the queue and the batch. The reader uses `outbox` and `statistics`; the rest belongs
    to the batcher.

    number: in order of arrival. after: another choice of the same prompt, whose prefill this one waits for.
    """

    number: int
    request: Request
    outbox: Outbox
    statistics: RequestStatistics
    after: Ticket | None = None
    sequence: ScheduledSequence | None = None
    generation: Generation | None = None
    stream: TextStream | None = None
    finish_reason: str | None = None

    @property
    def deadline(self) -> float | None:
        """When it is given up, in the clock's seconds."""
        timeout = self.request.timeout
        return None if timeout is None else self.statistics.arrived + timeout

    @property
    def may_start(self) -> bool:
        """Has the prompt of its elder choice, if there is one, been computed?"""
        after = self.after
        return after is None or after.finish_reason is not None or after.statistics.first_token is not None


class Observer(Protocol):
    """Is told what happens, on the batcher's thread."""

    def first_token(self, ticket: Ticket) -> None:
        """A reply has begun."""
        ...

    def tokens(self, count: int, seconds: float) -> None:
        """Further tokens of one reply came together, so long after those before."""
        ...

    def finished(self, ticket: Ticket) -> None:
        """A request has ended."""
        ...


class NoObserver:
    """Nobody is interested."""

    def first_token(self, ticket: Ticket) -> None:
        """Ignored."""

    def tokens(self, count: int, seconds: float) -> None:
        """Ignored."""

    def finished(self, ticket: Ticket) -> None:
        """Ignored."""
