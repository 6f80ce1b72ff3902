"""The evaluation as one self-contained HTML page: a depth-by-length heat map a task, scores over length, tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup

from edge.bench import svg
from edge.bench.html import render_page
from edge.bench.tables import format_number
from edge.eval.report import (
    SCHEMA_VERSION,
    Cell,
    EvalReport,
    Result,
    attention_line,
    percent,
    perplexity_line,
    results,
    where_lines,
    workload_line,
)

LENGTH_AXIS = "Length (tokens of prompt and reply; 1K = 1,024)"
DEPTH_AXIS = "Needle depth (%)"
# Red over sand to blue: told apart without colour vision too, and every cell has its value printed.
COLOURS = ((0.0, (178, 60, 20)), (0.5, (244, 222, 178)), (1.0, (31, 106, 178)))
NOT_ASKED = "#9aa1a9"
BLACK, WHITE = "#000000", "#ffffff"  # one of the two has a contrast of 4.5 or more on any colour
LEFT, TOP, BOTTOM, SCALE = 92, 10, 54, 84  # pixels around the cells; SCALE is the legend's width
ROW, LEAST, MOST = 40, 160, 400  # pixels of a row, and of all rows together (the title beside them needs LEAST)


@dataclass(frozen=True)
class Box:
    """A cell of the heat map in pixels of the view box."""

    x: float
    y: float
    fill: str
    ink: str
    label: str
    tip: str


@dataclass(frozen=True)
class HeatMap:
    """What the template draws for a task: cells, and the labels of rows (y) and columns (x) at their middles."""

    task: str
    said: str
    width: float
    height: float
    cell_width: float
    cell_height: float
    boxes: tuple[Box, ...]
    rows: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, str], ...]


def colour(score: float) -> tuple[int, int, int]:
    """Red, green and blue (0..255) of a score from 0 to 1, between the nearest two of `COLOURS`."""
    (low, start), (high, end) = next(pair for pair in pairwise(COLOURS) if score <= pair[1][0])
    share = (score - low) / (high - low)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(start, end, strict=True))
    return red, green, blue


def ink_on(background: tuple[int, int, int]) -> str:
    """The text colour with more contrast on a background (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return WHITE if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else BLACK


def heat_map(task: str, rows: Sequence[Result]) -> HeatMap:
    """The cells of one task: lengths from left to right, depths from the top as in the text."""
    depths = len(rows[0].cells)
    height = min(max(ROW * depths, LEAST), MOST) / depths
    width = (svg.WIDTH - LEFT - SCALE) / len(rows)
    boxes, said = [], []
    for column, result in enumerate(rows):
        for row, cell in enumerate(result.cells):
            boxes.append(_box(LEFT + column * width, TOP + row * height, result.length, cell))
        cells = ", ".join(f"{_range(cell)} % deep {percent(cell.score)} %" for cell in result.cells)
        said.append(f"{result.length:,} tokens: {cells}")
    return HeatMap(
        task,
        "; ".join(said),
        svg.WIDTH,
        TOP + depths * height + BOTTOM,
        width,
        height,
        tuple(boxes),
        tuple((TOP + (row + 0.5) * height, _range(cell)) for row, cell in enumerate(rows[0].cells)),
        tuple((LEFT + (column + 0.5) * width, svg.binary_text(row.length)) for column, row in enumerate(rows)),
    )


def render_html(report: EvalReport) -> str:
    """The whole page as text; everything that comes from the report is escaped."""
    model, machine, execution = where_lines(report)
    rows = results(report)
    return render_page(
        Path(__file__).with_name("report.html"),
        report=report,
        model=model,
        machine=machine,
        execution=execution,
        workload=workload_line(report),
        attention=attention_line(report.settings.sparse),
        maps=_maps(rows),
        over_length=_over_length(rows),
        rows=rows,
        misses=[answer for answer in report.answers if answer.score < 1],
        perplexity=report.perplexity and perplexity_line(report.perplexity),
        stops=[(f"{100 * at:g}%", "#{:02x}{:02x}{:02x}".format(*rgb)) for at, rgb in COLOURS],
        schema_version=SCHEMA_VERSION,
        percent=percent,
        number=format_number,
        depth_range=_range,
        length_axis=LENGTH_AXIS,
        depth_axis=DEPTH_AXIS,
    )


def _maps(rows: Sequence[Result]) -> list[HeatMap]:
    tasks = dict.fromkeys(row.task for row in rows)
    return [heat_map(task, [row for row in rows if row.task == task]) for task in tasks]


def _box(x: float, y: float, length: int, cell: Cell) -> Box:
    where = f"{length:,} tokens, {_range(cell)} % deep"
    if cell.score is None:
        return Box(x, y, NOT_ASKED, BLACK, percent(None), f"{where}: not asked")
    background = colour(cell.score)
    tip = f"{where}: {percent(cell.score)} % of {cell.count:,} references found"
    return Box(x, y, "#{:02x}{:02x}{:02x}".format(*background), ink_on(background), percent(cell.score), tip)


def _range(cell: Cell) -> str:
    return f"{100 * cell.low:.3g}–{100 * cell.high:.3g}"


def _over_length(rows: Sequence[Result]) -> Markup | None:
    """Scores over length, a line a task; None where there is only one length."""
    lengths = sorted({row.length for row in rows})
    if len(lengths) < 2:
        return None
    lines: dict[str, list[svg.Point]] = {}
    for row in rows:
        point = svg.Point(row.length, 100 * row.score, percent(row.score))
        lines.setdefault(row.task, []).append(point)
    series = [svg.Series(task, tuple(points)) for task, points in lines.items()]
    said = "; ".join(f"{line.name} at {p.x:,.0f} tokens: {p.label} %" for line in series for p in line.points)
    ticks = tuple((float(tick), str(tick)) for tick in range(0, 101, 20))
    y = svg.Axis("Score (% of references found)", 0.0, 110.0, ticks)
    x = svg.log2_axis(LENGTH_AXIS, lengths)
    return Markup(svg.line_plot("plot-length", "Score over length", said, x, y, series))
