"""The plots of the benchmark page: round ticks, marks in their places, labels that can be read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge.bench
from edge.bench import svg
from edge.bench.html import render_html
from edge.bench.options import PeerRow
from edge.bench.tables import format_number
from tests.bench_samples import MIB, case_result, of_class, plots, sample_report


@settings(max_examples=100)
@given(st.floats(1e-3, 1e7))
def test_linear_ticks_are_round_and_cover_the_values(highest: float) -> None:
    axis = svg.linear_axis("y (ms)", highest)
    step = axis.ticks[1][0]
    mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6
    assert 3 <= len(axis.ticks) <= 8 and highest < axis.high <= 2 * highest * 1.08
    shown = [float(said.replace(",", "")) for _, said in axis.ticks]
    assert shown == pytest.approx([value for value, _ in axis.ticks])


@settings(max_examples=100)
@given(st.lists(st.integers(1, 2**21), min_size=1, max_size=6))
def test_context_ticks_are_powers_of_two_inside_the_axis(contexts: list[int]) -> None:
    axis = svg.log2_axis("context", contexts)
    assert 1 <= len(axis.ticks) <= 9
    for value, said in axis.ticks:
        assert math.log2(value).is_integer() and axis.low <= value <= axis.high
        number, unit = re.fullmatch(r"([\d.]+)([KM]?)", said).groups()  # type: ignore[union-attr]
        assert float(number) * {"": 1, "K": 1024, "M": 1024**2}[unit] == value
    assert all(0 < axis.position(context) < 1 for context in contexts)
    assert axis.position(4 * contexts[0]) - axis.position(2 * contexts[0]) == pytest.approx(
        axis.position(2 * contexts[0]) - axis.position(contexts[0])
    )


def y_of_ticks(plot: ET.Element) -> tuple[list[float], list[float]]:
    """Pixel rows of the grid lines and the numbers printed beside them."""
    rows = [float(line.get("y1", "")) for line in of_class(plot, "grid")]
    return rows, [float((tick.text or "").replace(",", "")) for tick in of_class(plot, "tick-y")]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=5), st.lists(st.floats(1, 1e4), min_size=1, max_size=5))
def test_marks_bars_and_whiskers_stand_where_the_axis_says(rates: list[float], others: list[float]) -> None:
    cases = tuple(
        case_result(2**i, (2**i / rate, [1 / rate]), (2**i / rate / 1.5, [1 / rate]), peak=int(rate * MIB))
        for i, rate in enumerate(rates, start=7)
    )
    peers = tuple(PeerRow("peer", 2**i, rate, rate) for i, rate in enumerate(others, start=7))
    prefill, _, _, memory = plots(render_html(sample_report(cases=cases, peers=peers)))

    rows, values = y_of_ticks(prefill)
    scale = (values[-1] - values[0]) / (rows[-1] - rows[0])
    marks = [m for m in of_class(prefill, "mark") if m.find("title") is not None]
    read = [scale * (float((m.get("transform") or "").split()[1].rstrip(")")) - rows[0]) for m in marks]
    expected = others + [1.25 * rate for rate in rates]
    assert read == pytest.approx(expected, abs=abs(scale) * 0.11)
    whiskers = [re.findall(r",([\d.]+)h", w.get("d", "")) for w in of_class(prefill, "whisker")]
    ends = [[scale * (float(y) - rows[0]) for y in pair] for pair in whiskers]
    assert ends == [pytest.approx([rate, 1.5 * rate], abs=abs(scale) * 0.11) for rate in rates]

    rows, values = y_of_ticks(memory)
    scale = (values[-1] - values[0]) / (rows[0] - rows[-1])
    heights = [float(bar.get("height", "")) for bar in of_class(memory, "whole") if bar.find("title") is not None]
    unit = 1 if max(rates) < 1024 else 1024
    assert [scale * h for h in heights] == pytest.approx([rate / unit for rate in rates], abs=scale * 0.11)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0.1, 100), min_size=3, max_size=3), min_size=1, max_size=8))
def test_labels_never_overlap_and_stay_on_the_plot(lines: list[list[float]]) -> None:
    series = [
        svg.Series(f"s{n}", tuple(svg.Point(2.0**x, y, format_number(y)) for x, y in enumerate(ys, start=9)))
        for n, ys in enumerate(lines)
    ]
    axis = svg.linear_axis("y (ms)", max(max(ys) for ys in lines))
    plot = ET.fromstring(svg.line_plot("p", "t", "d", svg.log2_axis("x", [512, 2048]), axis, series))
    columns: dict[str, list[float]] = {}
    for label in of_class(plot, "value"):
        columns.setdefault(label.get("x", ""), []).append(float(label.get("y", "")))
    assert len(columns) == 3
    for baselines in columns.values():
        gaps = np.diff(sorted(baselines))
        assert all(gaps >= svg.LABEL_HEIGHT - 0.11)
        assert min(baselines) > 12 and max(baselines) <= svg.HEIGHT - svg.BOTTOM


@pytest.mark.parametrize("rates", [(60, 57), (60, 54), (60, 52), (60, 54, 50), (90, 60, 57), (90, 80, 40, 37)])
def test_labels_do_not_cover_markers(rates: tuple[float, ...]) -> None:
    series = [svg.Series(f"s{n}", (svg.Point(512.0, rate, str(rate)),)) for n, rate in enumerate(rates)]
    axes = svg.log2_axis("x", [512]), svg.linear_axis("y (ms)", max(rates))
    plot = ET.fromstring(svg.line_plot("p", "t", "d", *axes, series))
    marks = [m.get("transform", "") for m in of_class(plot, "mark") if m.find("title") is not None]
    rows = [float(place.split()[1].rstrip(")")) for place in marks]
    baselines = [float(label.get("y", "")) for label in of_class(plot, "value")]
    assert len(rows) == len(baselines) == len(rates)
    # digits reach 10 above their baseline, markers 4 around their centre
    assert all(baseline < row - 4 or baseline - 10 > row + 4 for baseline in baselines for row in rows)


def test_series_differ_by_more_than_colour() -> None:
    series = [svg.Series(f"peer {n}", (svg.Point(512.0, 1.0 + n, "1"),)) for n in range(4)]
    axes = svg.log2_axis("x", [512]), svg.linear_axis("y (ms)", 5)
    plot = ET.fromstring(svg.line_plot("p", "t", "d", *axes, series))
    lines = of_class(plot, "line")[:4]
    assert len({line.get("stroke-dasharray") for line in lines}) == 4
    assert len({mark.get("d") for mark in of_class(plot, "mark")}) == 4
    assert [text.text for text in of_class(plot, "legend")] == [s.name for s in series]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_have_readable_contrast_in_both_modes(mode: int) -> None:
    style = (Path(edge.bench.__file__).parent / "page.css").read_text().split("* { box-sizing")[0]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", style.split("prefers-color-scheme: dark")[mode]))
    assert {f"s{n}" for n in range(svg.COLOURS)} | {"text", "muted", "note"} <= set(colours)
    for surface in ("card", "page"):
        for name in set(colours) - {"card", "page", "line"}:
            light, dark = sorted((luminance(colours[surface]), luminance(colours[name])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{name} on {surface}"
