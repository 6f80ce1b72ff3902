"""The report as text: tables for the terminal (80 columns) and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edge.bench.machine import Machine
from edge.bench.numbers import NONE, format_bytes, format_number, format_ratio, format_seconds, plain_markdown
from edge.bench.options import PeerRow
from edge.bench.power import POWER_HEADINGS, clock_table, power_cells, power_lines
from edge.bench.report import Report, compare_peers, execution, notes
from edge.bench.samples import PERCENTILES, CaseResult, Summary
from edge.bench.sections import Section, case_cells, case_headings, sections
from edge.memory.ledger import MEMORY
from edge.memory.measured import Compared, totals

LEDGER_HEADINGS = ("Memory", "Planned", "Measured", "Difference")
PEER_HEADINGS = ("Engine", "Context", "Prefill tok/s", "ours / it", "Decode tok/s", "ours / it")


class CaptionedTable(NamedTuple):
    """A table's caption, its headings and its rows; the first column names the row."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def format_spread(summary: Summary | None) -> str:
    """Slowest to fastest repetition; empty where there is only one."""
    if summary is None or summary.interval is None:
        return ""
    return f"{format_number(summary.low)} to {format_number(summary.high)}"


def format_difference(row: Compared) -> str:
    """What was measured beyond the plan, in percent of it; empty where there is nothing to compare."""
    if row.difference is None or not row.planned:
        return NONE
    return f"{100 * row.difference / row.planned:+.1f} %".replace("-0.0", "0.0").replace("+0.0", "0.0")


def ledger_cells(report: Report) -> list[list[str]]:
    """Line, planned, measured and difference; the last row is the total of what the budget is for."""
    if not report.ledger:
        return []
    return [
        [
            row.name if row.where == MEMORY else f"{row.name} ({row.where})",
            format_bytes(row.planned),
            format_bytes(row.measured),
            format_difference(row),
        ]
        for row in (*report.ledger, totals(report.ledger))
    ]


def format_percentiles(result: CaseResult) -> list[str]:
    """p50, p90 and p99 of the inter-token intervals in milliseconds."""
    percentiles = result.interval_percentiles_s
    return [format_number(percentiles[p] * 1000 if percentiles else None) for p in PERCENTILES]


def machine_line(machine: Machine) -> str:
    """The hardware in one line."""
    name = f"{machine.board}, {machine.cpu_model}" if machine.board else machine.cpu_model
    cores = f"{machine.usable_cores} of {machine.logical_cores} cores"
    return f"{name}, {cores}, {format_bytes(machine.memory_bytes)} memory"


def model_line(report: Report) -> str:
    """The model and how its weights are stored."""
    model, weights = report.engine.get("model", "unknown model"), report.engine.get("weights")
    return f"{model}, {weights} weights" if weights else model


def peer_name(peer: PeerRow) -> str:
    """With the machine, if it is another one."""
    return f"{peer.name}, {peer.machine}" if peer.machine else peer.name


def peer_case(peer: PeerRow) -> str:
    """Its context, and its sequences if they are several."""
    return f"{peer.prompt_tokens:,}" + (f" x {peer.batch}" if peer.batch > 1 else "")


def peer_sources(report: Report) -> str:
    """One sentence for each source of figures that were not measured beside ours; "" if there is none."""
    found = dict.fromkeys(f"{peer.source}: {peer_name(peer)}" for peer in report.peers if peer.source)
    return f"{'; '.join(found)}." if found else ""


def workload_line(report: Report) -> str:
    """Repetitions and lengths: what one row of the results stands for."""
    repeats = _counted([len(result.repetitions) for result in report.cases], "repetition")
    new = _counted([result.case.new_tokens for result in report.cases], "new token")
    return f"{repeats} after a warm-up, {new} each"


def power_tables(report: Report, before_spread: str, after_spread: str) -> list[CaptionedTable]:
    """Power, and clocks; without those of which the machine showed nothing."""
    around = before_spread, after_spread
    power = power_cells(report.cases, format_number, format_spread, around)
    headings, clocks = clock_table(report.cases, NONE)
    tables = [
        CaptionedTable("Medians of the repetitions, and the lowest to the highest.", POWER_HEADINGS, power),
        CaptionedTable("Clocks over all repetitions: the median, in brackets the lowest.", headings, clocks),
    ]
    return [table for table in tables if table.rows]


