"""A ledger as a picture: one bar, a part for each line, and the budget as a mark. A plain .svg file."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from edge.memory.ledger import Line, total

_WIDTH, _MARGIN, _BAR_TOP, _BAR_HEIGHT, _ROW = 760, 20, 56, 44, 22
_COLOURS = (
    "#2b6cb0",
    "#63b3ed",
    "#c05621",
    "#f6ad55",
    "#2f855a",
    "#9ae6b4",
    "#6b46c1",
    "#d6bcfa",
    "#718096",
    "#cbd5e0",
)
_GIB = 1 << 30


def render_svg(model: str, device: str, lines: Sequence[Line], budget: int) -> str:
    """The text of the file. What is elsewhere than in memory is named below the bar and not drawn."""
    counted = [line for line in lines if not line.is_elsewhere and line.bytes]
    elsewhere = [line for line in lines if line.is_elsewhere]
    height = _BAR_TOP + _BAR_HEIGHT + 40 + _ROW * (len(counted) + len(elsewhere)) + _MARGIN
    svg = ET.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_WIDTH} {height}", role="img")
    svg.set("font-family", "system-ui, sans-serif")
    svg.set("font-size", "14")
    ET.SubElement(svg, "rect", width=str(_WIDTH), height=str(height), fill="white")
    needed = total(lines)
    verdict = "fits in" if needed <= budget else "does not fit in"
    _text(svg, _MARGIN, 30, f"{model}: {needed / _GIB:.2f} GiB {verdict} {budget / _GIB:.2f} GiB of {device}")
    scale = (_WIDTH - 2 * _MARGIN) / max(needed, budget, 1)
    x = float(_MARGIN)
    y = _BAR_TOP + _BAR_HEIGHT + 44
    for index, line in enumerate(counted):
        colour = _COLOURS[index % len(_COLOURS)]
        width = line.bytes * scale
        part = ET.SubElement(svg, "rect", x=f"{x:.1f}", y=str(_BAR_TOP), width=f"{width:.2f}", height=str(_BAR_HEIGHT))
        part.set("fill", colour)
        ET.SubElement(part, "title").text = f"{line.name}: {line.bytes / _GIB:.3f} GiB"
        x += width
        ET.SubElement(svg, "rect", x=str(_MARGIN), y=str(y - 12), width="14", height="14", fill=colour)
        _text(svg, _MARGIN + 24, y, f"{line.name}, {line.bytes / _GIB:.3f} GiB {_note(line)}")
        y += _ROW
    for line in elsewhere:
        _text(svg, _MARGIN + 24, y, f"{line.name} on the {line.where}, {line.bytes / _GIB:.3f} GiB {_note(line)}")
        y += _ROW
    mark = _MARGIN + budget * scale
    ET.SubElement(
        svg, "line", x1=f"{mark:.1f}", x2=f"{mark:.1f}", y1=str(_BAR_TOP - 8), y2=str(_BAR_TOP + _BAR_HEIGHT + 8)
    ).set("stroke", "#c53030")
    label = _text(svg, round(mark), _BAR_TOP + _BAR_HEIGHT + 22, f"budget {budget / _GIB:.2f} GiB")
    label.set("text-anchor", "end" if mark > _WIDTH / 2 else "start")
    label.set("fill", "#c53030")
    return ET.tostring(svg, encoding="unicode") + "\n"


def _text(svg: ET.Element, x: int, y: int, words: str) -> ET.Element:
    element = ET.SubElement(svg, "text", x=str(x), y=str(y))
    element.text = words
    return element


def _note(line: Line) -> str:
    return f"({line.note})" if line.note else ""
