"""Several sequences through the real engine's steps: what is timed is what runs, and what was guessed is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge.bench.batch import time_batch
from edge.bench.measure import make_prompts, measure_cases
from edge.bench.samples import BenchCase
from edge.engine import Engine, open_engine
from edge.executor import StepBatch, StepResult
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.speculation.statistics import Speculated
from tests.bench_samples import batch_result
from tests.wrapped_executor import WrappedExecutor

CHUNK = 64


class Watching(WrappedExecutor):
    """Keeps the tokens of each sequence of each step; `clock` is the number of steps."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.steps: list[list[int]] = []

    def step(self, batch: StepBatch) -> StepResult:
        self.steps.append(np.diff(batch.query_start).tolist())
        return super().step(batch)

    def clock(self) -> float:
        return float(len(self.steps))


def open_tiny(bundle: Path, sequences: int = 4, speculative: str = "off") -> Engine:
    options = EngineOptions(
        context=256, chunk=CHUNK, threads=1, sequences=sequences, prefix_cache=False, speculative=speculative
    )
    return open_engine(bundle, options)


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def test_prompts_are_computed_in_order_and_then_all_sequences_share_every_step(tiny_bundle: Path) -> None:
    engine = open_tiny(tiny_bundle)
    executor = Watching(engine)
    prompts = make_prompts(BenchCase(CHUNK, 5, 3), 0, 1, engine.vocab_size)
    run = time_batch(engine, prompts, greedy(5), executor.clock, peak_was_reset=False)
    assert executor.steps == [[CHUNK]] * 3 + [[1, 1, 1]] * 4
    assert (run.first_tokens, run.start, run.first, run.end) == ((1, 2, 3), 0, 3, 7)
    assert run.intervals == ((1, 1, 1, 1),) * 3, "waiting for the others' prompts is in no interval"
    assert engine.cache.free_pages == engine.cache.num_pages, "pages were given back"


def test_short_prompts_share_a_step_of_the_prefill(tiny_bundle: Path) -> None:
    engine = open_tiny(tiny_bundle)
    executor = Watching(engine)
    prompts = make_prompts(BenchCase(CHUNK // 4, 2, 4), 0, 1, engine.vocab_size)
    run = time_batch(engine, prompts, greedy(2), executor.clock, peak_was_reset=False)
    assert executor.steps == [[CHUNK // 4] * 4, [1] * 4]
    assert run.first_tokens == (1, 1, 1, 1)


def test_pages_are_given_back_after_an_error_too(tiny_bundle: Path) -> None:
    engine = open_tiny(tiny_bundle)
    with pytest.raises(Exception, match="outside the vocabulary"):
        time_batch(engine, [[1, 2], [10**6]], greedy(2), lambda: 0.0, peak_was_reset=False)
    assert engine.cache.free_pages == engine.cache.num_pages


def test_a_batch_is_measured_beside_single_sequences(tiny_bundle: Path) -> None:
    engine = open_tiny(tiny_bundle)
    single, several = measure_cases(engine, [BenchCase(32, 4, 3), BenchCase(32, 4)], repeat=2)
    assert (single.case.batch, several.case.batch) == (1, 3)
    for run in several.repetitions:
        assert len(run.first_tokens_s) == 3 and len(run.intervals_s) == 3 * 3
        assert max(run.first_tokens_s) <= run.ttft_s
        each = np.reshape(run.intervals_s, (3, 3)).sum(axis=1)
        assert run.decode_s == pytest.approx(each.max(), abs=1e-3)
    assert single.prompts_sha256 != several.prompts_sha256


def test_figures_of_a_batch_count_all_sequences() -> None:
    result = batch_result(128, 4, (0.5, 1.0, 1.5, 2.0), 0.02, steps=10)
    assert result.prefill_tok_s is not None and result.prefill_tok_s.median == pytest.approx(4 * 128 / 2.0)
    assert result.decode_tok_s is not None and result.decode_tok_s.median == pytest.approx(4 / 0.02)
    assert result.ttft_percentiles_s[50] == pytest.approx(1.25) and result.ttft_s.median == 2.0
    assert result.interval_percentiles_s == {p: pytest.approx(0.02) for p in (50, 90, 99)}


def test_speculation_is_counted_and_plain_decoding_measured_beside_it(tiny_bundle: Path) -> None:
    engine = open_tiny(tiny_bundle, speculative="lookup")
    assert engine.speculation is not None
    case = BenchCase(16, 200)
    (result,) = measure_cases(engine, [case], repeat=2)
    done = result.speculation
    assert done is not None and len(done.plain) == len(result.repetitions) == 2
    assert done.emitted == done.accepted + done.steps
    assert sum(kept for _, kept in done.by_depth) == done.accepted
    if done.steps:
        assert done.by_depth[0][0] == done.steps and done.draft_s > 0
        assert result.draft_share is not None and 0 < result.draft_share < 1
    # the warm-up's trees are not counted
    assert done.steps < engine.speculation.totals.steps
    assert all(0 <= share <= 1 for share in done.depth_shares)


def test_plain_runs_of_a_speculating_engine_guess_nothing(tiny_bundle: Path) -> None:
    engine = open_tiny(tiny_bundle, speculative="lookup")
    executor = Watching(engine)
    prompt = [7, 8, 9] * 20  # a lookup has much to propose
    time_batch(engine, [prompt], greedy(12), executor.clock, peak_was_reset=False, speculate=False)
    assert executor.steps[1:] == [[1]] * 11


def test_depths_of_trees_are_counted() -> None:
    done, other = Speculated(), Speculated()
    done.add(proposed=5, emitted=3, depth=2)
    other.add(proposed=4, emitted=5)
    done.merge(other)
    assert dict(done.depths) == {2: 1, 4: 1}
    assert done.values()["depths"] == {"2": 1, "4": 1}