def terminal(report: Report) -> RenderableType:
    """The report for a terminal of 80 columns; readable without colour and when piped into a file."""
    parts: list[RenderableType] = [
        Text(f"Benchmark of {model_line(report)}", style="bold"),
        Text(f"Measured on this machine: {machine_line(report.machine)}.\n{execution(report)}."),
        Text(f"{workload_line(report)}.\n"),
        _result_table(report),
    ]
    if any(len(result.repetitions) > 1 for result in report.cases):
        parts.append(Text("Medians; below them the slowest to the fastest repetition.", style="dim"))
    if report.peers:
        parts += [Text(), _named_table(PEER_HEADINGS, _peer_cells(report))]
        if sources := peer_sources(report):
            parts.append(Text(fill(sources, 80), style="dim"))
    for section in sections(report):
        parts += [Text(f"\n{section.heading}", style="bold"), _section_table(section)]
        parts.append(Text(fill(section.caption, 80), style="dim"))
    if report.ledger:
        parts += [Text(), _named_table(LEDGER_HEADINGS, ledger_cells(report))]
        parts.append(Text("Process and headroom are bounds; the total leaves out what is elsewhere.", style="dim"))
    for table in power_tables(report, "\n", ""):
        parts += [Text(), _named_table(table.headings, table.rows), Text(table.caption, style="dim")]
    parts += [Text(line, style="dim") for line in power_lines(report.telemetry)]
    if found := notes(report):
        parts += [Text(), *(Text(f"Note: {note}") for note in found)]
    return Group(*parts)


def markdown(report: Report) -> str:
    """The report as Markdown, for an issue or a README."""
    rows = [_result_cells(report, result, " (", ")") for result in report.cases]
    percentiles = [f"p{p} ms" for p in PERCENTILES]
    case = [heading.replace("\n", " ").strip() for heading in case_headings(report)]
    headings = [*case, "TTFT", "Prefill tok/s", "Decode tok/s", *percentiles, "Peak memory"]
    lines = [
        f"# Benchmark of {plain_markdown(model_line(report))}",
        "",
        plain_markdown(f"Measured on this machine: {machine_line(report.machine)}. {execution(report)}."),
        f"{workload_line(report)}; medians (slowest to fastest).",
        "",
        *_markdown_table(headings, rows),
    ]
    if report.peers:
        lines += ["", *_markdown_table(PEER_HEADINGS, _peer_cells(report))]
        lines += ["", plain_markdown(sources)] if (sources := peer_sources(report)) else []
    for section in sections(report):
        names = [heading.replace("\n", " ").strip() for heading in section.headings]
        lines += [
            "",
            f"## {section.heading}",
            "",
            *_markdown_table(names, section.rows),
            "",
            plain_markdown(section.caption),
        ]
    if report.ledger:
        lines += ["", *_markdown_table(LEDGER_HEADINGS, ledger_cells(report))]
    for table in power_tables(report, " (", ")"):
        lines += ["", *_markdown_table(table.headings, table.rows), "", table.caption]
    for line in power_lines(report.telemetry):
        lines += ["", plain_markdown(line)]
    lines += ["", *(f"- {note}" for note in notes(report))] if notes(report) else []
    return "\n".join(lines) + "\n"


def _result_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    rates, percentiles = ("Prefill\ntok/s", "Decode\ntok/s"), [f"p{p}\nms" for p in PERCENTILES]
    for heading in (*case_headings(report), "\nTTFT", *rates, *percentiles, "Peak\nmemory"):
        # only the spreads may wrap, between two numbers
        table.add_column(heading, justify="right", no_wrap=heading not in rates)
    for result in report.cases:
        table.add_row(*_result_cells(report, result, "\n", ""))
    return table


def _section_table(section: Section) -> Table:
    """Words wrap, numbers do not."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, heading in enumerate(section.headings):
        is_words = index < section.words
        table.add_column(heading, justify="left" if is_words else "right", no_wrap=not is_words)
    for row in section.rows:
        table.add_row(*map(escape, row))
    return table


def _named_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column is a name, the others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        is_name = heading == headings[0]
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=not is_name)
    for name, *cells in rows:
        table.add_row(escape(name), *cells)
    return table


def _result_cells(report: Report, result: CaseResult, before_spread: str, after_spread: str) -> list[str]:
    def with_spread(summary: Summary | None) -> str:
        spread = format_spread(summary)
        median = format_number(summary.median if summary else None)
        return f"{median}{before_spread}{spread}{after_spread}" if spread else median

    return [
        *case_cells(report, result.case),
        format_seconds(result.ttft_s.median),
        with_spread(result.prefill_tok_s),
        with_spread(result.decode_tok_s),
        *format_percentiles(result),
        format_bytes(result.memory.peak_bytes),
    ]


def _peer_cells(report: Report) -> list[list[str]]:
    return [
        [
            peer_name(row.peer),
            peer_case(row.peer),
            format_number(row.peer.prefill_tok_s),
            format_ratio(row.prefill_ratio),
            format_number(row.peer.decode_tok_s),
            format_ratio(row.decode_ratio),
        ]
        for row in compare_peers(report)
    ]


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, *rows]
    cells = [f"| {' | '.join(plain_markdown(cell) for cell in line)} |" for line in lines]
    return [cells[0], f"|{' ---: |' * len(headings)}", *cells[1:]]


def _counted(values: Sequence[int], noun: str) -> str:
    """3 repetitions, 1 repetition, or 3 to 5 repetitions."""
    low, high = min(values), max(values)
    return f"{low:,} {noun}{'s' * (low != 1)}" if low == high else f"{low:,} to {high:,} {noun}s"
