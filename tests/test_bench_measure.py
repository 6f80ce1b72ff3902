"""The benchmark measures what it says, and says what it was measured on."""

from __future__ import annotations

import ctypes
import getpass
import json
import math
import re
import socket
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bench import machine
from edge.bench.html import render_html
from edge.bench.machine import CpuClock, MemoryUse, describe_machine
from edge.bench.measure import measure_cases
from edge.bench.options import BenchOptions
from edge.bench.report import execution, notes, run_bench
from edge.bench.samples import BenchCase
from edge.errors import EdgeError, UsageError
from edge.sampler import SamplingParams
from tests.bench_samples import CPU_ENGINE, HERE, MIB, Event, FakeEngine, case_result, positive, sample_report

# ---- measuring ---------------------------------------------------------------------------------------------


def test_figures_are_exact_on_a_known_clock_and_the_warm_up_is_not_counted() -> None:
    engine = FakeEngine()
    (short, long) = measure_cases(engine, [BenchCase(512, 3), BenchCase(128, 5)], repeat=2, clock=engine.clock)

    assert short.case == BenchCase(128, 5), "the shorter case runs first"
    assert [r.ttft_s for r in short.repetitions] == [0.128, 0.128]
    assert short.repetitions[0].intervals_s == (0.25, 0.5, 0.25, 0.5)
    assert short.prefill_tok_s is not None and short.prefill_tok_s.median == pytest.approx(1000)
    assert short.decode_tok_s is not None and short.decode_tok_s.median == pytest.approx(4 / 1.5)
    assert short.interval_percentiles_s == {50: 0.375, 90: 0.5, 99: 0.5}
    assert long.ttft_s.median == 0.512
    assert long.decode_tok_s is not None and long.decode_tok_s.median == pytest.approx(2 / 0.75)


def test_every_run_is_greedy_past_the_end_token_with_a_fresh_prompt_of_the_seed() -> None:
    engine, again, other = FakeEngine(), FakeEngine(), FakeEngine()
    for fake, seed in ((engine, 3), (again, 3), (other, 4)):
        measure_cases(fake, [BenchCase(64, 2)], repeat=2, seed=seed, clock=fake.clock)

    prompts = [ids for ids, _ in engine.requests]
    assert len({tuple(ids) for ids in prompts}) == 3
    assert all(0 <= token < engine.vocab_size for ids in prompts for token in ids)
    assert {(p.temperature, p.max_tokens, p.ignore_eos) for _, p in engine.requests} == {(0.0, 2, True)}
    assert [ids for ids, _ in again.requests] == prompts
    assert [ids for ids, _ in other.requests] != prompts


def test_progress_counts_every_run_and_ends_at_the_total() -> None:
    engine, calls = FakeEngine(), []
    cases = [BenchCase(8, 1), BenchCase(16, 1)]
    measure_cases(engine, cases, repeat=2, clock=engine.clock, progress=lambda *call: calls.append(call))
    assert [(done, total) for done, total, _ in calls] == [(i, 6) for i in range(7)]
    assert calls[0][2] == "8 tokens, warm-up" and calls[5][2] == "16 tokens, repetition 2 of 2"


@pytest.mark.parametrize(
    ("cases", "repeat", "error", "said"),
    [
        (
            [BenchCase(16, 4), BenchCase(4000, 97)],
            1,
            EdgeError,
            "4000 prompt and 97 new tokens .* limit of 4096",
        ),
        ([BenchCase(16, 0)], 1, UsageError, "16 prompt and 0 new tokens"),
        ([BenchCase(0, 4)], 1, UsageError, "at least 1"),
        ([BenchCase(16, 4)], 0, UsageError, "0 repetitions"),
        ([], 1, UsageError, "no context length"),
    ],
)
def test_a_wrong_workload_is_refused_before_anything_runs(
    cases: list[BenchCase], repeat: int, error: type[EdgeError], said: str
) -> None:
    engine = FakeEngine()
    with pytest.raises(error, match=said):
        measure_cases(engine, cases, repeat=repeat, clock=engine.clock)
    assert engine.requests == []


@pytest.mark.parametrize(("tokens", "said"), [(2, "only 2 tokens"), (0, "only 0"), (10**9, "more than 4 tokens")])
def test_an_engine_that_does_not_generate_what_was_asked_is_not_measured(tokens: int, said: str) -> None:
    engine = FakeEngine(stop_after=tokens)
    with pytest.raises(EdgeError, match=said):
        measure_cases(engine, [BenchCase(8, 4)], repeat=1, clock=engine.clock)


def test_a_clock_that_stands_still_gives_no_rate_instead_of_infinity() -> None:
    (result,) = measure_cases(FakeEngine(), [BenchCase(8, 3)], repeat=2, clock=lambda: 1.0)
    assert result.prefill_tok_s is None and result.decode_tok_s is None
    assert result.interval_percentiles_s == {50: 0.0, 90: 0.0, 99: 0.0}
    assert "not measured" in render_html(sample_report(cases=(result,), peers=()))


