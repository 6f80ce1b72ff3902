"""Sensors of this machine for a benchmark: which there are, and what they showed in each case."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from edge.doctor import jetson
from edge.doctor.machine import gather
from edge.telemetry.figures import CaseTelemetry, ClockRange, Run, RunEnergy, Telemetry, Trace
from edge.telemetry.heat import open_cpufreq, open_devfreq, open_throttling, open_zones
from edge.telemetry.nvml import open_nvml
from edge.telemetry.rails import open_iio, open_input, open_rails
from edge.telemetry.rapl import open_rapl
from edge.telemetry.reading import Quantity, Source, Unreadable
from edge.telemetry.recording import (
    Series,
    Total,
    Window,
    choose_total,
    energy,
    mean_power,
    of_quantity,
    throttling,
    values_within,
)
from edge.telemetry.sampler import Clock, Sampler
from edge.telemetry.tegrastats import open_tegrastats

INTERVAL = 0.1  # seconds
IDLE_SECONDS = 2.0
TRACE_POINTS = 240
# What a report shows, and which quantities of the sources it takes one of.
SHOWN: dict[str, tuple[Quantity, ...]] = {
    "power": ("power", "energy"),
    "clocks": ("clock",),
    "temperature": ("temperature",),
    "throttling": ("throttle", "events"),
}


class Recorder:
    """A context in which a sampler runs; a benchmark tells it when it is idle and when its phases were."""

    def __init__(
        self,
        sampler: Sampler,
        refusals: Mapping[str, Sequence[str]],
        root: Path = Path("/"),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`refusals`: by what a report shows, why sources of it are missing. `sleep` goes by the sampler's clock."""
        self._sampler, self._refusals, self._root, self._sleep = sampler, refusals, root, sleep
        self._idle_w: float | None = None

    def __enter__(self) -> Recorder:
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sampler.stop()

    @property
    def _total(self) -> Total:
        return choose_total(list(self._sampler.series))

    def idle(self, seconds: float = IDLE_SECONDS) -> None:
        """Measure the power before anything runs; returns at once on a machine that shows none."""
        if not self._total.parts:
            return
        start = self._sampler.clock()
        self._sleep(seconds)
        window = Window(start, self._sampler.clock())
        self._wait_beyond(window.end)
        joules = self._energy(window)
        self._idle_w = None if joules is None else round(joules / window.seconds, 3)

    def case(self, prompt_tokens: int, decode_tokens: int, runs: Sequence[Run]) -> CaseTelemetry:
        """What the sensors showed in the repetitions of a case. Waits for the sample after the last of them."""
        self._wait_beyond(runs[-1].end)
        windows = [Window(run.start, run.end) for run in runs]
        recording = self._sampler.series
        clocks = {}
        for unit, series in of_quantity(recording, "clock").items():
            if values := values_within(series, windows):
                clocks[unit] = ClockRange(min(values), float(np.median(values)), max(values))
        peaks = {
            zone: round(max(values), 1)
            for zone, series in of_quantity(recording, "temperature").items()
            if (values := values_within(series, windows))
        }
        hottest = max(peaks, key=lambda zone: peaks[zone], default=None)
        return CaseTelemetry(
            prompt_tokens,
            decode_tokens,
            self._idle_w,
            tuple(self._run(run) for run in runs),
            clocks,
            {hottest: peaks[hottest]} if hottest is not None else {},
            throttling(recording, windows),
            self._trace(runs[-1]),
        )

    def summary(self) -> Telemetry:
        """How it was read, and the machine's settings."""
        sampler, samples = self._sampler, max(1, self._sampler.samples)
        machine = gather(self._root, only=("nvpmodel",))
        mode = jetson.power_mode(machine)
        return Telemetry(
            interval_s=sampler.interval,
            reading_s=round(sampler.reading_s / samples, 6),
            cpu_share=round(sampler.cpu_s / (samples * sampler.interval), 5),
            sources=tuple(source.name for source in sampler.sources),
            scope=self._total.scope,
            idle_w=self._idle_w,
            unreadable=self._unreadable(jetson.is_jetson(machine)),
            jetson=jetson.is_jetson(machine),
            power_mode=mode.name if mode else None,
            locked={unit: clock.locked for unit, clock in jetson.clocks(machine).items()},
        )

    def _unreadable(self, on_jetson: bool) -> dict[str, str]:
        known = set(self._sampler.series)
        quantities = {quantity for quantity, _ in known}
        found = {}
        for shown, kinds in SHOWN.items():
            if not quantities.intersection(kinds):
                found[shown] = "; ".join(self._refusals.get(shown, ())) or "its sensors do not answer"
        if on_jetson and "clock" in quantities and ("clock", "memory") not in known:
            found["memory clock"] = "before JetPack 7 only root may read it"
        if "power" not in found and (refused := [why for why in self._refusals.get("power", ()) if "denied" in why]):
            found["part of the power"] = "; ".join(refused)
        return found

    def _wait_beyond(self, moment: float) -> None:
        self._sampler.wait_beyond(moment, self._total.parts, 3 * self._sampler.interval + 1.0)

    def _energy(self, window: Window) -> float | None:
        return energy(self._sampler.series, self._total, window)

    def _run(self, run: Run) -> RunEnergy:
        prefill, decode = Window(run.start, run.first), Window(run.first, run.end)
        joules = [self._energy(phase) for phase in (prefill, decode)]
        rounded = [None if value is None else round(value, 4) for value in joules]
        return RunEnergy(round(prefill.seconds, 6), rounded[0], round(decode.seconds, 6), rounded[1])

    def _trace(self, run: Run) -> Trace | None:
        """The run and half a second, or a twentieth, around it; None if there is nothing to plot."""
        seconds = run.end - run.start
        margin = max(0.5, seconds / 20)
        count = int(np.clip((seconds + 2 * margin) / self._sampler.interval, 2, TRACE_POINTS))
        edges = np.linspace(run.start - margin, run.end + margin, count + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        recording = self._sampler.series
        power = mean_power(recording, self._total, edges)
        clocks = {unit: _at(line, middles, 0) for unit, line in of_quantity(recording, "clock").items()}
        zones = [_at(line, middles, 1) for line in of_quantity(recording, "temperature").values()]
        heat = [
            max((value for value in point if value is not None), default=None) for point in zip(*zones, strict=True)
        ]
        if all(value is None for value in power) and not clocks and not zones:
            return None
        return Trace(
            first_token_s=round(run.first - run.start, 6),
            end_s=round(seconds, 6),
            seconds=tuple(round(float(at) - run.start, 3) for at in middles),
            power_w=tuple(None if value is None else round(value, 3) for value in power),
            clocks_hz=clocks,
            temperature_c=tuple(heat) if zones else (None,) * count,
        )


def _at(series: Series, times: np.ndarray, digits: int) -> tuple[float | None, ...]:
    """Values at times, between samples interpolated; None outside of them."""
    count = len(series.times)
    values = np.interp(times, series.times[:count], series.values[:count], left=np.nan, right=np.nan)
    return tuple(None if np.isnan(value) else round(float(value), digits) for value in values)


def open_recorder(interval: float = INTERVAL, root: Path = Path("/"), clock: Clock = time.perf_counter) -> Recorder:
    """A recorder of all sensors that this user may read; what is missing is in its summary, never an error."""
    sources: list[Source] = []
    refusals: dict[str, list[str]] = {}

    def attempt(shown: Sequence[str], opened: Callable[[], Source]) -> None:
        try:
            sources.append(opened())
        except Unreadable as why:
            for name in shown:
                refusals.setdefault(name, []).append(str(why))

    attempt(["power"], lambda: open_rails(root))
    for other in (open_input, open_iio):  # what they refuse for, open_rails has said
        attempt([], partial(other, root))
    has_rails = bool(sources)
    attempt(["clocks"], lambda: open_devfreq(root))
    attempt(["power"], open_nvml)
    attempt(["power"], lambda: open_rapl(root))
    attempt(["clocks"], lambda: open_cpufreq(root))
    attempt(["temperature"], lambda: open_zones(root))
    attempt(["throttling"], lambda: open_throttling(root))
    if not has_rails:
        attempt(["power"], lambda: open_tegrastats(interval))
    return Recorder(Sampler(sources, interval, clock), refusals, root)
