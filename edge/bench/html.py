"""The report as one self-contained HTML page: no script, no outside resource."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from edge.bench import svg
from edge.bench.machine import Machine
from edge.bench.numbers import (
    format_bytes,
    format_number,
    format_percentiles,
    format_ratio,
    format_seconds,
    format_summary,
)
from edge.bench.power_plots import time_plots
from edge.bench.power_sections import power_lines, power_sections, sensor_facts
from edge.bench.report import SCHEMA_VERSION, Report, compare_peers, execution, notes
from edge.bench.samples import PERCENTILES, CaseResult, Summary
from edge.bench.sections import case_cells, case_headings, sections
from edge.bench.tables import (
    machine_line,
    model_line,
    peer_case,
    peer_name,
    peer_sources,
    workload_line,
)

THIS_ENGINE = "this engine"
CONTEXT_AXIS = "Context (prompt tokens, log2 scale; 1K = 1,024)"
BATCH_AXIS = "Batch (sequences decoded together, log2 scale)"
ENGINE_LABELS = {"kv": "KV cache type"}
CURVE_POINTS = 80
MOST_CURVES = svg.COLOURS  # of one plot


@dataclass(frozen=True)
class Tile:
    """One headline figure at the shortest context, and how it is at the longest."""

    name: str
    value: str
    unit: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A plot with its heading and the sentence under it."""

    identity: str
    heading: str
    caption: str
    plot: Markup


def render_page(template: Path, **values: Any) -> str:
    """A page from its template; `style` is the style sheet that all reports share. Values are escaped."""
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, here]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((here / "page.css").read_text(encoding="utf-8"))
    return environment.get_template(template.name).render(style=style, **values)


def render_html(report: Report) -> str:
    """The whole page as text; everything that comes from the report is escaped."""
    return render_page(
        Path(__file__).with_name("report.html"),
        report=report,
        model=model_line(report),
        machine=machine_line(report.machine),
        execution=execution(report),
        workload=workload_line(report),
        schema_version=SCHEMA_VERSION,
        tiles=_tiles(report.cases),
        figures=_figures(report),
        comparisons=compare_peers(report),
        peer_name=peer_name,
        peer_case=peer_case,
        peer_sources=peer_sources(report),
        sections=sections(report),
        case_headings=case_headings(report),
        case_cells=lambda case: case_cells(report, case),
        power_sections=power_sections(report.cases),
        power_figures=[
            Figure(plot.identity, plot.heading, plot.caption, Markup(plot.plot))
            for plot in time_plots(report.cases, report.telemetry)
        ],
        power_lines=power_lines(report.telemetry),
        notes=notes(report),
        machine_facts=_machine_facts(report.machine, report.other_cpu) | sensor_facts(report.telemetry),
        engine_facts={ENGINE_LABELS.get(k, _label(k)): v for k, v in report.engine.items()},
        percentiles=PERCENTILES,
        number=format_number,
        seconds=format_seconds,
        size=format_bytes,
        ratio=lambda value: format_ratio(value).replace("x", "×"),
        summary=format_summary,
        percentile_cells=format_percentiles,
    )


def _tiles(cases: Sequence[CaseResult]) -> list[Tile]:
    first, last = cases[0], cases[-1]

    def tile(name: str, unit: str, text: Callable[[CaseResult], str]) -> Tile:
        details = [f"at {first.case.label}"]
        if last is not first:
            details.append(f"{text(last)} {unit}".rstrip() + f" at {last.case.label.replace(' tokens', '')}")
        return Tile(name, text(first), unit, tuple(details))

    def median(summary: Summary | None) -> str:
        return format_number(summary.median if summary else None)

    return [
        tile("Prefill", "tok/s", lambda case: median(case.prefill_tok_s)),
        tile("Decode", "tok/s", lambda case: median(case.decode_tok_s)),
        tile("Time to first token", "", lambda case: format_seconds(case.ttft_s.median)),
        tile("Peak memory", "", lambda case: format_bytes(case.memory.peak_bytes)),
    ]


def _figures(report: Report) -> list[Figure]:
    batches = [_batch_figure(report)] if report.has_batches else []
    return [
        _rate_figure(report, "prefill", "Prefill speed"),
        _rate_figure(report, "decode", "Decode speed"),
        *batches,
        _latency_figure(report.cases),
        _memory_figure(report.cases),
    ]


