"""Series of samples, and what follows from them over a window of time: energy, clocks, heat, throttling."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from edge.telemetry.reading import Key, Quantity

GPU_POWER = "GPU board"  # NVML's: the whole graphics card; no rail has this name
LEAST_SAMPLES = 3  # within a window, for its energy to be more than that of its neighbours


@dataclass(frozen=True)
class Window:
    """From `start` to `end`, in seconds of the sampler's clock."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Series:
    """Values at increasing times."""

    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def append(self, time: float, value: float) -> None:
        """The value first: whoever reads meanwhile goes by the times."""
        self.values.append(value)
        self.times.append(time)

    def within(self, window: Window) -> list[float]:
        """The values that were read in a window."""
        return self.values[bisect_left(self.times, window.start) : bisect_left(self.times, window.end)]

    def covers(self, window: Window) -> bool:
        """Whether a value was read at or before its start, and at or after its end."""
        return bool(self.times) and self.times[0] <= window.start and window.end <= self.times[-1]


Recording = Mapping[Key, Series]


@dataclass(frozen=True)
class Total:
    """What a machine's power is the sum of, and in words what that is; nothing without `parts`."""

    parts: tuple[Key, ...]
    scope: str


# Rails that measure an input, through which all others are supplied: the sum of these and others would count twice.
INPUTS = {
    "VIN": "the supply's input, module and carrier board",  # Jetson Thor, INA238
    "VDD_IN": "the module's input",  # Orin NX, Orin Nano, Xavier NX
    "POM_5V_IN": "the module's input",  # Nano, TX1
}
# Rails behind another one. AGX Orin has no input rail: VIN_SYS_5V0 supplies I/O and DRAM, not GPU and CPU, so the
# module is the sum of its rails but this one (Jetson Linux Developer Guide 36.4.3, "Software-Based Power Consumption
# Modeling").
BEHIND = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}


def choose_total(keys: Sequence[Key]) -> Total:
    """The best total that these series give: a board's input, else its rails, else graphics card and processor."""
    rails = [name for quantity, name in keys if quantity == "power" and name != GPU_POWER]
    for name, meaning in INPUTS.items():
        if name in rails:
            return Total((("power", name),), f"{name}, {meaning}")
    if rails:
        names = [name for name in rails if BEHIND.get(name) not in rails]
        return Total(tuple(("power", name) for name in names), f"{' + '.join(names)}, the rails of the module")
    gpu = [key for key in keys if key[1] == GPU_POWER]
    # A package counts its cores; its memory, where it is shown, comes on top.
    packages = [key for key in keys if key[0] == "energy" and re.fullmatch(r"package-\d+( dram)?", key[1])]
    names = [name for _, name in (*gpu, *packages)]
    return Total((*gpu, *packages), f"{' + '.join(names)}, not the rest of the machine" if names else "")


def energy(recording: Recording, total: Total, window: Window) -> float | None:
    """Joules of a window; None if there is no total, the samples do not cover it, or too few fall into it."""
    series = [recording[key] for key in total.parts if key in recording]
    if not total.parts or len(series) < len(total.parts):
        return None
    if any(not line.covers(window) or len(line.within(window)) < LEAST_SAMPLES for line in series):
        return None
    borders = np.array([window.start, window.end])
    return float(np.diff(cumulative(recording, total, borders))[0])


def cumulative(recording: Recording, total: Total, times: np.ndarray) -> np.ndarray:
    """Joules of all parts up to each of `times`, from an arbitrary start.

    Power is taken as piecewise linear between samples, and integrated exactly (the trapezoidal rule, with interpolated
    values at the borders); counters are interpolated. Outside of the samples power stays as it was nearest to them.
    """
    joules = np.zeros(len(times))
    for key in total.parts:
        line = recording[key]
        count = len(line.times)
        at, values = np.array(line.times[:count]), np.array(line.values[:count])
        joules += _integral(at, values, times) if key[0] == "power" else np.interp(times, at, values)
    return joules


def _integral(at: np.ndarray, watts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The integral of a piecewise linear function from its first point to each of `times`."""
    sums = np.concatenate([[0.0], np.cumsum(np.diff(at) * (watts[1:] + watts[:-1]) / 2)])
    index = np.clip(np.searchsorted(at, times, side="right") - 1, 0, len(at) - 1)
    here = np.interp(times, at, watts)
    result: np.ndarray = sums[index] + (times - at[index]) * (watts[index] + here) / 2
    return result


def mean_power(recording: Recording, total: Total, edges: np.ndarray) -> list[float | None]:
    """Watts between neighbouring `edges`; None where there was no sample yet, or none any more."""
    lines = [recording[key] for key in total.parts if key in recording]
    if not total.parts or len(lines) < len(total.parts):
        return [None] * (len(edges) - 1)
    watts = np.diff(cumulative(recording, total, edges)) / np.diff(edges)
    covered = [all(line.covers(Window(a, b)) for line in lines) for a, b in pairwise(edges.tolist())]
    return [float(value) if known else None for value, known in zip(watts, covered, strict=True)]


def of_quantity(recording: Recording, quantity: Quantity) -> dict[str, Series]:
    """The series of one quantity by name."""
    return {name: series for (kind, name), series in recording.items() if kind == quantity}


def values_within(series: Series, windows: Sequence[Window]) -> list[float]:
    """What was read in any of the windows."""
    return [value for window in windows for value in series.within(window)]


def throttling(recording: Recording, windows: Sequence[Window]) -> tuple[str, ...] | None:
    """What held clocks down in the windows, in words; None if nothing would have told."""
    active, events = of_quantity(recording, "throttle"), of_quantity(recording, "events")
    if not active and not events:
        return None
    found = []
    for name, series in active.items():
        states = values_within(series, windows)
        if any(states):
            found.append(f"{name} ({sum(states) / len(states):.0%} of the time)")
    for name, series in events.items():
        if count := sum(_growth(series, window) for window in windows):
            found.append(f"{name} ({count:.0f} event{'s' * (count != 1)})")
    return tuple(found)


def _growth(series: Series, window: Window) -> float:
    """How far a count went from the last sample before a window to the first after it."""
    if not series.times:
        return 0.0
    first = max(0, bisect_right(series.times, window.start) - 1)
    last = min(len(series.times) - 1, bisect_left(series.times, window.end))
    return series.values[last] - series.values[first]
