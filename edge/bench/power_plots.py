"""Plots of one repetition over time: power, clocks and temperature, with its phases shaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edge.bench import svg
from edge.bench.numbers import format_number
from edge.bench.power import UNITS
from edge.bench.samples import CaseResult
from edge.telemetry.figures import Telemetry, Trace

TIME_AXIS = "Time since the request (s)"


@dataclass(frozen=True)
class TimePlot:
    """One plot of the page: its id, heading, caption and SVG."""

    identity: str
    heading: str
    caption: str
    plot: str


def time_plots(cases: Sequence[CaseResult], telemetry: Telemetry | None) -> list[TimePlot]:
    """Of the last repetition of the longest case; what was not readable has no plot."""
    traced = [(result.case.prompt_tokens, result.telemetry.trace) for result in cases if result.telemetry]
    if telemetry is None or not traced or traced[-1][1] is None:
        return []
    tokens, trace = traced[-1][0], traced[-1][1]
    where = f"Last repetition at {tokens:,} tokens."
    idle = telemetry.idle_w
    power = [_series("power", trace, trace.power_w)]
    if idle is not None:
        power.append(svg.Series("idle", tuple(svg.Point(trace.seconds[i], idle) for i in (0, -1))))
    units = [unit for unit in UNITS if unit in trace.clocks_hz]
    clocks = [_series(unit, trace, [_mega(v) for v in trace.clocks_hz[unit]], lowest=True) for unit in units]
    heat = [_series("hottest zone", trace, trace.temperature_c)]
    plots = [
        ("plot-power", "Power over time", f"{where} Of {telemetry.scope}.", "Power (W)", power, 0.0),
        ("plot-clocks", "Clocks over time", f"{where} The lowest value is marked.", "Clock (MHz)", clocks, 0.0),
        ("plot-heat", "Temperature over time", f"{where} The hottest zone.", "Temperature (°C)", heat, None),
    ]
    return [_plot(*plot, trace=trace) for plot in plots if plot[4] and plot[4][0].points]


def _plot(
    identity: str, heading: str, caption: str, unit: str, series: list[svg.Series], low: float | None, *, trace: Trace
) -> TimePlot:
    values = [point.y for line in series for point in line.points]
    y = svg.linear_axis(unit, max(values)) if low is not None else span_axis(unit, min(values) - 1, max(values) + 1)
    bands = [svg.Band("prefill", 0.0, trace.first_token_s), svg.Band("decode", trace.first_token_s, trace.end_s)]
    said = "; ".join(f"{line.name}: {min(_ys(line)):,.4g} to {max(_ys(line)):,.4g}" for line in series)
    said += f"; prefill until {trace.first_token_s:.2f} s, decode until {trace.end_s:.2f} s"
    x = span_axis(TIME_AXIS, trace.seconds[0], trace.seconds[-1], exact=True)
    return TimePlot(identity, heading, caption, svg.line_plot(identity, heading, said, x, y, series, bands))


def span_axis(title: str, low: float, high: float, *, exact: bool = False) -> svg.Axis:
    """Ticks at round numbers, five or so; from one to the next, or exactly from `low` to `high`."""
    high = high if high > low else low + 1
    width = high - low
    magnitude = 10.0 ** math.floor(math.log10(width / 5))
    step = magnitude * next(m for m in (1, 2, 5, 10) if width / 5 <= m * magnitude * 1.0001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [(i * step, f"{i * step:,.{decimals}f}") for i in range(first, last + 1)]
    if exact:
        kept = tuple(tick for tick in ticks if low - 1e-9 <= tick[0] <= high + 1e-9)
        return svg.Axis(title, low, high, kept)
    return svg.Axis(title, ticks[0][0], ticks[-1][0], tuple(ticks))


def _series(name: str, trace: Trace, values: Sequence[float | None], *, lowest: bool = False) -> svg.Series:
    """The known values; the highest, or lowest, within the phases has its number beside it."""
    known = [(at, value) for at, value in zip(trace.seconds, values, strict=True) if value is not None]
    inside = [point for point in known if 0 <= point[0] <= trace.end_s]
    extreme = (min if lowest else max)(inside, key=lambda point: point[1], default=None)
    points = (svg.Point(*point, format_number(point[1]) if point == extreme else "") for point in known)
    return svg.Series(name, tuple(points))


def _ys(line: svg.Series) -> list[float]:
    return [point.y for point in line.points]


def _mega(hertz: float | None) -> float | None:
    return None if hertz is None else hertz / 1e6
