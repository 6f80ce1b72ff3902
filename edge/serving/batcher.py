"""Continuous batching: who is admitted, who takes part in the next step, and who gives up its pages for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from edge.engine import Engine
from edge.errors import EdgeError
from edge.generation import TokenEvent
from edge.kv_cache import NoPagesError
from edge.scheduler import Sequence as ScheduledSequence
from edge.serving.queue import FairQueue
from edge.serving.request import NoObserver, Observer, Outbox, Output, Request, RequestStatistics, Ticket

_LEAST_CHUNK = 32  # prompt tokens of a step, however long they take
_SMOOTHING = 0.3  # weight of the latest measurement of a prompt token's seconds


class QueueFullError(EdgeError):
    """Too many requests wait already; the same request may be taken later."""


@dataclass(frozen=True)
class BatchLimits:
    """sequences: computed at once. queue: requests that wait, at most. unread: tokens that a reader may leave unread
    before its request pauses. step_seconds: what a step with prompts may take while replies are on their way.
    """

    sequences: int = 8
    queue: int = 64
    unread: int = 256
    step_seconds: float = 0.25


@dataclass
class Totals:
    """Tokens since the start: of prompts computed and found in the prefix cache, and of replies."""

    prompt: int = 0
    cached: int = 0
    reply: int = 0


class Batcher:
    """Requests of one engine, a step at a time. Not thread-safe: edge/serving/worker.py has the thread.

    A request is admitted when there are pages for its whole prompt; it never loses them to one that came later. When a
    reply needs a page and there is none, the youngest request gives up all of its own, goes back to the front of the
    queue, and is computed again from what the prefix cache still has. So the oldest always goes on. A request whose
    reader does not read pauses, and is the first to give way.
    """

    def __init__(
        self,
        engine: Engine,
        limits: BatchLimits,
        observer: Observer | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.engine, self.clock = engine, clock
        self.limits = limits
        self.queue = FairQueue()
        self.running: list[Ticket] = []  # in order of arrival
        self.totals = Totals()
        self._observer = NoObserver() if observer is None else observer
        self._most = max(1, min(limits.sequences, engine.plan.run.sequences, engine.chunk // 2))
        self._number = 0
        self._refused: tuple[int, int] | None = None  # the ticket without pages, and how many were free then
        self._prompt_seconds = 0.0

    def check(self, request: Request) -> None:
        """EdgeError for what can never be served, whatever else is going on."""
        self.engine.check_prompt(request.prompt_ids)
        wanted, most = len(request.prompt_ids) + request.params.max_tokens, self.engine.max_context
        if wanted > most:
            raise EdgeError(
                f"the prompt has {len(request.prompt_ids)} tokens, which with the {request.params.max_tokens} of the "
                f"reply are {wanted}, and the context is limited to {most}; shorten the prompt or lower max_tokens"
            )

    def ticket(self, request: Request, after: Ticket | None = None) -> Ticket:
        """A request that has arrived and is nowhere yet."""
        self._number += 1
        statistics = RequestStatistics(arrived=self.clock())
        return Ticket(self._number, request, Outbox(self.limits.unread), statistics, after)

    def add(self, ticket: Ticket) -> None:
        """Let it wait for its turn."""
        self.queue.add(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """End it now, wherever it is; its pages are free at once."""
        if ticket.finish_reason is None:
            self._end(ticket, "abort")

    def fail(self, ticket: Ticket, error: EdgeError) -> None:
        """End it with an error."""
        self._end(ticket, "error", error)

    @property
    def next_deadline(self) -> float | None:
        """When the next request is to be given up, in the clock's seconds."""
        return min((t.deadline for t in (*self.running, *self.queue) if t.deadline is not None), default=None)

    def step(self) -> bool:
        """Admit, compute one step, hand out what it brought -> False if nothing could be computed."""
        self._expire()
        self._admit_all()
        before = len(self.running)
        active = self._with_pages([t for t in self.running if not t.outbox.full])
        if not active:
            return len(self.running) < before  # who gave way may be admitted again
        generations = [t.generation for t in active if t.generation is not None]
        started = self.clock()
        try:
            prompts = self.engine.step(generations, self._chunk(active))
        except NoPagesError:  # a step needed copies of shared pages, too
            self._preempt(self._youngest(active))
            return True
        except EdgeError as error:
            for ticket in active:
                self._end(ticket, "error", error)
            return True
        if prompts:
            self.totals.prompt += prompts
            each = (self.clock() - started) / prompts
            self._prompt_seconds += (each - self._prompt_seconds) * (_SMOOTHING if self._prompt_seconds else 1)
        for ticket in active:
            self._deliver(ticket)
        return True

    def _chunk(self, active: Sequence[Ticket]) -> int | None:
        """Tokens of the next step: while replies are on their way, so few that these do not wait for long."""
        replies = sum(t.sequence is not None and t.sequence.pending == 1 for t in active)
        if replies in (0, len(active)) or not self._prompt_seconds:
            return None
        prompts = int(self.limits.step_seconds / self._prompt_seconds) // _LEAST_CHUNK * _LEAST_CHUNK
        return replies + max(prompts, _LEAST_CHUNK)

    def _expire(self) -> None:
        now = self.clock()
        for ticket in [*self.running, *self.queue]:
            if ticket.deadline is not None and now >= ticket.deadline:
                self._end(ticket, "timeout")

    def _admit_all(self) -> None:
        """As many as there are places and pages for; who has paused gives up its own for them."""
        while (ticket := self.queue.head()) is not None and ticket.may_start:
            if len(self.running) < self._most and self._admit(ticket):
                continue
            if (paused := self._paused()) is None:
                return
            self._preempt(paused)

    def _admit(self, ticket: Ticket) -> bool:
        """Give it the pages of all its known tokens, and of one more, if there are so many."""
        refused = (ticket.number, self.engine.cache.free_pages)
        if refused == self._refused and self.running:
            return False
        try:
            sequence = self._begin(ticket)
        except EdgeError as error:
            self._end(ticket, "error", error)
            return True
        try:
            self.engine.cache.reserve(sequence.cache_id, len(sequence.tokens) + 1, sequence.computed)
            if self.engine.cache.free_pages < len(self.running):  # the others would soon push it out again
                raise NoPagesError("")
        except NoPagesError as error:
            self.engine.forget(sequence)
            self._refused = refused
            if not self.running:  # somebody else has pages of this engine: nobody here could give any back
                self._end(ticket, "error", error)
            return False
        self._refused = None
        self.totals.cached += sequence.computed
        self.queue.start(ticket)
        self.running.append(ticket)
        self.running.sort(key=lambda t: t.number)
        if ticket.statistics.admitted is None:
            ticket.statistics.admitted = self.clock()
            ticket.statistics.cached_tokens = sequence.computed
        return True

    def _begin(self, ticket: Ticket) -> ScheduledSequence:
        """Its sequence, with what the prefix cache has of it."""
        request = ticket.request
        if ticket.generation is None:
            ticket.sequence = sequence = ScheduledSequence(self.engine.cache.open())
            constraint = None if request.constraint is None else request.constraint()
            ticket.generation = self.engine.begin(sequence, request.prompt_ids, request.params, constraint)
            ticket.stream = None if request.text is None else request.text()
            if ticket.generation.speculator is not None:
                ticket.statistics.speculated = ticket.generation.speculator.statistics
            return sequence
        assert ticket.sequence is not None
        if request.params.prompt_logprobs and not ticket.generation.taken:
            ticket.generation.prompt_logprobs.clear()
            ticket.sequence.logits_from = 0
        else:
            self.engine.reuse(ticket.sequence, ticket.sequence.tokens, len(request.prompt_ids))
        return ticket.sequence

    def _with_pages(self, active: list[Ticket]) -> list[Ticket]:
        """Those that take part in a step, each with the pages for its next token."""
        for ticket in list(active):
            while ticket in active and not self._reserve(ticket):
                victim = self._youngest(active)
                self._preempt(victim)
                if victim in active:
                    active.remove(victim)
        return active

    def _paused(self) -> Ticket | None:
        """The youngest whose reader does not read."""
        return next((t for t in reversed(self.running) if t.outbox.full), None)

    def _youngest(self, active: Sequence[Ticket]) -> Ticket:
        """Who gives way: one that has paused, else the youngest of these."""
        return self._paused() or active[-1]

    def _reserve(self, ticket: Ticket) -> bool:
        sequence, cache = ticket.sequence, self.engine.cache
        assert sequence is not None
        if sequence.pending > 1:  # it has had its prompt's since it was admitted
            return True
        for is_last in (False, True):
            try:
                cache.reserve(sequence.cache_id, sequence.computed + 1, sequence.computed)
                return True
            except NoPagesError:
                if not is_last:
                    self._give_back_spare()
        return False

    def _give_back_spare(self) -> None:
        """Pages that were taken for guesses or for tokens to come."""
        for ticket in self.running:
            if ticket.sequence is not None:
                self.engine.cache.truncate(ticket.sequence.cache_id, len(ticket.sequence.tokens))

    def _preempt(self, ticket: Ticket) -> None:
        assert ticket.sequence is not None
        self.engine.forget(ticket.sequence)
        self.running.remove(ticket)
        self.queue.interrupt(ticket)
        ticket.statistics.preemptions += 1

    def _deliver(self, ticket: Ticket) -> None:
        """Hand out the tokens that a step made ready, up to the one that ends the reply."""
        generation, stream = ticket.generation, ticket.stream
        assert generation is not None
        events, text, reason = list[TokenEvent](), "", None
        while generation.ready and reason is None:
            event = self.engine.take(generation)
            events.append(event)
            reason = event.finish_reason
            if stream is not None:
                if reason != "stop":
                    text += stream.push(event.token_id)
                if reason is not None and stream.stopped is None:
                    text += stream.finish()
                if stream.stopped is not None:
                    reason = "stop"
        if not events and generation.error is None:
            return
        of_prompt = tuple(generation.prompt_logprobs) if ticket.statistics.first_token is None else ()
        if events:
            self._observe(ticket, len(events))
        if reason is None and generation.error is not None:
            reason = "error"
        output = Output(tuple(events), text, reason, generation.error if reason == "error" else None, of_prompt)
        if reason is None:
            ticket.outbox.put(output)
        else:
            self._finish(ticket, output)

    def _observe(self, ticket: Ticket, count: int) -> None:
        statistics, now = ticket.statistics, self.clock()
        statistics.tokens += count
        self.totals.reply += count
        last, statistics.last_token = statistics.last_token, now
        if last is None:
            statistics.first_token = now
            self._observer.first_token(ticket)
        else:
            self._observer.tokens(count, now - last)

    def _end(self, ticket: Ticket, reason: str, error: EdgeError | None = None) -> None:
        self._finish(ticket, Output(finish_reason=reason, error=error))

    def _finish(self, ticket: Ticket, output: Output) -> None:
        """Its last output; its pages are free, and what it had computed stays in the prefix cache."""
        if ticket in self.running:
            self.running.remove(ticket)
        else:
            self.queue.remove(ticket)
        if ticket.sequence is not None:
            self.engine.cache.close(ticket.sequence.cache_id)
        ticket.sequence = ticket.generation = ticket.stream = None
        ticket.finish_reason, ticket.statistics.finished = output.finish_reason, self.clock()
        self._observer.finished(ticket)
        ticket.outbox.put(output)
