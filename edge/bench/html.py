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
from edge.bench.measure import PERCENTILES, CaseResult, Summary
from edge.bench.power import power_lines, sensor_facts
from edge.bench.power_plots import time_plots
from edge.bench.report import SCHEMA_VERSION, Report, compare_peers, execution, notes
from edge.bench.tables import (
    format_bytes,
    format_number,
    format_percentiles,
    format_ratio,
    format_seconds,
    format_spread,
    ledger_cells,
    machine_line,
    model_line,
    power_tables,
    workload_line,
)

THIS_ENGINE = "this engine"
CONTEXT_AXIS = "Context (prompt tokens, log2 scale; 1K = 1,024)"
ENGINE_LABELS = {"kv": "KV cache type"}
CURVE_POINTS = 80


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
    strict = jinja2.StrictUndefined
    environment = jinja2.Environment(autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    style = Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))
    return environment.from_string(template.read_text(encoding="utf-8")).render(style=style, **values)


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
        ledger=ledger_cells(report),
        power_tables=power_tables(report, "\n", ""),
        power_figures=[
            Figure(plot.identity, plot.heading, plot.caption, Markup(plot.plot))
            for plot in time_plots(report.cases, report.telemetry, format_number)
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
        spread=lambda summary: format_spread(summary).replace(" to ", "–"),
        interval=_interval,
        percentile_cells=format_percentiles,
    )


def _tiles(cases: Sequence[CaseResult]) -> list[Tile]:
    first, last = cases[0], cases[-1]

    def tile(name: str, unit: str, text: Callable[[CaseResult], str]) -> Tile:
        details = [f"at {first.case.prompt_tokens:,} tokens"]
        if last is not first:
            details.append(f"{text(last)} {unit}".rstrip() + f" at {last.case.prompt_tokens:,}")
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
    return [
        _rate_figure(report, "prefill", "Prefill speed"),
        _rate_figure(report, "decode", "Decode speed"),
        _latency_figure(report.cases),
        _memory_figure(report.cases),
    ]


def _rate_figure(report: Report, phase: str, heading: str) -> Figure:
    """Tokens per second of one phase ("prefill" or "decode") over context, peers as further lines."""
    series = _rate_series(report, f"{phase}_tok_s")
    caption = "Median of the repetitions; whiskers from the slowest to the fastest."
    if report.peers:
        caption += " Other engines as measured beside it."
    contexts = [result.case.prompt_tokens for result in report.cases]
    contexts += [peer.prompt_tokens for peer in report.peers]
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
    ours = []
    for result in report.cases:
        rate: Summary | None = getattr(result, field)
        if rate:
            spread = (rate.low, rate.high) if rate.interval else None
            context = float(result.case.prompt_tokens)
            ours.append(svg.Point(context, rate.median, format_number(rate.median), spread))
    lines: dict[str, list[svg.Point]] = {}
    for peer in sorted(report.peers, key=lambda row: row.prompt_tokens):
        speed: float | None = getattr(peer, field)
        if speed is not None:
            point = svg.Point(float(peer.prompt_tokens), speed, format_number(speed))
            lines.setdefault(peer.name, []).append(point)
    named = [(THIS_ENGINE, ours), *lines.items()]
    return [svg.Series(name, tuple(points)) for name, points in named if points]


def _latency_figure(cases: Sequence[CaseResult]) -> Figure:
    """Percentile curves of the inter-token interval, one a context."""
    heading = "Inter-token latency"
    measured = [result for result in cases if result.intervals_s]
    last = _last_percentile(max((len(result.intervals_s) for result in measured), default=0))
    series = [svg.Series(f"{r.case.prompt_tokens:,} tokens", _percentile_points(r)) for r in measured]
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
        "Context (prompt tokens)",
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
    return svg.Bar(svg.binary_text(result.case.prompt_tokens), peak, format_number(peak), part, label)


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


def _interval(summary: Summary | None) -> str:
    if summary is None or summary.interval is None:
        return "-"
    return " to ".join(format_number(max(0.0, bound)) for bound in summary.interval)


def _label(key: str) -> str:
    text = key.replace("_", " ")
    return text[:1].upper() + text[1:]
