"""Measure prefill, decode and memory of an engine, one case after the other."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from edge.bench.batch import time_batch
from edge.bench.machine import MemoryUse, read_memory, reset_peak_memory
from edge.bench.samples import BenchCase, CaseResult, Repetition, SpeculationResult
from edge.engine import Engine
from edge.errors import EdgeError, UsageError
from edge.memory.measured import Compared
from edge.sampler import SamplingParams
from edge.speculation.statistics import Speculated

Clock = Callable[[], float]
Progress = Callable[[int, int, str], None]


class TokenEvent(Protocol):
    """One generated token."""

    @property
    def token_id(self) -> int: ...


class BenchEngine(Protocol):
    """What the benchmark needs of an engine. Batches and speculation need the real one."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[TokenEvent]: ...

    def describe(self) -> dict[str, str]: ...

    def ledger(self) -> Sequence[Compared]: ...


def measure_cases(
    engine: BenchEngine,
    cases: Sequence[BenchCase],
    *,
    repeat: int = 3,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> tuple[CaseResult, ...]:
    """Run each case once to warm up and `repeat` times under the clock, greedily and past any end token.

    Cases run from the smallest to the largest, so that memory the process keeps from a large case is not counted in a
    smaller one; the results are by batch and length. Every run has its own random prompts: a prefix cache cannot answer
    them. An engine that speculates runs each case without, too, in turns.
    `progress(done, total, label)` counts runs, warm-ups included. Raises before anything runs: UsageError for
    lengths below 1, EdgeError for a case over `engine.max_context`.
    """
    ordered = sorted(set(cases), key=lambda case: (case.batch * case.context, case.prompt_tokens))
    _check(ordered, repeat, engine.max_context)
    results = []
    for index, case in enumerate(ordered):

        def tell(run: int, base: int = index * (repeat + 1), label: str = case.label) -> None:
            if progress:
                what = f"repetition {run} of {repeat}" if run else "warm-up"
                progress(base + run, len(ordered) * (repeat + 1), f"{label}, {what}")

        results.append(_measure_case(engine, case, repeat, seed, clock, tell))
    if progress:
        progress(len(ordered) * (repeat + 1), len(ordered) * (repeat + 1), "done")
    return tuple(sorted(results, key=lambda r: (r.case.batch, r.case.prompt_tokens, r.case.new_tokens)))


def make_prompts(case: BenchCase, seed: int, run: int, vocab_size: int) -> list[list[int]]:
    """Random token ids of one run's sequences; they depend on the seed and the case, not on what else is measured."""
    return [
        np.random.default_rng([seed, case.prompt_tokens, case.new_tokens, case.batch, run, sequence])
        .integers(vocab_size, size=case.prompt_tokens)
        .tolist()
        for sequence in range(case.batch)
    ]


def hash_prompts(prompts: Sequence[Sequence[int]]) -> str:
    """sha256 over the ids as little-endian int32, each prompt after its length."""
    digest = hashlib.sha256()
    for ids in prompts:
        digest.update(np.asarray([len(ids), *ids], "<i4").tobytes())
    return digest.hexdigest()


def _measure_case(
    engine: BenchEngine, case: BenchCase, repeat: int, seed: int, clock: Clock, tell: Callable[[int], None]
) -> CaseResult:
    """The warm-up and all repetitions of one case."""
    peak_was_reset = reset_peak_memory()
    speculation = engine.speculation if isinstance(engine, Engine) else None
    before = Speculated()
    repetitions, plain = [], []
    for run in range(repeat + 1):
        tell(run)
        prompts = make_prompts(case, seed, run, engine.vocab_size)
        repetition, memory = _time_run(engine, prompts, case, clock, peak_was_reset)
        repetitions.append(repetition)
        if speculation is not None:
            plain.append(_time_batch(engine, prompts, case, clock, peak_was_reset, speculate=False)[0])
            if run == 0:
                before.merge(speculation.totals)
    found = None if speculation is None else _speculated(before, speculation.totals, plain[1:])
    hashed = hash_prompts(make_prompts(case, seed, 1, engine.vocab_size))
    return CaseResult(case, tuple(repetitions[1:]), memory, hashed, found)


def _speculated(before: Speculated, after: Speculated, plain: Sequence[Repetition]) -> SpeculationResult:
    """What was verified since the warm-up: the totals of an engine are those of its whole life."""
    lengths, depths = after.lengths - before.lengths, after.depths - before.depths
    by_depth = tuple(
        (
            sum(count for deepest, count in depths.items() if deepest >= depth),
            sum(count for emitted, count in lengths.items() if emitted > depth),
        )
        for depth in range(1, max(depths, default=0) + 1)
    )
    return SpeculationResult(
        steps=after.steps - before.steps,
        proposed=after.proposed - before.proposed,
        accepted=after.accepted - before.accepted,
        emitted=after.emitted - before.emitted,
        by_depth=by_depth,
        draft_s=round(after.draft_seconds - before.draft_seconds, 9),
        plain=tuple(plain),
    )


def _check(cases: Sequence[BenchCase], repeat: int, max_context: int) -> None:
    if not cases:
        raise UsageError("no context length was given: name at least one, for example 512.")
    if repeat < 1:
        raise UsageError(f"{repeat} repetitions measure nothing: ask for at least 1.")
    for case in cases:
        if min(case.prompt_tokens, case.new_tokens, case.batch) < 1:
            raise UsageError(
                f"a case of {case.prompt_tokens} prompt and {case.new_tokens} new tokens, {case.batch} at once, "
                "cannot run: each must be at least 1."
            )
        if case.context > max_context:
            raise EdgeError(
                f"a context of {case.prompt_tokens} prompt and {case.new_tokens} new tokens is over this "
                f"engine's limit of {max_context} tokens: ask for shorter contexts or raise the limit."
            )


def _time_run(
    engine: BenchEngine, prompts: Sequence[Sequence[int]], case: BenchCase, clock: Clock, peak_was_reset: bool
) -> tuple[Repetition, MemoryUse]:
    """Time one run of a case; memory is read at its last token, while the whole context is still held."""
    if case.batch > 1:
        return _time_batch(engine, prompts, case, clock, peak_was_reset)
    arrivals: list[float] = []
    start = clock()
    stream = engine.generate(prompts[0], _greedy(case))
    for _ in stream:
        arrivals.append(clock())
        if len(arrivals) == case.new_tokens:
            break
    memory = read_memory(peak_was_reset)
    surplus = next(stream, None) is not None
    if surplus or len(arrivals) < case.new_tokens:
        _refuse_count(f"more than {case.new_tokens}" if surplus else f"only {len(arrivals)}", case)
    gaps = tuple(_rounded(b - a) for a, b in pairwise(arrivals))
    return Repetition(_rounded(arrivals[0] - start), gaps), memory


def _time_batch(
    engine: BenchEngine,
    prompts: Sequence[Sequence[int]],
    case: BenchCase,
    clock: Clock,
    peak_was_reset: bool,
    *,
    speculate: bool = True,
) -> tuple[Repetition, MemoryUse]:
    """The same of sequences that the engine steps together, or of one that it decodes plainly."""
    assert isinstance(engine, Engine)
    run = time_batch(engine, prompts, _greedy(case), clock, peak_was_reset=peak_was_reset, speculate=speculate)
    if short := [len(gaps) + 1 for gaps in run.intervals if len(gaps) + 1 != case.new_tokens]:
        _refuse_count(f"only {short[0]}", case)
    repetition = Repetition(
        _rounded(run.first - run.start),
        tuple(_rounded(gap) for gaps in run.intervals for gap in gaps),
        tuple(map(_rounded, run.first_tokens)),
        _rounded(run.end - run.first),
    )
    return repetition, run.memory


def _greedy(case: BenchCase) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=case.new_tokens, ignore_eos=True)


def _refuse_count(count: str, case: BenchCase) -> None:
    raise EdgeError(
        f"the engine generated {count} tokens where {case.new_tokens} were asked for: "
        "its figures would not be comparable."
    )


def _rounded(seconds: float) -> float:
    """Nanoseconds are the clock's resolution; more digits would only swell the report."""
    return round(seconds, 9)
