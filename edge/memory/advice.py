"""What fits at most, and what would help most cheaply where a run does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from edge.memory.fit import largest, largest_context
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


def largest_of_each(ledger: Ledger, subject: Subject, run: Run, budget: int) -> Largest:
    """Context, sequences and chunk at most."""

    def fits(**changed: Any) -> bool:
        return total(ledger(subject, replace(run, **changed))) <= budget

    context = largest_context(lambda r: ledger(subject, r), replace(run, context=MOST_CONTEXT), budget)
    sequences = largest(lambda n: fits(sequences=n), 0, MOST_SEQUENCES)
    return Largest(context, sequences, max((n for n in _powers(MOST_CHUNK) if fits(chunk=n)), default=0))


def changes(ledger: Ledger, subject: Subject, run: Run, budget: int, *, least: int | None) -> Iterator[Change]:
    """The cheapest first, each on top of the others, until the run fits; what saves nothing is left out."""
    before = total(ledger(subject, run))
    for option, of_subject, of_run in _candidates(subject, run, least):
        changed = replace(subject, **of_subject), replace(run, **of_run)
        after = total(ledger(*changed))
        if after >= before:
            continue
        subject, run = changed
        yield Change(option, before - after, after, after <= budget)
        before = after
        if after <= budget:
            return
    if (fitting := largest_context(lambda r: ledger(subject, r), run, budget)) > 0:
        after = total(ledger(subject, replace(run, context=fitting)))
        yield Change(f"--context {fitting}", before - after, after, True)


def _candidates(subject: Subject, run: Run, least: int | None) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """An option and the fields of subject and run that it changes, in the order of what they cost the user: first
    nothing that can be seen, last the wish itself."""
    weights = subject.weights
    if subject.kv != "int8":
        yield "--kv int8", {"types": {**subject.types, "kv": "int8"}}, {}
    if BITS[weights.kind] < 16 and weights.head != "int4":
        yield "--head int4", {"weights": replace(weights, head="int4")}, {}
    for chunk in (c for c in reversed(list(_powers(run.chunk // 2))) if c >= _LEAST_CHUNK):
        yield f"--chunk {chunk}", {}, {"chunk": chunk}
    if least is not None and run.resident is None and least < run.pages:
        yield "--offload FOLDER", {}, {"resident": least}
    if BITS[weights.kind] == 16:
        yield "--weights w4a16", {"weights": replace(weights, kind="w4a16", head="int4")}, {}
    if run.sequences > 1:
        yield "--batch 1", {}, {"sequences": 1}


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`."""
    power = 1
    while power <= most:
        yield power
        power *= 2
