"""Several replies at once through the engine's own steps, without server or queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edge.bench.machine import MemoryUse, read_memory
from edge.engine import Engine
from edge.generation import Generation
from edge.sampler import SamplingParams
from edge.scheduler import Sequence as ScheduledSequence


@dataclass(frozen=True)
class Batched:
    """One run of several sequences. start, first, end: readings of the clock at the request, when the last sequence
    had its first token, and at the last token of all. first_tokens: seconds after start, of each sequence. intervals:
    seconds before each further token, of each sequence. memory: at the end, all contexts still held.
    """

    start: float
    first: float
    end: float
    first_tokens: tuple[float, ...]
    intervals: tuple[tuple[float, ...], ...]
    memory: MemoryUse


@dataclass
class _Reply:
    """One sequence of a run: when it had its first token, and the gaps so far."""

    generation: Generation
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    done: bool = False


def time_batch(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    clock: Callable[[], float],
    *,
    peak_was_reset: bool,
    speculate: bool = True,
) -> Batched:
    """Prefill all prompts, then decode all replies together; greedy settings and lengths are in `params`.

    Two phases, so that each has a speed of its own: a sequence whose prompt is computed waits with its first token
    until all have one, and every decode step has all sequences. Prompts share the chunks of the prefill in order, so
    that later ones wait for earlier ones, as requests that arrive together do. speculate: False decodes plainly.
    """
    sequences = [ScheduledSequence(engine.cache.open()) for _ in prompts]
    try:
        start = clock()
        replies = [_Reply(engine.begin(s, ids, params)) for s, ids in zip(sequences, prompts, strict=True)]
        if not speculate:
            for reply in replies:
                reply.generation.speculator = None
        _prefill(engine, replies, clock)
        first = clock()
        _decode(engine, replies, first, clock)
        end = clock()
        memory = read_memory(peak_was_reset)
    finally:
        for sequence in sequences:
            engine.cache.close(sequence.cache_id)
    first_tokens = tuple(reply.first - start for reply in replies if reply.first is not None)
    return Batched(start, first, end, first_tokens, tuple(tuple(reply.gaps) for reply in replies), memory)


def _prefill(engine: Engine, replies: Sequence[_Reply], clock: Callable[[], float]) -> None:
    """Until every reply has its first token, which it keeps."""
    while waiting := [reply for reply in replies if reply.first is None]:
        _step(engine, waiting)
        now = clock()
        for reply in waiting:
            if reply.generation.ready:
                reply.first = now


def _decode(engine: Engine, replies: Sequence[_Reply], start: float, clock: Callable[[], float]) -> None:
    """Until every reply is at its end; a step's tokens come when it is done."""
    for reply in replies:
        reply.last = start
        reply.done = engine.take(reply.generation).finish_reason is not None
    while active := [reply for reply in replies if not reply.done]:
        _step(engine, active)
        now = clock()
        for reply in active:
            while reply.generation.ready:
                reply.gaps.append(now - reply.last)
                reply.last = now
                reply.done = engine.take(reply.generation).finish_reason is not None


def _step(engine: Engine, replies: Sequence[_Reply]) -> None:
    engine.step([reply.generation for reply in replies])
    for reply in replies:
        if reply.generation.error is not None:
            raise reply.generation.error
