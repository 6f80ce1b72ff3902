"""The plot of bench/context.py: one SVG file with decode speed and the bytes behind it, over the context's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from edge.bench import svg
from edge.bench.tables import format_number

Lines = Mapping[str, Mapping[int, float]]  # name -> context -> value

HEADING, GAP, NOTE_ROW = 28, 8, 14  # pixels
STYLE = """
svg { background: #ffffff; font-family: system-ui, "Liberation Sans", "DejaVu Sans", sans-serif; }
text { fill: #16191d; font-size: 13px; font-variant-numeric: tabular-nums; }
.title { font-weight: 650; font-size: 14px; } .note { fill: #565d66; font-size: 11px; }
.tick-x, .value, .nothing, .axis-title { text-anchor: middle; } .tick-y { text-anchor: end; }
.tick-x, .tick-y, .nothing, .axis-title { fill: #565d66; }
.grid { stroke: #d9dde2; } .axis { stroke: #565d66; }
.line { fill: none; stroke: var(--c); stroke-width: 2.25; stroke-linejoin: round; }
.mark { fill: var(--c); stroke: #ffffff; }
.value { font-weight: 650; fill: var(--c); stroke: #ffffff; stroke-width: 3.5px; paint-order: stroke; }
.s0 { --c: #0b5cad; } .s1 { --c: #b34700; } .s2 { --c: #0f7a4b; } .s3 { --c: #8b3aa8; }
"""


def context_svg(notes: Sequence[str], speed: Lines, pool_megabytes: Lines) -> str:
    """Tokens a second, below it megabytes that a step reads of the pools, and lines that say what was measured on what.

    The two share their contexts' axis.
    """
    contexts = sorted({context for lines in (speed, pool_megabytes) for line in lines.values() for context in line})
    panels = (
        ("decode", "Decode speed", "Decode speed (tok/s)", speed),
        ("read", "Keys, values and compressed keys read by a decode step", "Read by a step (MB)", pool_megabytes),
    )
    row = svg.HEIGHT + HEADING + GAP
    height = len(panels) * row + NOTE_ROW * len(notes) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{svg.WIDTH}" height="{height}" '
        f'viewBox="0 0 {svg.WIDTH} {height}"><style>{STYLE}</style>'
    ]
    for index, (identity, heading, axis, lines) in enumerate(panels):
        plot = _panel(identity, heading, axis, contexts, lines)
        parts += [
            f'<text class="title" x="{svg.LEFT}" y="{index * row + 20}">{heading}</text>',
            f'<svg y="{index * row + HEADING}" width="{svg.WIDTH}" height="{svg.HEIGHT}">{plot}</svg>',
        ]
    for index, note in enumerate(notes):
        y = len(panels) * row + NOTE_ROW * index + GAP
        parts.append(f'<text class="note" x="{svg.LEFT}" y="{y}">{escape(note)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(identity: str, heading: str, axis: str, contexts: list[int], lines: Lines) -> str:
    """A minimum is a line without marks: it lies under what was measured."""
    series = []
    for name, values in lines.items():
        marked = not name.endswith("minimum")
        points = [svg.Point(n, y, format_number(y) if marked else "") for n, y in sorted(values.items())]
        if points:
            series.append(svg.Series(name, tuple(points)))
    said = "; ".join(f"{line.name} at {point.x:,.0f}: {point.y:.4g}" for line in series for point in line.points)
    return svg.line_plot(
        identity,
        f"{heading} over context",
        said,
        svg.log2_axis("Context (tokens, log2 scale; 1K = 1,024)", contexts),
        svg.linear_axis(axis, max(point.y for line in series for point in line.points)),
        series,
    )
