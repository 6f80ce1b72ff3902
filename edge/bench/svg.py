"""Plots as inline SVG: lines with whiskers over a scaled axis, and bars. Colours are CSS classes of the page.

Every plot has a <title> and a <desc> for screen readers, titled axes with units, ticks at round numbers and
its values as text. Series differ by colour, marker and dash, so that no meaning rests on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

WIDTH, HEIGHT = 560, 352
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 12, 54
LEGEND_ROW = 20
CHARACTER = 7.4  # mean width of a legend character
LABEL_HEIGHT, LABEL_GAP, LABELS_IN_COLUMN = 14, 38, 4
COLOURS = 6
CIRCLE, SQUARE = "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z", "M-4,-4h8v8h-8z"
DIAMOND, TRIANGLE = "M0,-5.5L5.5,0L0,5.5L-5.5,0z", "M0,-5L5,4H-5z"
MARKERS = (CIRCLE, SQUARE, DIAMOND, TRIANGLE)
DASHES = ("", "7 4", "2 4", "9 3 2 3")
PERCENTILE_TICKS = (0.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99)


@dataclass(frozen=True)
class Axis:
    """A titled axis from `low` to `high`; `scale` is monotone and makes positions proportional."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    scale: Callable[[float], float] = float

    def position(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        start = self.scale(self.low)
        return (self.scale(value) - start) / (self.scale(self.high) - start)


@dataclass(frozen=True)
class Point:
    """One vertex of a line; a `label` gives it a marker and that text, a `spread` (low, high) a whisker."""

    x: float
    y: float
    label: str = ""
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """A named line."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Band:
    """A named stretch of the x axis, shaded behind the lines."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Bar:
    """A bar of height `value`, of which `part` is shown solid; both in the unit of the axis."""

    name: str
    value: float
    label: str
    part: float | None
    part_label: str


def linear_axis(title: str, highest: float) -> Axis:
    """From 0 to a round number above `highest`, five or so ticks of 1, 2 or 5 times a power of ten."""
    highest = highest * 1.08 if highest > 0 else 1.0
    magnitude = 10.0 ** math.floor(math.log10(highest / 5))
    step = magnitude * next(m for m in (1, 2, 5, 10) if highest / 5 <= m * magnitude * 1.0001)
    count = math.ceil(highest / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = tuple((i * step, f"{i * step:,.{decimals}f}") for i in range(count + 1))
    return Axis(title, 0.0, count * step, ticks)


def log2_axis(title: str, values: Sequence[float]) -> Axis:
    """Half an octave and a little around `values`, ticks at powers of two (at most nine)."""
    low, high = min(values) / 2**0.55, max(values) * 2**0.55
    exponents = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    exponents = exponents[:: math.ceil(len(exponents) / 9)]
    return Axis(title, low, high, tuple((2.0**e, binary_text(2**e)) for e in exponents), math.log2)


def percentile_axis(title: str, highest: float) -> Axis:
    """From the minimum to percentile `highest` (< 100), stretched towards the tail: -log10(1 - p/100)."""
    ticks = tuple((p, f"p{p:g}" if p else "min") for p in PERCENTILE_TICKS if p <= highest)
    return Axis(title, 0.0, highest, ticks, lambda p: -math.log10(1 - p / 100))


def binary_text(value: float) -> str:
    """512, 2K, 128K, 1M with K = 1024."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def line_plot(
    identity: str,
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    bands: Sequence[Band] = (),
) -> str:
    """An inline <svg>: one line a series, markers, whiskers and labels at its labelled points, bands behind."""
    svg = _canvas(identity, title, description)
    names = [s.name for s in series] if len(series) > 1 else []
    top = _legend(svg, [(name, _swatch_line) for name in names])
    frame = _Frame(x, y, top)
    _draw_bands(svg, frame, bands)
    _draw_axes(svg, frame)
    if not series:
        centre, middle = (LEFT + WIDTH - RIGHT) / 2, (top + HEIGHT - BOTTOM) / 2
        _add(svg, "text", cls="nothing", x=centre, y=middle, text="not measured")
    # the first series is drawn last: it stays on top where lines meet
    for index, line in reversed(list(enumerate(series))):
        group = _add(svg, "g", cls=f"s{index % COLOURS}")
        path = " ".join(f"{frame.px(p.x):.1f},{frame.py(p.y):.1f}" for p in line.points)
        _add(group, "polyline", cls="line", points=path, stroke_dasharray=DASHES[index % len(DASHES)] or None)
        for point in line.points:
            if point.label:
                _draw_point(group, frame, index, f"{line.name}: {point.label}", point)
    _draw_labels(svg, frame, series)
    return ET.tostring(svg, encoding="unicode")


def bar_plot(
    identity: str,
    title: str,
    description: str,
    x_title: str,
    y: Axis,
    bars: Sequence[Bar],
    parts: tuple[str, str],
) -> str:
    """An inline <svg> of bars; `parts` names the whole and the solid part in the legend."""
    svg = _canvas(identity, title, description)
    has_parts = any(bar.part is not None for bar in bars)
    top = _legend(svg, [(parts[0], _swatch_whole), (parts[1], _swatch_part)] if has_parts else [])
    slot = 1.0 / len(bars)
    ticks = tuple(((i + 0.5) * slot, bar.name) for i, bar in enumerate(bars))
    frame = _Frame(Axis(x_title, 0.0, 1.0, ticks), y, top)
    _draw_axes(svg, frame)
    width = min(72.0, 0.6 * (WIDTH - LEFT - RIGHT) * slot)
    group = _add(svg, "g", cls="s0")
    for (centre, _), bar in zip(ticks, bars, strict=True):
        left = frame.px(centre) - width / 2
        whole = _draw_bar(group, frame, left, width, bar.value, "whole")
        _add(whole, "title", text=f"{bar.name}: {parts[0]} {bar.label}")
        _add(group, "text", cls="value", x=frame.px(centre), y=frame.py(bar.value) - 6, text=bar.label)
        if bar.part is not None:
            part = min(bar.part, bar.value)
            solid = _draw_bar(group, frame, left, width, part, "part")
            _add(solid, "title", text=f"{bar.name}: {parts[1]} {bar.part_label}")
            top = frame.py(part)
            if frame.py(0) - top > LABEL_HEIGHT + 6:
                _add(group, "text", cls="inside", x=frame.px(centre), y=top + 15, text=bar.part_label)
    return ET.tostring(svg, encoding="unicode")


@dataclass(frozen=True)
class _Frame:
    """Data coordinates to pixels of the view box."""

    x: Axis
    y: Axis
    top: float

    def px(self, value: float) -> float:
        return LEFT + self.x.position(value) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        bottom = HEIGHT - BOTTOM
        return bottom - self.y.position(value) * (bottom - self.top)


def _add(parent: ET.Element, tag: str, *, cls: str = "", text: str = "", **attributes: object) -> ET.Element:
    """A child element; underscores in attribute names become hyphens, None is left out, floats shortened."""
    values = {
        k.replace("_", "-"): f"{v:.1f}" if isinstance(v, float) else str(v)
        for k, v in attributes.items()
        if v is not None
    }
    if cls:
        values["class"] = cls
    child = ET.SubElement(parent, tag, values)
    child.text = text or None
    return child


def _canvas(identity: str, title: str, description: str) -> ET.Element:
    svg = ET.Element(
        "svg",
        {
            "viewBox": f"0 0 {WIDTH} {HEIGHT}",
            "role": "img",
            "aria-labelledby": f"{identity}-title {identity}-desc",
        },
    )
    _add(svg, "title", id=f"{identity}-title", text=title)
    _add(svg, "desc", id=f"{identity}-desc", text=description)
    return svg


def _legend(svg: ET.Element, entries: Sequence[tuple[str, Callable[[ET.Element, int], None]]]) -> float:
    """Rows of swatch and name above the plot; returns where the plot may begin."""
    left, row = float(LEFT), 0
    for index, (name, swatch) in enumerate(entries):
        longest = int((WIDTH - LEFT - 48) / CHARACTER)
        name = name if len(name) <= longest else name[: longest - 1] + "…"
        width = 34 + CHARACTER * len(name) + 14
        if left > LEFT and left + width > WIDTH:
            left, row = float(LEFT), row + 1
        place = f"translate({left:.0f} {TOP + row * LEGEND_ROW})"
        entry = _add(svg, "g", cls=f"s{index % COLOURS}", transform=place)
        swatch(entry, index)
        _add(entry, "text", cls="legend", x=32, y=8, text=name)
        left += width
    return TOP + (row + 1) * LEGEND_ROW + 8 if entries else TOP + 8


def _swatch_line(parent: ET.Element, index: int) -> None:
    dash = DASHES[index % len(DASHES)] or None
    _add(parent, "polyline", cls="line", points="0,4 26,4", stroke_dasharray=dash)
    _add(parent, "path", cls="mark", d=MARKERS[index % len(MARKERS)], transform="translate(13 4)")


def _swatch_whole(parent: ET.Element, _: int) -> None:
    _add(parent, "rect", cls="whole", x=6, y=-2, width=18, height=12)


def _swatch_part(parent: ET.Element, _: int) -> None:
    parent.set("class", "s0")
    _add(parent, "rect", cls="part", x=6, y=-2, width=18, height=12)


def _draw_bands(svg: ET.Element, frame: _Frame, bands: Sequence[Band]) -> None:
    """Shades in turn darker and lighter; a name where it fits."""
    for index, band in enumerate(bands):
        left, right = frame.px(band.low), frame.px(band.high)
        tall = HEIGHT - BOTTOM - frame.top
        shade = _add(svg, "rect", cls=f"band band{index % 2}", x=left, y=frame.top, width=right - left, height=tall)
        _add(shade, "title", text=band.name)
        if right - left > CHARACTER * len(band.name) + 6:
            _add(svg, "text", cls="nothing", x=(left + right) / 2, y=HEIGHT - BOTTOM - 7.0, text=band.name)


def _draw_axes(svg: ET.Element, frame: _Frame) -> None:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    group = _add(svg, "g", cls="axes")
    for value, text in frame.y.ticks:
        y = frame.py(value)
        _add(group, "line", cls="grid", x1=LEFT, x2=right, y1=y, y2=y)
        _add(group, "text", cls="tick-y", x=LEFT - 8, y=y + 4, text=text)
    _add(group, "line", cls="axis", x1=LEFT, x2=right, y1=bottom, y2=bottom)
    for value, text in frame.x.ticks:
        x = frame.px(value)
        _add(group, "line", cls="axis", x1=x, x2=x, y1=bottom, y2=bottom + 5)
        _add(group, "text", cls="tick-x", x=x, y=bottom + 19, text=text)
    _add(group, "text", cls="axis-title x", x=(LEFT + right) / 2, y=HEIGHT - 12, text=frame.x.title)
    middle = (frame.top + bottom) / 2
    transform = f"translate(14 {middle:.0f}) rotate(-90)"
    _add(group, "text", cls="axis-title y", transform=transform, text=frame.y.title)


def _draw_point(group: ET.Element, frame: _Frame, index: int, tip: str, point: Point) -> None:
    x, y = frame.px(point.x), frame.py(point.y)
    if point.spread:
        low, high = (frame.py(value) for value in point.spread)
        caps = f"M{x - 5:.1f},{low:.1f}h10M{x:.1f},{low:.1f}V{high:.1f}M{x - 5:.1f},{high:.1f}h10"
        _add(group, "path", cls="whisker", d=caps)
    place = f"translate({x:.1f} {y:.1f})"
    mark = _add(group, "path", cls="mark", d=MARKERS[index % len(MARKERS)], transform=place)
    _add(mark, "title", text=tip)


def _draw_bar(group: ET.Element, frame: _Frame, left: float, width: float, value: float, cls: str) -> ET.Element:
    top = frame.py(value)
    return _add(group, "rect", cls=cls, x=left, y=top, width=width, height=frame.py(0) - top)


def _draw_labels(svg: ET.Element, frame: _Frame, series: Sequence[Series]) -> None:
    """The labels of points in one column share it without touching.

    A column of many shows only its highest and lowest; one too close to the last shows none (the page's table
    has every value).
    """
    columns: dict[float, list[tuple[float, float, int, str]]] = {}
    for index, line in enumerate(series):
        for point in line.points:
            if point.label:
                low, high = (frame.py(value) for value in point.spread or (point.y, point.y))
                columns.setdefault(frame.px(point.x), []).append((high, low, index, point.label))
    last = -math.inf
    for x in sorted(columns):
        if x - last < LABEL_GAP:
            continue
        last = x
        column = sorted(columns[x])
        if len(column) > LABELS_IN_COLUMN:
            column = [column[0], column[-1]]
        baselines = _baselines([(high, low) for high, low, _, _ in column], HEIGHT - BOTTOM)
        for (_, _, index, label), y in zip(column, baselines, strict=True):
            _add(svg, "text", cls=f"value s{index % COLOURS}", x=x, y=y, text=label)


def _baselines(extents: Sequence[tuple[float, float]], bottom: float) -> list[float]:
    """Baselines for the labels of one column; `extents` are (top, bottom) pixel of its points, topmost first.

    Points with no room for text between them form a cluster: its first label goes above it, the others below,
    so that no label covers a marker. A single lowest point has its label below; without room above the axis,
    labels go above their cluster. Labels that would still touch are moved apart.
    """
    clusters = [[extents[0]]]
    for extent in extents[1:]:
        lowest = max(low for _, low in clusters[-1])
        if extent[0] - lowest < LABEL_HEIGHT * len(clusters[-1]) + 16:
            clusters[-1].append(extent)
        else:
            clusters.append([extent])
    baselines: list[float] = []
    for number, cluster in enumerate(clusters, start=1):
        below = max(low for _, low in cluster) + 18
        start = cluster[0][0] - 9
        stacked = [start] + [below + LABEL_HEIGHT * i for i in range(len(cluster) - 1)]
        if len(cluster) == 1 and 1 < number == len(clusters):
            stacked = [below]
        if stacked[-1] > bottom - 4:
            stacked = [start - LABEL_HEIGHT * (len(cluster) - 1 - i) for i in range(len(cluster))]
        baselines += stacked
    for i in range(1, len(baselines)):
        baselines[i] = max(baselines[i], baselines[i - 1] + LABEL_HEIGHT)
    room = bottom - 4.0
    for i in reversed(range(len(baselines))):
        baselines[i] = min(baselines[i], room)
        room = baselines[i] - LABEL_HEIGHT
    return baselines
