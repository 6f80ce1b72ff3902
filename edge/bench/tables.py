"""The report as text: tables for the terminal (80 columns) and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from rich.console import Group, RenderableType
from rich.text import Text

from edge.bench.machine import Machine
from edge.bench.numbers import (
    format_bytes,
    format_number,
    format_percentiles,
    format_ratio,
    format_seconds,
    format_summary,
    plain_markdown,
)
from edge.bench.options import PeerRow
from edge.bench.power_sections import power_lines, power_sections
from edge.bench.report import Report, compare_peers, execution, notes
from edge.bench.samples import PERCENTILES
from edge.bench.sections import case_cells, case_headings, sections
from edge.bench.table import Section, markdown_table, terminal_table

RATES = ("Prefill\ntok/s", "Decode\ntok/s")
PEER_HEADINGS = ("Engine", "Context", "Prefill tok/s", "ours / it", "Decode tok/s", "ours / it")


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


def terminal(report: Report) -> RenderableType:
    """The report for a terminal of 80 columns; readable without colour and when piped into a file."""
    parts: list[RenderableType] = [
        Text(f"Benchmark of {model_line(report)}", style="bold"),
        Text(f"Measured on this machine: {machine_line(report.machine)}.\n{execution(report)}."),
        Text(f"{workload_line(report)}.\n"),
        terminal_table(_results(report), RATES),
    ]
    if any(len(result.repetitions) > 1 for result in report.cases):
        parts.append(Text("Medians; below them the slowest to the fastest repetition.", style="dim"))
    for section in _further_sections(report):
        parts += [Text(), Text(section.heading, style="bold")] if section.heading else [Text()]
        parts.append(terminal_table(section))
        if section.caption:
            parts.append(Text(fill(section.caption, 80), style="dim"))
    parts += [Text(fill(line, 80), style="dim") for line in power_lines(report.telemetry)]
    if found := notes(report):
        parts += [Text(), *(Text(f"Note: {note}") for note in found)]
    return Group(*parts)


def markdown(report: Report) -> str:
    """The report as Markdown, for an issue or a README."""
    lines = [
        f"# Benchmark of {plain_markdown(model_line(report))}",
        "",
        plain_markdown(f"Measured on this machine: {machine_line(report.machine)}. {execution(report)}."),
        f"{workload_line(report)}; medians (slowest to fastest).",
        "",
        *markdown_table(_results(report)),
    ]
    for section in _further_sections(report):
        lines += ["", f"## {section.heading}"] if section.heading else []
        lines += ["", *markdown_table(section)]
        lines += ["", plain_markdown(section.caption)] if section.caption else []
    for line in power_lines(report.telemetry):
        lines += ["", plain_markdown(line)]
    lines += ["", *(f"- {note}" for note in notes(report))] if notes(report) else []
    return "\n".join(lines) + "\n"


def _results(report: Report) -> Section:
    percentiles = (f"p{p}\nms" for p in PERCENTILES)
    rows = [
        (
            *case_cells(report, result.case),
            format_seconds(result.ttft_s.median),
            format_summary(result.prefill_tok_s),
            format_summary(result.decode_tok_s),
            *format_percentiles(result),
            format_bytes(result.memory.peak_bytes),
        )
        for result in report.cases
    ]
    return Section("", (*case_headings(report), "\nTTFT", *RATES, *percentiles, "Peak\nmemory"), rows, words=0)


def _further_sections(report: Report) -> list[Section]:
    """All tables but the results', in the order of reading."""
    peers = [_peers(report)] if report.peers else []
    return [*peers, *sections(report), *power_sections(report.cases)]


def _peers(report: Report) -> Section:
    rows = [
        (
            peer_name(row.peer),
            peer_case(row.peer),
            format_number(row.peer.prefill_tok_s),
            format_ratio(row.prefill_ratio),
            format_number(row.peer.decode_tok_s),
            format_ratio(row.decode_ratio),
        )
        for row in compare_peers(report)
    ]
    return Section("Beside other engines", PEER_HEADINGS, rows, caption=peer_sources(report))


def _counted(values: Sequence[int], noun: str) -> str:
    """3 repetitions, 1 repetition, or 3 to 5 repetitions."""
    low, high = min(values), max(values)
    return f"{low:,} {noun}{'s' * (low != 1)}" if low == high else f"{low:,} to {high:,} {noun}s"
