"""What fits at most, and what would help most cheaply where a run does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from edge.kv_cache import pages_for
from edge.memory.attended import least_slots
from edge.memory.fit import largest_context
from edge.memory.ledger import Line, Subject, total
from edge.memory.run import Run
from edge.memory.weights import BITS

Ledger = Callable[[Subject, Run], tuple[Line, ...]]
MOST_CONTEXT, MOST_SEQUENCES, MOST_CHUNK = 1 << 20, 256, 8192
_LEAST_CHUNK = 128


@dataclass(frozen=True)
class Largest:
    """The most of each that fits while the others stay as they are; 0: none. chunk: prompt tokens a step."""

    context: int
    sequences: int
    chunk: int


@dataclass(frozen=True)
class Change:
    """One change, made after those before it: what it saves, what the run takes then, and whether that fits."""

    option: str
    saves: int
    total: int
    fits: bool


def largest(ledger: Ledger, subject: Subject, run: Run, budget: int) -> Largest:
    """Context, sequences and chunk at most."""

    def fits(other: Run) -> bool:
        return total(ledger(subject, other)) <= budget

    context = largest_context(lambda r: ledger(subject, r), replace(run, context=MOST_CONTEXT), budget)
    sequences = _most(lambda n: fits(replace(run, sequences=n)), MOST_SEQUENCES)
    chunks = [chunk for chunk in _powers(MOST_CHUNK) if fits(replace(run, chunk=chunk))]
    return Largest(context, sequences, max(chunks, default=0))


def changes(ledger: Ledger, subject: Subject, run: Run, budget: int, *, may_offload: bool) -> Iterator[Change]:
    """The cheapest first, each on top of the others, until the run fits; what saves nothing is left out."""
    before = total(ledger(subject, run))
    for option, new_subject, new_run in _candidates(subject, run, may_offload):
        after = total(ledger(new_subject(subject), new_run(run)))
        if after >= before:
            continue
        subject, run = new_subject(subject), new_run(run)
        yield Change(option, before - after, after, after <= budget)
        before = after
        if after <= budget:
            return
    if (fitting := largest_context(lambda r: ledger(subject, r), run, budget)) > 0:
        after = total(ledger(subject, replace(run, context=fitting)))
        yield Change(f"--context {fitting}", before - after, after, True)


def _candidates(
    subject: Subject, run: Run, may_offload: bool
) -> Iterator[tuple[str, Callable[[Subject], Subject], Callable[[Run], Run]]]:
    """In the order of what they cost the user: first nothing that can be seen, last the wish itself."""

    def same_run(r: Run) -> Run:
        return r

    def same_subject(s: Subject) -> Subject:
        return s

    if subject.kv != "int8":
        yield "--kv int8", lambda s: replace(s, types={**s.types, "kv": "int8"}), same_run
    if BITS[subject.weights.kind] < 16 and subject.weights.head != "int4":
        yield "--head int4", lambda s: replace(s, weights=replace(s.weights, head="int4")), same_run
    for chunk in (c for c in reversed(list(_powers(run.chunk // 2))) if c >= _LEAST_CHUNK):
        yield f"--chunk {chunk}", same_subject, lambda r, chunk=chunk: replace(r, chunk=chunk)  # type: ignore[misc]
    sparse = subject.config.sparse
    if may_offload and sparse is not None and run.resident is None:
        slots = least_slots(subject.config, sparse, run.context)
        if slots < pages_for(run.context):
            yield "--offload FOLDER", same_subject, lambda r: replace(r, resident=slots * r.sequences)
    if BITS[subject.weights.kind] == 16:
        low = replace(subject.weights, kind="w4a16", head="int4")
        yield "--weights w4a16", lambda s: replace(s, weights=low), same_run
    if run.sequences > 1:
        yield "--batch 1", same_subject, lambda r: replace(r, sequences=1)


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`."""
    power = 1
    while power <= most:
        yield power
        power *= 2


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` that fits, as all below it do; 0 if not even 1."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
