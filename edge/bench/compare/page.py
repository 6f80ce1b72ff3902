"""A comparison as one self-contained HTML page: ratios with their intervals, speeds over context, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from markupsafe import Markup

from edge.bench import svg
from edge.bench.compare.comparison import PHASES, Comparison, Row, Side, case_label, samples, warnings
from edge.bench.compare.facts import gates
from edge.bench.compare.text import (
    READING,
    SCHEMA_VERSION,
    format_factor,
    format_interval,
    peer_name,
    sections,
    side_line,
    title,
)
from edge.bench.html import CONTEXT_AXIS, Figure, render_page
from edge.bench.tables import format_number

# Pixels of the view box of a plot of intervals: labels to the left, verdicts to the right.
LEFT, RIGHT, WIDTH, TOP, ROW, BOTTOM, LEGEND_ROW = 118, 412, 560, 14, 26, 52, 20
MOST_TICKS = 6
WIDEST = 1.6  # how far beyond the ratios the axis goes for the sake of their intervals


@dataclass(frozen=True)
class Mark:
    """A row of the plot: its texts, and where its dot and whisker are, in pixels; a cut end lies outside the axis."""

    label: str
    verdict: str
    tip: str
    colour: int
    shape: str
    y: float
    x: float
    whisker: tuple[float, float] | None
    cut: tuple[bool, bool]


@dataclass(frozen=True)
class IntervalPlot:
    """What the template draws: marks, ticks (pixel, text), the pixel of ratio 1, the legend (name, colour, shape)."""

    heading: str
    said: str
    top: float
    height: float
    marks: tuple[Mark, ...]
    ticks: tuple[tuple[float, str], ...]
    one: float
    legend: tuple[tuple[str, int, str], ...]


def render_html(comparison: Comparison) -> str:
    """The whole page as text; everything that comes from the reports is escaped."""
    tables = sections(comparison)
    first = [table for table in tables if table.heading == "What is different"]
    return render_page(
        Path(__file__).with_name("compare.html"),
        title=title(comparison),
        sides=[side_line(side) for side in comparison.sides],
        warnings=warnings(comparison),
        gates=gates(comparison),
        different=first[0] if first else None,
        tables=[table for table in tables if table not in first],
        intervals=[interval_plot(comparison, phase) for phase in PHASES if _rows(comparison, phase)],
        figures=[_speed_figure(comparison, phase) for phase in PHASES if _rows(comparison, phase)],
        reading=READING,
        schema_version=SCHEMA_VERSION,
        pixels={"left": LEFT, "right": RIGHT, "width": WIDTH, "top": TOP, "bottom": BOTTOM, "row": LEGEND_ROW},
    )


def _rows(comparison: Comparison, phase: str) -> list[Row]:
    return [row for row in comparison.rows if row.phase == phase]


def interval_plot(comparison: Comparison, phase: str) -> IntervalPlot:
    """A dot and a whisker a case and candidate, on a logarithmic axis of ratios that 1 is on."""
    rows = _rows(comparison, phase)
    low, high = _axis_ends(rows)

    def place(ratio: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(ratio / low) / math.log(high / low)

    names = [side.name for side in comparison.sides]  # colours and shapes are those of the lines over context
    looks = [(index % svg.COLOURS, svg.MARKERS[index % len(svg.MARKERS)]) for index in range(len(names))]
    legend = tuple((name, *look) for name, look in zip(names, looks, strict=True))[1:] if len(names) > 2 else ()
    order = comparison.baseline.cases()
    top = TOP + LEGEND_ROW * len(legend)
    marks = []
    for index, row in enumerate(sorted(rows, key=lambda row: order.index(row.case))):
        (colour, shape), ends = looks[names.index(row.candidate)], row.interval
        factor = f"{format_factor(row.ratio)} ({format_interval(row)})"
        marks.append(
            Mark(
                label=case_label(row.case),
                verdict=row.verdict,
                tip=f"{row.candidate} at {case_label(row.case)}: {factor}, {row.verdict}",
                colour=colour,
                shape=shape,
                y=top + ROW * (index + 0.5),
                x=place(row.ratio),
                whisker=(place(max(ends[0], low)), place(min(ends[1], high))) if ends else None,
                cut=(ends[0] < low, ends[1] > high) if ends else (False, False),
            )
        )
    return IntervalPlot(
        heading=f"{phase.capitalize()}: speed over that of {comparison.baseline.name}",
        said="; ".join(mark.tip for mark in marks),
        top=top,
        height=top + ROW * len(marks) + BOTTOM,
        marks=tuple(marks),
        ticks=tuple((place(tick), f"{tick:g}") for tick in _ticks(low, high)),
        one=place(1.0),
        legend=legend,
    )


def _axis_ends(rows: Sequence[Row]) -> tuple[float, float]:
    """From below to above all ratios and 1, and their intervals as far as they do not dwarf the ratios."""
    ratios = [1.0, *(row.ratio for row in rows)]
    ends = [end for row in rows for end in row.interval or ()]
    low, high = min(ratios), max(ratios)
    low, high = max(min([low, *ends]), low / WIDEST), min(max([high, *ends]), high * WIDEST)
    margin = max((high / low) ** 0.05, 1.005)
    return low / margin, high * margin


def _ticks(low: float, high: float) -> list[float]:
    """Round ratios within an axis: equal steps if it is short, else 1, 2 and 5 times powers of ten."""
    if high / low > 4:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        inside = [tick for tick in ticks if low <= tick <= high]
        return inside[:: math.ceil(len(inside) / MOST_TICKS)]
    rough = (high - low) / MOST_TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * magnitude for digit in (1, 2, 5, 10) if digit * magnitude >= rough)
    # whole steps from 1, so that 1 has a tick
    first, last = math.ceil((low - 1) / step), math.floor((high - 1) / step)
    return [round(1 + step * number, 9) for number in range(first, last + 1)]


def _speed_figure(comparison: Comparison, phase: str) -> Figure:
    """Speed over context: a line a side, of each batch if there are several, and one a peer."""
    series = [line for side in comparison.sides for line in _side_series(side, phase)]
    names = {line.name for line in series}
    peers: dict[str, list[svg.Point]] = {}
    for peer in sorted(comparison.peers, key=lambda row: row.prompt_tokens):
        speed: float | None = getattr(peer, f"{phase}_tok_s")
        if speed is not None and peer_name(peer) not in names:
            point = svg.Point(float(peer.prompt_tokens), speed, format_number(speed))
            peers.setdefault(peer_name(peer), []).append(point)
    series += [svg.Series(name, tuple(points)) for name, points in peers.items()]
    highest = max(max(point.y, *(point.spread or (0.0,))) for line in series for point in line.points)
    heading = f"{phase.capitalize()} speed"
    plot = svg.line_plot(
        f"plot-{phase}",
        f"{heading} over context",
        "; ".join(f"{s.name} at {p.x:,.0f} tokens: {p.label} tok/s" for s in series for p in s.points),
        svg.log2_axis(CONTEXT_AXIS, [point.x for line in series for point in line.points]),
        svg.linear_axis(f"{heading} (tok/s)", highest),
        series,
    )
    caption = "Median; whiskers from the slowest to the fastest sample."
    return Figure(f"plot-{phase}", heading, caption, Markup(plot))


def _side_series(side: Side, phase: str) -> list[svg.Series]:
    lines: dict[int, list[svg.Point]] = {}
    for case in side.cases():
        if speeds := samples(side, case, phase):
            spread = (min(speeds), max(speeds)) if len(speeds) > 1 else None
            middle = median(speeds)
            point = svg.Point(float(case.prompt_tokens), middle, format_number(middle), spread)
            lines.setdefault(case.batch, []).append(point)
    several = len(lines) > 1
    return [
        svg.Series(f"{side.name}, batch {batch}" if several else side.name, tuple(sorted(points, key=lambda p: p.x)))
        for batch, points in lines.items()
    ]
