"""Energy, clocks and throttling from series of samples; the sampler's thread; what a recorder says of a case."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import asdict
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bench.decode import decode
from edge.telemetry.figures import CaseTelemetry, Run, Telemetry
from edge.telemetry.nvml import open_nvml
from edge.telemetry.reading import Key, Reading
from edge.telemetry.recorder import Recorder, open_recorder
from edge.telemetry.recording import Series, Total, Window, choose_total, cumulative, energy, mean_power, throttling
from edge.telemetry.sampler import Sampler
from tests.telemetry_samples import AGX_ORIN, TELEMETRY, Scripted, case_telemetry, orin_values, recorded, tree

POWER: Key = ("power", "VDD_IN")
COUNTER: Key = ("energy", "package-0")
TOTAL, COUNTED = Total((POWER,), ""), Total((COUNTER,), "")


def series(*points: tuple[float, float]) -> Series:
    return Series([time for time, _ in points], [value for _, value in points])


# ---- energy ------------------------------------------------------------------------------------------------

milliseconds = st.lists(st.integers(0, 20_000), min_size=5, max_size=40, unique=True).map(sorted)


@st.composite
def sampled_power(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    """Milliseconds, watts, and a window (in ms) within them that holds three samples or more."""
    at = draw(milliseconds)
    watts = draw(st.lists(st.integers(0, 600), min_size=len(at), max_size=len(at)))
    first = draw(st.integers(0, len(at) - 3))
    last = draw(st.integers(first + 2, len(at) - 1))
    start = draw(st.integers(at[first - 1] if first else at[0], at[first]))
    end = draw(st.integers(at[last], at[last + 1] if last + 1 < len(at) else at[last]))
    return at, watts, start, end + (end == at[last] and last + 1 < len(at))


def exact_integral(at: list[int], watts: list[int], start: int, end: int) -> Fraction:
    """Of the polygon through the samples, piece by piece in fractions: millijoules."""
    total = Fraction(0)
    for (t0, w0), (t1, w1) in pairwise(zip(at, watts, strict=True)):
        low, high = max(t0, start), min(t1, end)
        if low < high:
            middle = Fraction(low + high, 2)
            total += (high - low) * (w0 + Fraction(w1 - w0, t1 - t0) * (middle - t0))
    return total


@settings(deadline=None)
@given(sampled_power())
def test_energy_is_exact_for_piecewise_linear_power(case: tuple[list[int], list[int], int, int]) -> None:
    at, watts, start, end = case
    recording = {POWER: series(*((t / 1e3, float(w)) for t, w in zip(at, watts, strict=True)))}
    window = Window(start / 1e3, end / 1e3)
    joules = energy(recording, TOTAL, window)
    if len(recording[POWER].within(window)) < 3:
        assert joules is None
    else:
        assert joules == pytest.approx(float(exact_integral(at, watts, start, end)) / 1e3, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(sampled_power(), st.integers(2, 9))
def test_means_of_intervals_add_up_to_the_energy(case: tuple[list[int], list[int], int, int], count: int) -> None:
    at, watts, start, end = case
    recording = {POWER: series(*((t / 1e3, float(w)) for t, w in zip(at, watts, strict=True)))}
    edges = np.linspace(start / 1e3, end / 1e3, count + 1)
    means = mean_power(recording, TOTAL, edges)
    whole = np.diff(cumulative(recording, TOTAL, edges[[0, -1]]))[0]
    joules = sum(watt * width for watt, width in zip(means, np.diff(edges), strict=True) if watt is not None)
    assert joules == pytest.approx(whole, abs=1e-6)


def test_a_counter_is_interpolated_at_the_borders() -> None:
    recording = {COUNTER: series((0, 100), (1, 110), (2, 130), (3, 160), (4, 160))}
    assert energy(recording, COUNTED, Window(0.5, 3.5)) == pytest.approx(160 - 105)


def test_rails_and_counters_are_added() -> None:
    line = [(t / 10, 5.0) for t in range(41)]
    counter = [(t / 10, 2.0 * t / 10) for t in range(41)]
    recording = {POWER: series(*line), COUNTER: series(*counter)}
    assert energy(recording, Total((POWER, COUNTER), ""), Window(0.55, 3.05)) == pytest.approx(2.5 * 7)


def test_no_energy_where_the_samples_do_not_cover_the_window_or_are_too_few() -> None:
    recording = {POWER: series(*((t / 10, 5.0) for t in range(11)))}
    assert energy(recording, TOTAL, Window(0.0, 1.0)) == pytest.approx(5.0)
    assert energy(recording, TOTAL, Window(0.5, 1.01)) is None, "nobody knows what came after the last sample"
    assert energy(recording, TOTAL, Window(-0.01, 0.5)) is None
    assert energy(recording, TOTAL, Window(0.31, 0.59)) is None, "two samples"
    assert energy(recording, TOTAL, Window(0.31, 0.61)) is not None
    assert energy(recording, Total((), ""), Window(0.0, 1.0)) is None
    assert energy(recording, Total((POWER, COUNTER), ""), Window(0.0, 1.0)) is None, "a part is missing"


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ([("power", "VDD_SOC"), ("power", "VDD_IN"), ("energy", "GPU board")], ["VDD_IN"]),
        ([("power", "VDD_GPU"), ("power", "VIN_SYS_5V0"), ("power", "VIN")], ["VIN"]),
        ([("power", "VDDQ_VDD2_1V8AO"), ("power", "VDD_CPU_CV")], ["VDDQ_VDD2_1V8AO", "VDD_CPU_CV"]),
        ([("energy", "psys"), ("energy", "package-1"), ("energy", "GPU board")], ["GPU board", "package-1"]),
        ([("clock", "GPU")], []),
    ],
)
def test_the_total_counts_nothing_twice(keys: list[Key], parts: list[str]) -> None:
    assert [name for _, name in choose_total(keys).parts] == parts


# ---- throttling --------------------------------------------------------------------------------------------


def test_throttling_counts_only_in_the_windows() -> None:
    windows = [Window(1.0, 2.0), Window(4.0, 5.0)]
    states = [(t / 4, float(4.25 <= t / 4 < 4.75)) for t in range(24)]
    counts = [(0.5, 7.0), (1.5, 7.0), (2.5, 9.0), (3.5, 50.0), (4.5, 50.0), (5.5, 53.0)]
    recording = {("throttle", "gpu-throttle-alert"): series(*states), ("events", "over-current oc3"): series(*counts)}
    assert throttling(recording, windows) == (
        "gpu-throttle-alert (25% of the time)",
        "over-current oc3 (5 events)",
    ), "the 41 between the windows are not theirs"
    assert throttling(recording, [Window(0.6, 1.4)]) == ()
    assert throttling({POWER: series((0, 1))}, windows) is None


# ---- the recorder ------------------------------------------------------------------------------------------


def test_a_case_has_energy_of_each_phase_clocks_and_heat() -> None:
    recorder = recorded(orin_values, 8)
    case = recorder.case(2048, 60, [Run(1.5, 3.5, 6.0), Run(1.0, 3.0, 6.0)])
    second, first = case.runs
    # Steps in power are seen with the sampling interval: half of it, times the step, at each border.
    assert first.prefill_j == pytest.approx(80, abs=0.05 * 32)
    assert first.decode_j == pytest.approx(75, abs=0.05 * 17)
    assert second.prefill_j == pytest.approx(1.5 * 40 + 0.5 * 25, abs=0.05 * 32) and second.prefill_s == 2.0
    gpu = case.clocks["GPU"]
    assert (gpu.lowest, gpu.highest) == (918e6, 1300.5e6) and gpu.moved > 0.25
    assert case.clocks["memory"].moved == 0
    assert case.hottest == {"tj": pytest.approx(45 + 3 * 5.9)}
    assert case.throttled is not None and case.throttled[1] == "over-current oc3 (4 events)"
    assert case.trace is not None and len(case.trace.seconds) == len(case.trace.power_w) <= 240
    peak = case.trace.seconds[max(range(len(case.trace.seconds)), key=lambda i: case.trace.power_w[i] or 0)]
    assert -0.1 <= peak <= case.trace.first_token_s
    assert decode(CaseTelemetry, asdict(case)) == case


def test_idle_power_is_measured_before_anything_runs() -> None:
    """The machine takes 8 W for 5 s of its clock, then 40 W."""
    now = [0.0]
    scripted = Scripted(lambda: now[0], lambda t: {POWER: 8.0 if t < 5 else 40.0})
    sampler = Sampler([scripted], 0.1, clock=lambda: now[0])

    def sleep(seconds: float) -> None:
        end = now[0] + seconds
        while now[0] < end:
            sampler.sample()
            now[0] += 0.1
        sampler.sample()

    sampler.sample()
    recorder = Recorder(sampler, {}, Path("/nowhere"), sleep)
    recorder.idle(2.0)
    assert recorder.summary().idle_w == pytest.approx(8.0)
    assert recorder.summary().scope == "VDD_IN, the module's input"
    sleep(4.0)
    recorder.idle(2.0)
    assert recorder.summary().idle_w == pytest.approx(40.0)


def test_without_power_there_is_no_wait_and_the_reason_is_told_once() -> None:
    recorder = recorded(lambda _: {("clock", "CPU"): 3e9}, 1, power=["no RAPL", "no NVML"])
    recorder.idle(1e9)  # waits for nothing
    case, summary = recorder.case(10, 5, [Run(0.1, 0.5, 0.9)]), recorder.summary()
    assert case.runs[0].prefill_j is None and case.idle_w is None and case.throttled is None and not case.hottest
    assert summary.unreadable == {
        "power": "no RAPL; no NVML",
        "temperature": "its sensors do not answer",
        "throttling": "its sensors do not answer",
    }
    assert decode(Telemetry, asdict(summary)) == summary


def test_a_part_of_the_power_that_is_for_root_only_is_told() -> None:
    why = ["no INA3221", "/sys/class/powercap/intel-rapl:0/energy_uj: Permission denied"]
    unreadable = recorded(lambda _: {("energy", "GPU board"): 1.0}, 1, power=why).summary().unreadable
    assert unreadable["part of the power"] == why[1] and "power" not in unreadable


def test_a_board_is_opened_by_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # whatever this machine has is no part of it
    monkeypatch.setattr("edge.telemetry.recorder.open_nvml", lambda: open_nvml("libmissing.so"))
    recorder = open_recorder(0.02, tree(tmp_path, AGX_ORIN), time.perf_counter)
    with recorder:
        start = time.perf_counter()
        time.sleep(0.5)
        end = time.perf_counter()
        case = recorder.case(64, 32, [Run(start, (start + end) / 2, end)])
        summary = recorder.summary()
    run = case.runs[0]
    assert run.prefill_j is not None and run.prefill_j / run.prefill_s == pytest.approx(18.5, rel=1e-3)
    assert run.decode_j is not None and run.decode_j / run.decode_s == pytest.approx(18.5, rel=1e-3)
    assert case.throttled == () and case.hottest == {"tj": 50.1}
    assert summary.power_mode == "MODE_50W" and summary.locked == {"GPU": False} and summary.jetson
    assert summary.sources == ("INA3221", "devfreq", "cpufreq", "thermal zones", "throttling")
    assert summary.unreadable == {"memory clock": "before JetPack 7 only root may read it"}
    assert 0 < summary.reading_s < 0.02 and 0 < summary.cpu_share < 1


def test_a_machine_without_any_sensor_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with open_recorder(0.02, tmp_path) as recorder:
        now = time.perf_counter()
        case = recorder.case(64, 32, [Run(now - 0.01, now - 0.005, now)])
    summary = recorder.summary()
    assert case.trace is None and case.clocks == {} and summary.sources == ()
    assert set(summary.unreadable) == {"power", "clocks", "temperature", "throttling"}
    assert summary.unreadable["power"].startswith("no INA3221 or INA238 in /sys/class/hwmon; ")
    assert summary.unreadable["power"].endswith("; no tegrastats on the PATH")
    assert summary.unreadable["temperature"] == "no thermal zone in /sys/class/thermal"


# ---- the sampler -------------------------------------------------------------------------------------------


class Faulty:
    """Fails on its third reading."""

    name = "faulty"

    def __init__(self) -> None:
        self.count, self.closed = 0, 0

    def read(self) -> Reading:
        self.count += 1
        if self.count == 3:
            raise OSError("gone")
        return {POWER: 100.0, ("clock", "GPU"): 1.0}

    def close(self) -> None:
        self.closed += 1


class Steady(Faulty):
    """Shows what the other does, and never fails."""

    name = "steady"

    def read(self) -> Reading:
        return {("clock", "GPU"): 2.0, ("clock", "CPU"): 3.0}


def test_a_source_that_fails_is_left_and_the_first_source_of_a_value_keeps_it() -> None:
    faulty, steady = Faulty(), Steady()
    sampler = Sampler([faulty, steady], 0.01)
    for _ in range(5):
        sampler.sample()
    assert (faulty.count, faulty.closed, steady.closed) == (3, 1, 0)
    assert sampler.series["clock", "GPU"].values == [1.0, 1.0], "not mixed with another sensor's"
    assert len(sampler.series["clock", "CPU"].values) == 5


def test_the_thread_samples_at_its_interval_and_ends() -> None:
    source = Steady()
    sampler = Sampler([source], 0.02)
    sampler.start()
    moment = time.perf_counter() + 0.1
    sampler.wait_beyond(moment, [("clock", "CPU")], 30)
    times = sampler.series["clock", "CPU"].times
    sampler.stop()
    assert times[-1] > moment and all(a < b for a, b in pairwise(times))
    assert 2 <= len(times) <= math.ceil((times[-1] - times[0]) / 0.02) + 2
    assert source.closed == 1 and not any(thread.name == "sensors" for thread in threading.enumerate())
    taken = sampler.samples
    time.sleep(0.06)
    assert sampler.samples == taken


def test_samples_of_a_report_survive_json() -> None:
    case = case_telemetry()
    assert decode(CaseTelemetry, asdict(case)) == case
    assert decode(Telemetry, asdict(TELEMETRY)) == TELEMETRY
