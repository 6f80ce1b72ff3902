"""A comparison as text: sections that terminal, Markdown and page share, and its JSON form."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edge.bench.compare.comparison import PHASES, Comparison, Row, Side, case_label, samples, warnings
from edge.bench.compare.facts import Figure, differences, figures, gates, ledger_figures
from edge.bench.numbers import NONE, format_number, format_ratio, plain_markdown
from edge.bench.options import PeerRow
from edge.bench.table import Section, empty_table, markdown_table
from edge.bench.tables import machine_line, model_line

SCHEMA_VERSION = 1
READING = (
    "Ratio: of geometric means; above 1, the candidate is faster. The interval is its row's own 95 %; the verdict is "
    "significant at 5 % with all rows of the comparison together (Welch's t test on logarithms, Holm's correction). "
    "With one run a side, what differs from run to run is in no interval."
)
_HEADING_WIDTH, _HEADING_LINES = 12, 3


def title(comparison: Comparison) -> str:
    """Who is compared with whom."""
    return f"{', '.join(side.name for side in comparison.candidates)} against {comparison.baseline.name}"


def side_line(side: Side) -> str:
    """What a side is: model, machine, and how many runs it stands for."""
    runs = f", {len(side.reports)} runs" if len(side.reports) > 1 else ""
    return f"{side.name}: {model_line(side.first)}; {machine_line(side.first.machine)}{runs}"


def sections(comparison: Comparison) -> list[Section]:
    """All tables, the differences first; those without rows are left out."""
    names = tuple(side.name for side in comparison.sides)
    found = [Section("What is different", ("Fact", *names), _cells(differences(comparison)), len(names) + 1, _FACTS)]
    found += [_speed_section(comparison, side) for side in comparison.candidates]
    found += [
        Section("Other figures", ("Case and figure", *names), tuple(_figure_rows(comparison)), 1, _FIGURES),
        Section("Memory", ("Line", *names), _figure_cells(ledger_figures(comparison)), 1, _LEDGER),
        *(_peer_section(comparison, phase) for phase in PHASES),
    ]
    return [section for section in found if section.rows]


_FACTS = "Facts of machine, engine and workload, as the reports record them."
_FIGURES = "Single figures have no spread: what they differ by is shown, not tested."
_LEDGER = "As measured; lines that nothing measures as planned."


def _cells(rows: Iterable[Any]) -> tuple[tuple[str, ...], ...]:
    return tuple((row.name, *row.values) for row in rows)


def _figure_cells(rows: Iterable[Figure], before: str = "") -> tuple[tuple[str, ...], ...]:
    return tuple((before + row.name + (f", {row.unit}" if row.unit == "ms" else ""), *row.cells()) for row in rows)


def _figure_rows(comparison: Comparison) -> Iterable[tuple[str, ...]]:
    for case, found in figures(comparison):
        yield from _figure_cells(found, f"{case_label(case)}: ")


def _speed_section(comparison: Comparison, side: Side) -> Section:
    rows = [row for row in comparison.rows if row.candidate == side.name]
    batched = any(row.case.batch > 1 for row in rows)
    headings = ["Prompt", "New", *(["Batch"] if batched else []), "Phase"]
    headings += [f"{comparison.baseline.name} tok/s", f"{side.name} tok/s", "Ratio", "95 % interval", "Verdict"]
    cells = []
    for row in rows:
        case = [f"{row.case.prompt_tokens:,}", f"{row.case.new_tokens:,}"]
        case += [str(row.case.batch)] if batched else []
        speeds = [format_number(row.baseline_tok_s), format_number(row.candidate_tok_s)]
        cells.append((*case, row.phase, *speeds, format_factor(row.ratio), format_interval(row), row.verdict))
    return Section(f"{side.name} against {comparison.baseline.name}", tuple(headings), tuple(cells), 0, READING)


def format_factor(ratio: float) -> str:
    """Three decimals up to 10, then three digits."""
    return f"{ratio:.3f}" if ratio < 9.9995 else format_number(ratio)


def format_interval(row: Row) -> str:
    """1.089–1.108; - without a spread."""
    return "–".join(map(format_factor, row.interval)) if row.interval else NONE


def _peer_section(comparison: Comparison, phase: str) -> Section:
    """Each peer's speed in one phase, and every side's median over it, where it measured that context and batch."""
    rows = []
    peers = [peer for peer in comparison.peers if getattr(peer, f"{phase}_tok_s") is not None]
    for peer in sorted(peers, key=lambda row: (row.batch, row.prompt_tokens, row.name)):
        theirs = getattr(peer, f"{phase}_tok_s")
        ours = [_side_speed(side, peer, phase) for side in comparison.sides]
        ratios = [format_ratio(speed / theirs if speed else None) for speed in ours]
        rows.append((peer_name(peer), f"{peer.prompt_tokens:,}", format_number(theirs), *ratios))
    headings = ("Engine", "Context", "tok/s", *(f"{side.name} / it" for side in comparison.sides))
    sources = dict.fromkeys(filter(None, map(peer_source, peers)))
    return Section(f"{phase.capitalize()} beside other engines", headings, tuple(rows), 1, " ".join(sources))


def _side_speed(side: Side, peer: PeerRow, phase: str) -> float | None:
    place = (peer.prompt_tokens, peer.batch)
    for case in side.cases():
        if (case.prompt_tokens, case.batch) == place and (speeds := samples(side, case, phase)):
            return median(speeds)
    return None


def peer_name(peer: PeerRow) -> str:
    """The engine, and its batch if it is not one."""
    return peer.name if peer.batch == 1 else f"{peer.name}, batch {peer.batch}"


def peer_source(peer: PeerRow) -> str:
    """Where a peer's figures come from and what they leave out, as a sentence; empty if nothing is known."""
    known = "; ".join(filter(None, (peer.source, peer.machine, peer.note)))
    return f"{peer.name}: {known}." if known else ""


