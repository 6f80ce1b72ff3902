"""Measure prefill, decode and memory of an engine, one context length after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Protocol

import numpy as np

from edge.bench.machine import MemoryUse, read_memory, reset_peak_memory
from edge.errors import EdgeError, UsageError
from edge.memory.measured import Compared
from edge.sampler import SamplingParams
from edge.telemetry.figures import CaseTelemetry, Run

PERCENTILES = (50, 90, 99)
# two-sided 95 % quantiles of Student's t for 1..9 degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Clock = Callable[[], float]
Progress = Callable[[int, int, str], None]


class TokenEvent(Protocol):
    """One generated token."""

    @property
    def token_id(self) -> int: ...


class BenchEngine(Protocol):
    """What the benchmark needs of an engine."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[TokenEvent]: ...

    def describe(self) -> dict[str, str]: ...

    def ledger(self) -> Sequence[Compared]: ...


class Meter(Protocol):
    """What reads the machine's sensors meanwhile, with the benchmark's clock (edge/telemetry/recorder.py)."""

    def case(self, prompt_tokens: int, decode_tokens: int, runs: Sequence[Run]) -> CaseTelemetry: ...


@dataclass(frozen=True)
class BenchCase:
    """One workload: a prompt of `prompt_tokens`, then `new_tokens` generated tokens."""

    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Repetition:
    """One timed run, in seconds: time to first token, then the gap before each further token."""

    ttft_s: float
    intervals_s: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """A figure over the repetitions; `interval` is the mean's 95 % t interval (None for one repetition)."""

    median: float
    low: float
    high: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class CaseResult:
    """All raw samples of one case and the figures that follow from them; `telemetry` if sensors were read."""

    case: BenchCase
    repetitions: tuple[Repetition, ...]
    memory: MemoryUse
    telemetry: CaseTelemetry | None = None

    @property
    def ttft_s(self) -> Summary:
        """Time to first token, seconds: prefill of the whole prompt plus sampling once."""
        return _summary([r.ttft_s for r in self.repetitions])

    @property
    def prefill_tok_s(self) -> Summary | None:
        """prompt_tokens / TTFT; None if the clock saw no time pass."""
        return _rate([(self.case.prompt_tokens, r.ttft_s) for r in self.repetitions])

    @property
    def decode_tok_s(self) -> Summary | None:
        """(n - 1) / sum of intervals; None for a single token or if the clock saw no time pass."""
        return _rate([(len(r.intervals_s), sum(r.intervals_s)) for r in self.repetitions])

    @property
    def intervals_s(self) -> tuple[float, ...]:
        """The inter-token intervals of all repetitions, pooled."""
        return tuple(interval for r in self.repetitions for interval in r.intervals_s)

    @property
    def interval_percentiles_s(self) -> dict[int, float] | None:
        """p50, p90 and p99 of the pooled inter-token intervals, linearly interpolated; None without any."""
        if not self.intervals_s:
            return None
        return dict(zip(PERCENTILES, np.percentile(self.intervals_s, PERCENTILES).tolist(), strict=True))


def measure_cases(
    engine: BenchEngine,
    cases: Sequence[BenchCase],
    *,
    repeat: int = 3,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
    meter: Meter | None = None,
) -> tuple[CaseResult, ...]:
    """Run each case once to warm up and `repeat` times under the clock, greedily and past any end token.

    Cases run from the shortest to the longest, so that memory the process keeps from a long case is not
    counted in a shorter one. Every run has its own random prompt: a prefix cache cannot answer it.
    `progress(done, total, label)` counts runs, warm-ups included. Raises before anything runs: UsageError for
    lengths below 1, EdgeError for a case over `engine.max_context`.
    """
    ordered = sorted(cases, key=lambda case: (case.prompt_tokens, case.new_tokens))
    _check(ordered, repeat, engine.max_context)
    runs = repeat + 1
    results = []
    for index, case in enumerate(ordered):
        peak_was_reset = reset_peak_memory()
        repetitions, windows = [], []
        for run in range(runs):
            if progress:
                what = f"repetition {run} of {repeat}" if run else "warm-up"
                progress(index * runs + run, len(ordered) * runs, f"{case.prompt_tokens} tokens, {what}")
            draw = np.random.default_rng([seed, index, run])
            prompt = draw.integers(engine.vocab_size, size=case.prompt_tokens).tolist()
            repetition, memory, window = _time_run(engine, prompt, case.new_tokens, clock, peak_was_reset)
            repetitions.append(repetition)
            windows.append(window)
        telemetry = meter.case(case.prompt_tokens, case.new_tokens - 1, windows[1:]) if meter else None
        results.append(CaseResult(case, tuple(repetitions[1:]), memory, telemetry))
    if progress:
        progress(len(ordered) * runs, len(ordered) * runs, "done")
    return tuple(results)


def _check(cases: Sequence[BenchCase], repeat: int, max_context: int) -> None:
    if not cases:
        raise UsageError("no context length was given: name at least one, for example 512.")
    if repeat < 1:
        raise UsageError(f"{repeat} repetitions measure nothing: ask for at least 1.")
    for case in cases:
        if case.prompt_tokens < 1 or case.new_tokens < 1:
            raise UsageError(
                f"a case of {case.prompt_tokens} prompt and {case.new_tokens} new tokens cannot run: "
                "both must be at least 1."
            )
        if case.prompt_tokens + case.new_tokens > max_context:
            raise EdgeError(
                f"a context of {case.prompt_tokens} prompt and {case.new_tokens} new tokens is over this "
                f"engine's limit of {max_context} tokens: ask for shorter contexts or raise the limit."
            )


def _time_run(
    engine: BenchEngine, prompt: Sequence[int], new_tokens: int, clock: Clock, peak_was_reset: bool
) -> tuple[Repetition, MemoryUse, Run]:
    """Time one generation; memory is read at its last token, while the whole context is still held."""
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    arrivals: list[float] = []
    start = clock()
    stream = engine.generate(prompt, params)
    for _ in stream:
        arrivals.append(clock())
        if len(arrivals) == new_tokens:
            break
    memory = read_memory(peak_was_reset)
    surplus = next(stream, None) is not None
    if surplus or len(arrivals) < new_tokens:
        count = f"more than {new_tokens}" if surplus else f"only {len(arrivals)}"
        raise EdgeError(
            f"the engine generated {count} tokens where {new_tokens} were asked for: "
            "its figures would not be comparable."
        )
    # nanoseconds are the clock's resolution; more digits would only swell the report
    gaps = tuple(round(b - a, 9) for a, b in pairwise(arrivals))
    return Repetition(round(arrivals[0] - start, 9), gaps), memory, Run(start, arrivals[0], arrivals[-1])


def _rate(samples: Sequence[tuple[int, float]]) -> Summary | None:
    """Tokens per second over (tokens, seconds) samples; None if any of them has no tokens or no duration."""
    if any(tokens == 0 or seconds <= 0 for tokens, seconds in samples):
        return None
    return _summary([tokens / seconds for tokens, seconds in samples])


def _summary(values: Sequence[float]) -> Summary:
    return Summary(float(np.median(values)), min(values), max(values), _mean_interval(values))


def _mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean: mean +- t(0.975, n-1) s / sqrt(n)."""
    if len(values) < 2:
        return None
    half = student_t_95(len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return mean - half, mean + half


def student_t_95(degrees: int) -> float:
    """97.5 % quantile of Student's t: table, then the Cornish-Fisher expansion around the normal quantile."""
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
