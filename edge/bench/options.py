"""What a benchmark is to do, in one object from the command to the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge.bench.fit import Skipped
from edge.bench.samples import BenchCase


@dataclass(frozen=True)
class PeerRow:
    """Another engine's speed at a context; None where it was not measured.

    `prompt_tokens`: of the prompt, and in the cache when decoding begins. Speeds are of all `batch` sequences together.
    `machine` and `source` (the tool, its version, the file) are "" if unknown; `note` says what a figure leaves out.
    """

    name: str
    prompt_tokens: int
    prefill_tok_s: float | None
    decode_tok_s: float | None
    batch: int = 1
    machine: str = ""
    source: str = ""
    note: str = ""


@dataclass(frozen=True)
class WorkloadFacts:
    """Which workload a report is of: its name, and what its file says of itself."""

    name: str
    description: str
    source: str
    model: str


@dataclass(frozen=True)
class BenchOptions:
    """cases: what to measure, `repeat` times after a warm-up, with prompts of this `seed`. skipped: cases that do not
    fit. peers: rows of other engines. gate: whether to check the engine's tokens, too.
    """

    cases: Sequence[BenchCase]
    repeat: int = 3
    seed: int = 0
    peers: Sequence[PeerRow] = ()
    skipped: Sequence[Skipped] = ()
    workload: WorkloadFacts | None = None
    gate: bool = True