def _rate_figure(report: Report, phase: str, heading: str) -> Figure:
    """Tokens per second of one phase ("prefill" or "decode") over context, peers as further lines."""
    series = _rate_series(report, f"{phase}_tok_s")
    caption = "Median of the repetitions; whiskers from the slowest to the fastest."
    if report.peers:
        caption += " Other engines as measured beside it, or as published where a machine is named."
    if report.has_batches:
        caption += " Of all sequences together."
    contexts = [result.case.prompt_tokens for result in report.cases]
    contexts += [peer.prompt_tokens for peer in report.peers if getattr(peer, f"{phase}_tok_s") is not None]
    highest = max((max(p.y, p.spread[1] if p.spread else 0.0) for s in series for p in s.points), default=0.0)
    said = "; ".join(f"{s.name} at {p.x:,.0f} tokens: {p.label} tok/s" for s in series for p in s.points)
    plot = svg.line_plot(
        f"plot-{phase}",
        f"{heading} over context",
        said or "Nothing was measured.",
        svg.log2_axis(CONTEXT_AXIS, contexts),
        svg.linear_axis(f"{heading} (tok/s)", highest),
        series,
    )
    return Figure(f"plot-{phase}", heading, caption, Markup(plot))


def _rate_series(report: Report, field: str) -> list[svg.Series]:
    """Our line with its spread, then one line a peer; `field` is the name that cases and peers share."""
    lines: dict[str, list[svg.Point]] = {}
    for result in report.cases:
        name = f"{THIS_ENGINE} x {result.case.batch}" if report.has_batches else THIS_ENGINE
        lines.setdefault(name, []).extend(_rate_points(result.case.prompt_tokens, getattr(result, field)))
    for peer in sorted(report.peers, key=lambda row: row.prompt_tokens):
        speed: float | None = getattr(peer, field)
        if speed is not None:
            name = peer_name(peer) + (f" x {peer.batch}" if peer.batch > 1 else "")
            point = svg.Point(float(peer.prompt_tokens), speed, format_number(speed))
            lines.setdefault(name, []).append(point)
    return [svg.Series(name, tuple(points)) for name, points in lines.items() if points]


def _rate_points(x: int, rate: Summary | None) -> list[svg.Point]:
    """The median with its whisker; nothing if it was not measured."""
    if rate is None:
        return []
    spread = (rate.low, rate.high) if rate.interval else None
    return [svg.Point(float(x), rate.median, format_number(rate.median), spread)]


def _batch_figure(report: Report) -> Figure:
    """Decode speed of all sequences over their number, a line a context."""
    lines: dict[str, list[svg.Point]] = {}
    for result in report.cases:
        name = f"{result.case.prompt_tokens:,} tokens each"
        lines.setdefault(name, []).extend(_rate_points(result.case.batch, result.decode_tok_s))
    series = [svg.Series(name, tuple(points)) for name, points in lines.items() if points]
    highest = max((max(p.y, p.spread[1] if p.spread else 0.0) for s in series for p in s.points), default=0.0)
    said = "; ".join(f"{s.name}, {p.x:g} sequences: {p.label} tok/s" for s in series for p in s.points)
    plot = svg.line_plot(
        "plot-batch",
        "Decode speed over batch",
        said or "Nothing was measured.",
        svg.log2_axis(BATCH_AXIS, [result.case.batch for result in report.cases]),
        svg.linear_axis("Decode speed of all (tok/s)", highest),
        series,
    )
    caption = "Weights are read once a step for all sequences, so that more of them get more out of the same bytes."
    return Figure("plot-batch", "Decode speed over batch", caption, Markup(plot))