def terminal(comparison: Comparison) -> RenderableType:
    """For a terminal of 80 columns; readable without colour and when piped into a file."""
    parts: list[RenderableType] = [Text(title(comparison), style="bold")]
    parts += [Text(side_line(side)) for side in comparison.sides]
    parts += [Text(f"Warning: {sentence}", style="bold") for sentence in warnings(comparison)]
    found = sections(comparison)
    if not differences(comparison):
        parts.append(Text("Nothing that the reports record is different."))
    last = ""
    for section in found:
        parts += [Text(), Text(section.heading, style="bold"), _table(section)]
        if section.caption and section.caption != last:
            parts.append(Text(section.caption, style="dim"))
            last = section.caption
    parts += [Text(), *(Text(f"Quality gate of {gate}") for gate in gates(comparison))] if gates(comparison) else []
    return Group(*parts)


def _table(section: Section) -> Table:
    table = empty_table()
    for index, heading in enumerate(section.headings):
        is_name = index < section.words or heading in ("Phase", "Verdict")
        lines = textwrap.wrap(heading, _HEADING_WIDTH, max_lines=_HEADING_LINES, placeholder="…")
        table.add_column(
            escape("\n".join(lines)),
            justify="left" if is_name else "right",
            overflow="fold",
            no_wrap=heading in ("Ratio", "95 % interval"),
        )
    for row in section.rows:
        table.add_row(*map(escape, row))
    return table


def markdown(comparison: Comparison) -> str:
    """For an issue or a pull request."""
    lines = [
        f"# {plain_markdown(title(comparison))}",
        "",
        *(f"- {plain_markdown(side_line(side))}" for side in comparison.sides),
    ]
    lines += ["", *(f"> **Warning:** {plain_markdown(sentence)}  " for sentence in warnings(comparison))]
    for section in sections(comparison):
        lines += ["", f"## {plain_markdown(section.heading)}", "", *markdown_table(section)]
        lines += ["", plain_markdown(section.caption)] if section.caption else []
    lines += (
        ["", *(f"- Quality gate of {plain_markdown(gate)}" for gate in gates(comparison))] if gates(comparison) else []
    )
    return "\n".join(lines) + "\n"


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain JSON values; speeds in tokens a second, p adjusted, sizes in bytes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "sides": [
            {"name": side.name, "runs": len(side.reports), "model": model_line(side.first)} for side in comparison.sides
        ],
        "warnings": warnings(comparison),
        "differences": [asdict(row) for row in differences(comparison)],
        "rows": [asdict(row) | {"verdict": row.verdict} for row in comparison.rows],
        "figures": [
            {"case": asdict(case), "figures": [asdict(figure) for figure in found]}
            for case, found in figures(comparison)
        ],
        "ledger": [asdict(figure) for figure in ledger_figures(comparison)],
        "gates": gates(comparison),
        "peers": [asdict(peer) for peer in comparison.peers],
    }


def to_json(comparison: Comparison) -> str:
    """The comparison as JSON text."""
    return json.dumps(to_dict(comparison), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def failure(rows: Sequence[Row], percent: float) -> str:
    """What --fail-if-slower says of the rows that are."""
    worst = sorted(rows, key=lambda row: row.ratio)
    said = [
        f"{row.candidate} at {row.phase} of {case_label(row.case)} ({format_factor(row.ratio)}, {format_interval(row)})"
        for row in worst[:3]
    ]
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return f"slower by more than {percent:g} %: {', '.join(said)}{more}"
