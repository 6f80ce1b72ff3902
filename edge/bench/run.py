"""A whole benchmark of an open engine: measured cases, and all that can be said of them."""

from __future__ import annotations

from dataclasses import replace

from edge.bench.gate import run_gate
from edge.bench.identity import identify
from edge.bench.measure import Progress
from edge.bench.options import BenchOptions
from edge.bench.report import Report, run_bench
from edge.bench.roofline import make_roofline
from edge.engine import Engine


def bench_engine(engine: Engine, options: BenchOptions, progress: Progress | None = None) -> Report:
    """`run_bench`, then roofline, quality gate and identity: they come last, so that they warm and heat nothing."""
    report = run_bench(engine, options, progress=progress)
    return replace(
        report,
        roofline=make_roofline(engine, report.cases, report.machine.board),
        gate=run_gate(engine) if options.gate else None,
        identity=identify(engine),
    )
