"""`edge bench`: measure a bundle on this machine and write the report."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge.cli import options as opt
from edge.cli.console import note, out, print_json, progress_bar
from edge.errors import UsageError

if TYPE_CHECKING:
    from edge.telemetry.recorder import Recorder

Sensors = Annotated[
    int, typer.Option(min=0, metavar="MS", help="Read power, clocks and temperatures so often; 0: not at all.")
]
_COLD = {"prefix_cache": False}  # every prompt is to be timed as if it were the first


def bench(
    invocation: typer.Context,
    bundle: Annotated[Path | None, typer.Argument(help="Folder that `edge export` wrote.", metavar="BUNDLE")] = None,
    static: Annotated[
        bool, typer.Option("--static", help="No bundle, no run: what the compiled CUDA kernels cost, and bounds.")
    ] = False,
    contexts: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "128,512,2048",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after each prompt.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Repetitions of each length, after one warm-up.")] = 3,
    html: Annotated[Path | None, typer.Option(help="Write the report as one self-contained page.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    context: opt.Context = None,
    memory: opt.Memory = None,
    threads: opt.Threads = None,
    chunk: opt.Chunk = 512,
    attention: opt.Attention = None,
    sparse: opt.Sparse = None,
    offload: opt.Offload = None,
    speculative: opt.Speculative = None,
    sensors: Sensors = 100,
    json: opt.Json = False,
) -> None:
    """Measure prefill and decode speed, time to first token, latency percentiles and peak memory.

    With --static nothing runs: what the compiled CUDA kernels use, and upper bounds of the decode speed on GPUs.

    Examples:

      edge bench bundle

      edge bench bundle --contexts 512,8192 --html report.html

      edge bench --static --json
    """
    if static:
        _report_static(invocation, json)
        return
    if bundle is None:
        raise UsageError("no bundle to measure; give the folder that `edge export` wrote, or --static")
    from edge.bench.html import render_html
    from edge.bench.measure import BenchCase
    from edge.bench.report import run_bench, to_json, write_text
    from edge.bench.tables import markdown as as_markdown
    from edge.bench.tables import terminal

    cases = [BenchCase(length, new_tokens) for length in _lengths(contexts)]
    reports = [(html, render_html), (markdown, as_markdown), (output, to_json)]
    wanted = [(path, render) for path, render in reports if path is not None]
    for path, _ in wanted:
        opt.check_output(path)
    context = context or max(case.prompt_tokens for case in cases) + new_tokens
    engine = opt.load_engine(bundle, context, memory, threads, chunk, attention, sparse, offload, speculative, **_COLD)
    with progress_bar("measuring", quiet=json) as progress, _meter(sensors) as meter:
        report = run_bench(engine, cases, repeat=repeat, progress=progress, meter=meter)
    for path, render in wanted:
        write_text(path, render(report))
        note(f"report written to {path}")
    print(to_json(report)) if json else out.print(terminal(report))


def _meter(milliseconds: int) -> AbstractContextManager[Recorder | None]:
    """The machine's sensors, or none."""
    from edge.telemetry.recorder import open_recorder

    return open_recorder(milliseconds / 1e3) if milliseconds else nullcontext()


def _report_static(invocation: typer.Context, json: bool) -> None:
    """Compile the kernels and print their costs; UsageError if any option but --json was given."""
    for name in invocation.params:
        source = invocation.get_parameter_source(name)
        if name not in ("static", "json") and source is not None and source.name == "COMMANDLINE":
            what = "a bundle" if name == "bundle" else f"--{name.replace('_', '-')}"
            raise UsageError(f"--static runs nothing, so {what} has no meaning beside it; leave one of them out")
    from edge.bench.static import bounds, terminal, to_values
    from plugins.build.budgets import measure
    from plugins.build.registry import product_launches

    with progress_bar("compiling", quiet=json) as progress:
        costs = measure(product_launches().values(), progress)
    if json:
        print_json(to_values(costs, bounds()))
    else:
        out.print(terminal(costs, bounds()))


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--contexts {text!r} is no list of whole numbers; write it as 128,512,2048") from None
    if min(lengths) < 1:
        raise UsageError(f"--contexts {text!r} holds a length below 1; the shortest prompt has one token")
    return lengths
