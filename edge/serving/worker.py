"""The thread that owns the engine: others hand it requests and read what comes of them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from edge.errors import EdgeError
from edge.serving.batcher import Batcher, QueueFullError
from edge.serving.request import Request, Ticket

T = TypeVar("T")
log = logging.getLogger(__name__)


class Worker:
    """Runs a batcher until it is stopped. All methods may be called from any thread."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._changed = threading.Condition()
        self._arrived: deque[Ticket] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._asked: deque[tuple[Future[Any], Callable[[Batcher], Any]]] = deque()
        self._nudged = False
        self._accepting = self._going = True
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def accepting(self) -> bool:
        """Are new requests taken?"""
        return self._accepting and self.failure is None

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._arrived) + len(self._batcher.queue)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._batcher.running)

    def submit(self, requests: Sequence[Request], on_output: Callable[[], None] | None = None) -> list[Ticket]:
        """Queue the choices of one prompt, all of them or none; `on_output` is called when any has an output.

        EdgeError for a request that can never be served, QueueFullError if the queue is full.
        """
        for request in requests:
            self._batcher.check(request)
        with self._changed:
            if not self.accepting:
                raise EdgeError("the server is shutting down; send the request to another one")
            most = self._batcher.limits.queue
            # One that may start at once does not wait, however short the queue.
            if (waiting := self.waiting) and waiting + len(requests) > most:
                raise QueueFullError(f"{waiting} requests wait already, of {most} at most; try again later")
            tickets: list[Ticket] = []
            for request in requests:
                ticket = self._batcher.ticket(request, tickets[0] if tickets else None)
                ticket.outbox.on_room = self._nudge
                if on_output is not None:
                    ticket.outbox.on_output = on_output
                tickets.append(ticket)
            self._arrived.extend(tickets)
            self._nudged = True
            self._changed.notify_all()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """End requests that have not ended; a no-op for others."""
        with self._changed:
            self._cancelled.extend(t for t in tickets if t.finish_reason is None)
            self._nudged = True
            self._changed.notify_all()

    def between_steps(self, function: Callable[[Batcher], T]) -> Future[T]:
        """What a function makes of the batcher, on the engine's thread before its next step.

        All replies wait meanwhile, so it must be short. EdgeError, here or of the future, if the thread has ended.
        """
        future: Future[T] = Future()
        with self._changed:
            if not self._going:
                raise EdgeError("the engine does not run any more; restart the server")
            self._asked.append((future, function))
            self._nudged = True
            self._changed.notify_all()
        return future

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until all others have ended -> whether they have."""
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: self._idle or not self._thread.is_alive(), timeout)

    def stop(self) -> None:
        """Cancel what is left and end the thread."""
        with self._changed:
            self._accepting = self._going = False
            self._nudged = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def _idle(self) -> bool:
        return not (self._arrived or self._batcher.running or len(self._batcher.queue))

    def _nudge(self) -> None:
        with self._changed:
            self._nudged = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self._take_in():
                self._answer()
                if not self._batcher.step():
                    self._wait()
            error = EdgeError("the server was stopped before the reply was complete; send the request again")
        except BaseException as problem:
            log.exception("the engine's thread ended")
            self.failure = problem
            error = EdgeError(f"the engine failed ({type(problem).__name__}: {problem}); restart the server")
        self._end_all(error)

    def _take_in(self) -> bool:
        """What others left since the last step -> False if that is the end."""
        with self._changed:
            self._nudged = False
            while self._arrived:
                self._batcher.add(self._arrived.popleft())
            while self._cancelled:
                self._batcher.cancel(self._cancelled.popleft())
            if self._idle:
                self._changed.notify_all()
            return self._going

    def _answer(self) -> None:
        """Outside the lock: nobody who submits or cancels waits for it."""
        while self._asked:
            future, function = self._asked.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self._batcher))
                except BaseException as problem:
                    future.set_exception(problem)
                    if not isinstance(problem, Exception):
                        raise

    def _wait(self) -> None:
        """Until someone has something, or a request has waited long enough."""
        deadline = self._batcher.next_deadline
        with self._changed:
            timeout = None if deadline is None else max(0.0, deadline - self._batcher.clock())
            self._changed.wait_for(lambda: self._nudged, timeout)

    def _end_all(self, error: EdgeError) -> None:
        with self._changed:
            self._going = False
            while self._asked:
                future, _ = self._asked.popleft()
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            while self._arrived:
                self._batcher.add(self._arrived.popleft())
            for ticket in [*self._batcher.running, *self._batcher.queue]:
                try:
                    self._batcher.fail(ticket, error)
                except Exception:
                    log.exception("request %d could not be ended", ticket.number)
            self._changed.notify_all()