def _latency_figure(cases: Sequence[CaseResult]) -> Figure:
    """Percentile curves of the inter-token interval, one a context."""
    heading = "Inter-token latency"
    measured = _some([result for result in cases if result.intervals_s])
    last = _last_percentile(max((len(result.intervals_s) for result in measured), default=0))
    series = [svg.Series(r.case.label, _percentile_points(r)) for r in measured]
    highest = max((point.y for line in series for point in line.points), default=0.0)
    said = "; ".join(f"{s.name}: " + ", ".join(f"p{p.x:g} {p.label} ms" for p in s.points if p.label) for s in series)
    plot = svg.line_plot(
        "plot-latency",
        "Inter-token latency by percentile",
        said or "Nothing was measured: a case needs at least two new tokens.",
        svg.percentile_axis("Percentile of the intervals (axis stretched towards the tail)", last),
        svg.linear_axis("Inter-token latency (ms)", highest),
        series,
    )
    caption = "How long a reader waits between two tokens: the share of intervals at or below each value."
    return Figure("plot-latency", heading, caption, Markup(plot))


def _some(results: list[CaseResult]) -> list[CaseResult]:
    """As many as a plot can tell apart, from the first to the last."""
    if len(results) <= MOST_CURVES:
        return results
    return [results[round(i * (len(results) - 1) / (MOST_CURVES - 1))] for i in range(MOST_CURVES)]


def _last_percentile(samples: int) -> float:
    """Where a curve of so many samples ends: 1 - 1/n, and at least p99, which the table gives too."""
    return max(float(PERCENTILES[-1]), 100 * (1 - 1 / max(samples, 1)))


def _percentile_points(result: CaseResult) -> tuple[svg.Point, ...]:
    end = -math.log10(1 - _last_percentile(len(result.intervals_s)) / 100)
    curve = 100 * (1 - 10.0 ** -np.linspace(0, end, CURVE_POINTS))
    percentiles = np.unique(np.concatenate([curve, np.array(PERCENTILES, float)]))
    values = 1000 * np.percentile(result.intervals_s, percentiles)
    return tuple(
        svg.Point(p, v, format_number(v) if p in PERCENTILES else "")
        for p, v in zip(percentiles.tolist(), values.tolist(), strict=True)
    )


def _memory_figure(cases: Sequence[CaseResult]) -> Figure:
    highest = max(result.memory.peak_bytes for result in cases)
    unit, size = ("MiB", 2**20) if highest < 2**30 else ("GiB", 2**30)
    bars = [_memory_bar(result, size) for result in cases]
    said = "; ".join(
        f"{bar.name} tokens: peak {bar.label} {unit}, private {bar.part_label or 'unknown'}" for bar in bars
    )
    plot = svg.bar_plot(
        "plot-memory",
        "Peak memory over context",
        said,
        "Context (prompt tokens)" + (" x sequences" if any(r.case.batch > 1 for r in cases) else ""),
        svg.linear_axis(f"Resident memory ({unit})", highest / size),
        bars,
        ("peak resident", "private, at the last token"),
    )
    caption = "Private memory is what the process allocated itself; the rest is mapped files, such as weights."
    return Figure("plot-memory", "Peak memory", caption, Markup(plot))


def _memory_bar(result: CaseResult, size: int) -> svg.Bar:
    peak, private = result.memory.peak_bytes / size, result.memory.anonymous_bytes
    part = None if private is None else private / size
    label = "" if part is None else format_number(part)
    name = svg.binary_text(result.case.prompt_tokens) + (f"x{result.case.batch}" if result.case.batch > 1 else "")
    return svg.Bar(name, peak, format_number(peak), part, label)


def _machine_facts(machine: Machine, other_cpu: float | None) -> dict[str, str]:
    others = "unknown" if other_cpu is None else f"{other_cpu:.0%} of the CPU meanwhile"
    facts = {"Board": machine.board} if machine.board else {}
    return facts | {
        "CPU": machine.cpu_model,
        "Cores": f"{machine.usable_cores} usable of {machine.logical_cores}",
        "Instruction sets": ", ".join(machine.instruction_sets) or "unknown",
        "Clock governor": machine.cpu_governor,
        "Used by other processes": others,
        "Memory": format_bytes(machine.memory_bytes),
        "Accelerator": machine.accelerator,
        "System": machine.os,
        "Python": machine.python,
        "Packages": ", ".join(f"{name} {version}" for name, version in machine.packages.items()),
        "Measured at": machine.timestamp.replace("T", " ").replace("+00:00", " UTC"),
    }


def _label(key: str) -> str:
    text = key.replace("_", " ")
    return text[:1].upper() + text[1:]
