"""What a benchmark measured: raw samples of its cases, and the figures that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge.bench.machine import MemoryUse
from edge.bench.statistics import LEVEL, t_quantile
from edge.telemetry.figures import CaseTelemetry

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class BenchCase:
    """One workload: `batch` sequences at once, each a prompt of `prompt_tokens`, then `new_tokens` generated ones."""

    prompt_tokens: int
    new_tokens: int
    batch: int = 1

    @property
    def context(self) -> int:
        """Tokens that one sequence holds at its end, prompt and reply together."""
        return self.prompt_tokens + self.new_tokens

    @property
    def label(self) -> str:
        """For sentences and legends: '2,048 tokens', '2,048 tokens x 4'."""
        return f"{self.prompt_tokens:,} tokens" + (f" x {self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True)
class Repetition:
    """One timed run, in seconds.

    ttft_s: from the request to the first token; of several sequences, to the last one's. intervals_s: the gap before
    each further token, sequence after sequence. first_tokens_s: when each of several sequences had its first token.
    decode_s: from all first tokens to the last token of several sequences; None: the sum of the one's intervals.
    """

    ttft_s: float
    intervals_s: tuple[float, ...]
    first_tokens_s: tuple[float, ...] = ()
    decode_s: float | None = None

    @property
    def ttfts_s(self) -> tuple[float, ...]:
        """Time to first token of every sequence."""
        return self.first_tokens_s or (self.ttft_s,)

    @property
    def decoding_s(self) -> float:
        """Wall time of the decode phase."""
        return sum(self.intervals_s) if self.decode_s is None else self.decode_s


@dataclass(frozen=True)
class Summary:
    """A figure over the repetitions; `interval` is the mean's 95 % t interval (None for one repetition)."""

    median: float
    low: float
    high: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class SpeculationResult:
    """What was guessed in a case's timed runs, and the same case decoded plainly.

    steps: verified trees; proposed, accepted: their nodes; emitted: tokens that came of them, one more a step than were
    accepted. by_depth: for each depth of a tree from 1 on, (trees that went so deep, those accepted so deep). draft_s:
    seconds spent on proposals; plain: timed runs without speculation, which took turns with the others.
    """

    steps: int
    proposed: int
    accepted: int
    emitted: int
    by_depth: tuple[tuple[int, int], ...]
    draft_s: float
    plain: tuple[Repetition, ...]

    @property
    def tokens_per_step(self) -> float | None:
        """Emitted tokens a verified step; None if nothing was verified."""
        return self.emitted / self.steps if self.steps else None

    @property
    def accepted_share(self) -> float | None:
        """Accepted of the proposed tokens."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def depth_shares(self) -> tuple[float, ...]:
        """For each depth, the share of the trees that went so deep of which that much was accepted."""
        return tuple(accepted / tried for tried, accepted in self.by_depth if tried)

    @property
    def plain_decode_tok_s(self) -> Summary | None:
        """Decode speed of the plain runs, as `CaseResult.decode_tok_s`."""
        return _rate([(len(r.intervals_s), r.decoding_s) for r in self.plain])


@dataclass(frozen=True)
class CaseResult:
    """All raw samples of one case and the figures that follow from them.

    prompts_sha256: of the first timed run's prompts, "" in older reports; equal hashes are equal prompts. telemetry: if
    sensors were read.
    """

    case: BenchCase
    repetitions: tuple[Repetition, ...]
    memory: MemoryUse
    prompts_sha256: str = ""
    speculation: SpeculationResult | None = None
    telemetry: CaseTelemetry | None = None

    @property
    def ttft_s(self) -> Summary:
        """Time to first token, seconds: prefill of the whole prompt, or of all prompts, plus sampling once."""
        return summarise([r.ttft_s for r in self.repetitions])

    @property
    def prefill_tok_s(self) -> Summary | None:
        """Prompt tokens of all sequences / TTFT; None if the clock saw no time pass."""
        return _rate([(self.case.batch * self.case.prompt_tokens, r.ttft_s) for r in self.repetitions])

    @property
    def decode_tok_s(self) -> Summary | None:
        """Tokens after the first, of all sequences / time of the decode phase.

        None for a single token or if the clock saw no time pass.
        """
        return _rate([(len(r.intervals_s), r.decoding_s) for r in self.repetitions])

    @property
    def intervals_s(self) -> tuple[float, ...]:
        """The inter-token intervals of all sequences and repetitions, pooled."""
        return tuple(interval for r in self.repetitions for interval in r.intervals_s)

    @property
    def interval_percentiles_s(self) -> dict[int, float] | None:
        """p50, p90 and p99 of the pooled inter-token intervals, linearly interpolated; None without any."""
        return _percentiles(self.intervals_s)

    @property
    def draft_share(self) -> float | None:
        """Share of the decode phase that went into proposals; None without speculation or if no time passed."""
        seconds = sum(r.decoding_s for r in self.repetitions)
        return None if self.speculation is None or seconds <= 0 else self.speculation.draft_s / seconds

    @property
    def ttft_percentiles_s(self) -> dict[int, float]:
        """p50, p90 and p99 of the time to first token over all sequences and repetitions."""
        found = _percentiles([ttft for r in self.repetitions for ttft in r.ttfts_s])
        assert found is not None  # a result has at least one repetition
        return found


def _percentiles(values: Sequence[float]) -> dict[int, float] | None:
    if not values:
        return None
    return dict(zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True))


def _rate(samples: Sequence[tuple[int, float]]) -> Summary | None:
    """Tokens per second over (tokens, seconds) samples; None if there are none, or any has no tokens or duration."""
    if not samples or any(tokens == 0 or seconds <= 0 for tokens, seconds in samples):
        return None
    return summarise([tokens / seconds for tokens, seconds in samples])


def summarise(values: Sequence[float]) -> Summary:
    """A figure's values over the repetitions, of which there is at least one."""
    return Summary(float(np.median(values)), min(values), max(values), _mean_interval(values))


def _mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean: mean +- t(0.975, n-1) s / sqrt(n)."""
    if len(values) < 2:
        return None
    half = t_quantile(1 - LEVEL / 2, len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return mean - half, mean + half
