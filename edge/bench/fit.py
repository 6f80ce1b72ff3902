"""Which cases a machine can hold: those it cannot are reported with what they need, and the others run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge.bench.samples import BenchCase
from edge.engine import Engine
from edge.errors import EdgeError, NoRoomError
from edge.kv_cache import pages_for
from edge.plan import MIB


@dataclass(frozen=True)
class Skipped:
    """A case that did not run, what it needs and what there is."""

    case: BenchCase
    needs: str
    has: str

    @property
    def reason(self) -> str:
        """As a sentence's end."""
        return f"does not fit: needs {self.needs}, has {self.has}"


OpenEngine = Callable[[int, int], Engine]  # (tokens of the context, sequences at once) -> an engine for them


def open_fitting(
    cases: Sequence[BenchCase], open_engine: OpenEngine
) -> tuple[Engine, tuple[BenchCase, ...], tuple[Skipped, ...]]:
    """An engine for as many of the cases as fit, these, and the others; EdgeError if none fits."""
    left, skipped = list(cases), list[Skipped]()
    while True:
        try:
            engine = open_engine(max(case.context for case in left), max(case.batch for case in left))
        except NoRoomError as error:
            too_long = [case for case in left if case.context > error.fitting]
            left = [case for case in left if case.context <= error.fitting]
            if not too_long or not left:
                raise
            skipped += [_for_lack(case, error) for case in too_long]
            continue
        fitting, others = split(engine, left)
        return engine, fitting, (*skipped, *others)


def split(engine: Engine, cases: Sequence[BenchCase]) -> tuple[tuple[BenchCase, ...], tuple[Skipped, ...]]:
    """Cases that an open engine can run, and the others; EdgeError if it can run none."""
    skipped = [found for case in cases if (found := _lack(engine, case)) is not None]
    if len(skipped) == len(cases):
        first = skipped[0]
        raise EdgeError(
            f"no case can run here; {first.case.label} with {first.case.new_tokens} new ones {first.reason}; ask for "
            "less, or give more --memory or --context"
        )
    refused = {found.case for found in skipped}
    return tuple(case for case in cases if case not in refused), tuple(skipped)


def _for_lack(case: BenchCase, error: NoRoomError) -> Skipped:
    if error.budget is None or error.needed is None:
        return Skipped(case, f"a context of {case.context:,} tokens", f"{error.fitting:,} ({error.limit})")
    return Skipped(case, f"{_mib(error.needed(case.context))} of memory", _mib(error.budget))


def _lack(engine: Engine, case: BenchCase) -> Skipped | None:
    """What an engine lacks for a case."""
    sequences = min(engine.plan.run.sequences, engine.chunk // 2 or 1)
    if case.context > engine.max_context:
        return Skipped(case, f"a context of {case.context:,} tokens", f"{engine.max_context:,}")
    if case.batch > sequences:
        return Skipped(case, f"{case.batch} sequences at once", f"{sequences}")
    pages = case.batch * pages_for(case.context)
    if pages > engine.plan.num_pages:
        return Skipped(case, f"{pages:,} KV pages", f"{engine.plan.num_pages:,}")
    return None


def _mib(size: int) -> str:
    return f"{-(-size // MIB):,} MiB"