def test_peak_memory_belongs_to_its_case() -> None:
    if not machine.reset_peak_memory():
        pytest.skip("this kernel does not let the peak be reset")

    class Hungry(FakeEngine):
        def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
            held = np.ones(200 * MIB if len(prompt_ids) == 16 else 1, np.uint8)
            yield from super().generate(prompt_ids, params)
            del held

    engine = Hungry()
    cases = [BenchCase(length, 2) for length in (8, 16, 32)]
    before, hungry, after = measure_cases(engine, cases, repeat=1, clock=engine.clock)
    for modest in (before, after):
        assert hungry.memory.peak_bytes - modest.memory.peak_bytes > 150 * MIB
    assert hungry.memory.peak_scope == "case"
    assert hungry.memory.anonymous_bytes is not None and before.memory.anonymous_bytes is not None
    assert hungry.memory.anonymous_bytes - before.memory.anonymous_bytes > 150 * MIB, "read while it is held"


# ---- statistics --------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(positive, min_size=2, max_size=40), st.lists(positive, min_size=2, max_size=40))
def test_percentiles_are_those_of_the_pooled_intervals(first: list[float], second: list[float]) -> None:
    result = case_result(8, (1.0, first), (1.0, second))
    cuts = statistics.quantiles(first + second, n=100, method="inclusive")
    assert result.interval_percentiles_s == {p: pytest.approx(cuts[p - 1]) for p in (50, 90, 99)}
    assert list(result.interval_percentiles_s.values()) == np.percentile(first + second, [50, 90, 99]).tolist()


def test_the_confidence_interval_is_students() -> None:
    result = case_result(100, *((seconds, [0.1]) for seconds in (10.0, 12.0, 14.0)))
    # mean 12, s = 2, t(2) = 4.302653
    half = 4.302653 * 2 / math.sqrt(3)
    assert result.ttft_s.interval == pytest.approx((12 - half, 12 + half), rel=1e-6)
    assert (result.ttft_s.median, result.ttft_s.low, result.ttft_s.high) == (12, 10, 14)
    assert case_result(100, (1.0, [0.1])).ttft_s.interval is None


# ---- machine -----------------------------------------------------------------------------------------------


def test_machine_facts_are_honest_and_name_nobody() -> None:
    facts = describe_machine()
    assert 1 <= facts.usable_cores <= facts.logical_cores
    assert facts.memory_bytes > 2**27 and facts.cpu_model and facts.packages["numpy"] == np.__version__
    said = json.dumps(facts.__dict__)
    for private in (socket.gethostname(), str(Path.home()) + "/", str(Path.cwd())):
        assert private not in said
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", said)


def test_accelerator_text_follows_the_driver() -> None:
    def driver(devices: int) -> SimpleNamespace:
        def count(pointer: Any) -> int:
            pointer._obj.value = devices
            return 0

        def name(buffer: ctypes.Array[ctypes.c_char], size: int, device: int) -> int:
            buffer.value = b"Orin"
            return 0

        def version(pointer: Any) -> int:
            pointer._obj.value = 12060
            return 0

        return SimpleNamespace(
            cuInit=lambda flags: 0,
            cuDeviceGetCount=count,
            cuDeviceGetName=name,
            cuDriverGetVersion=version,
        )

    assert machine.describe_accelerator(driver(1)) == "Orin, driver for CUDA 12.6"
    assert machine.describe_accelerator(driver(2)) == "Orin and 1 more, driver for CUDA 12.6"
    assert machine.describe_accelerator(driver(0)) == "no CUDA device (a driver is installed)"
    assert machine.describe_accelerator(SimpleNamespace(cuInit=lambda flags: 100)).startswith("no CUDA device")


def test_share_of_other_processes() -> None:
    before = CpuClock(wall=10.0, own=5.0, machine=100.0)
    after = CpuClock(wall=20.0, own=15.0, machine=116.0)
    # 16 CPU seconds were used, 10 by us: 6 of the 2 cores x 10 seconds
    assert machine.other_cpu_share(before, after, 2) == pytest.approx(0.3)
    assert machine.other_cpu_share(before, before, 2) is None
    assert machine.other_cpu_share(before, CpuClock(20.0, 15.0, 100.0), 2) == 0.0


def test_a_run_says_where_it_ran() -> None:
    engine = FakeEngine()
    report = run_bench(engine, BenchOptions([BenchCase(8, 2)], repeat=1, seed=5), clock=engine.clock)
    assert (report.seed, report.engine, len(report.cases)) == (5, CPU_ENGINE, 1)
    assert report.other_cpu is None or 0 <= report.other_cpu <= 1
    assert execution(report) == "ONNX Runtime CPU; no device was used"
    orin = replace(HERE, accelerator="Orin, driver for CUDA 12.6")
    on_device = replace(report, machine=orin, engine={"target": "tensorrt"})
    assert execution(on_device) == "tensorrt on Orin, driver for CUDA 12.6"


def test_notes_warn_of_what_makes_the_figures_weak() -> None:
    assert notes(sample_report(cases=(case_result(8, (1.0, [0.1] * 60), (1.0, [0.1] * 60)),))) == []
    shaky = case_result(512, (1.0, [0.1] * 9), (1.5, [0.1] * 9))
    single = case_result(64, (1.0, [0.1]))
    whole = replace(single, memory=MemoryUse(1, "process", None, None))
    said = " ".join(notes(sample_report(cases=(shaky, whole), other_cpu=0.34)))
    for part in (
        "34% of the CPU",
        "One repetition",
        "Prefill at 512 tokens varied by",
        "p99",
        "whole process",
    ):
        assert part in said
    assert "Decode at" not in said
