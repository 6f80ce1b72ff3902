"""`edge bench`: measure a bundle on this machine and write the report."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from edge.cli import options as opt
from edge.cli.compare import Peers, load_peers
from edge.cli.console import note, out, print_json, progress_bar
from edge.cli.report_files import wanted_forms, write_forms
from edge.errors import EdgeError, UsageError

if TYPE_CHECKING:
    from edge.bench.workload import Workload
    from edge.engine import Engine

Bundle = Annotated[Path | None, typer.Argument(help="Folder that `edge export` wrote.", metavar="BUNDLE")]
Static = Annotated[
    bool, typer.Option("--static", help="No bundle, no run: what the compiled CUDA kernels cost, and bounds.")
]
WorkloadName = Annotated[
    str, typer.Option("--workload", metavar="NAME|FILE", help="What to measure; `list` shows what there is.")
]
Contexts = Annotated[
    str | None, typer.Option(help="Prompt lengths, separated by commas. Default: the workload's, 128,512,2048.")
]
Batch = Annotated[
    str | None, typer.Option(metavar="N,...", help="Sequences decoded together, separated by commas. Default: 1.")
]
NewTokens = Annotated[
    int | None, typer.Option(min=2, help="Tokens generated after each prompt. Default: the workload's, 32.")
]
Repeat = Annotated[
    int | None, typer.Option(min=1, help="Repetitions of each case, after one warm-up. Default: the workload's, 3.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Another seed makes other prompts. Default: 0.")]
Gate = Annotated[
    bool, typer.Option("--gate/--no-gate", help="Check the engine's tokens, too; exit code 1 if they are wrong.")
]
Html = Annotated[Path | None, typer.Option(help="Write the report as one self-contained page.")]
Markdown = Annotated[Path | None, typer.Option(help="Write the report as Markdown.")]
Output = Annotated[Path | None, typer.Option(help="Write the report as JSON.")]


def bench(
    invocation: typer.Context,
    bundle: Bundle = None,
    static: Static = False,
    workload: WorkloadName = "quick",
    contexts: Contexts = None,
    batch: Batch = None,
    new_tokens: NewTokens = None,
    repeat: Repeat = None,
    seed: Seed = None,
    gate: Gate = True,
    html: Html = None,
    markdown: Markdown = None,
    output: Output = None,
    context: opt.Context = None,
    memory: opt.Memory = None,
    threads: opt.Threads = None,
    chunk: opt.Chunk = 512,
    attention: opt.Attention = None,
    sparse: opt.Sparse = None,
    offload: opt.Offload = None,
    speculative: opt.Speculative = None,
    peer: Peers = None,
    json: opt.Json = False,
) -> None:
    """Measure prefill and decode speed, latency percentiles and peak memory, beside what the hardware allows.

    With --static nothing runs: what the compiled CUDA kernels use, and upper bounds of the decode speed on GPUs.

    Examples:

      edge bench bundle

      edge bench bundle --contexts 512,8192 --batch 1,4,8 --peer llama-bench.json --html report.html

      edge bench bundle --workload announcement-orin --output report.json

      edge bench --static --json

    `edge bench compare` sets reports beside each other. A folder named compare is ./compare here.
    """
    if invocation.invoked_subcommand is not None:
        return
    given = _given(invocation)
    if static:
        _report_static(given, json)
    elif workload == "list":
        _list_workloads(json)
    elif bundle is None:
        raise UsageError("no bundle to measure; give the folder that `edge export` wrote, or --static")
    else:
        _measure(bundle, _choose(given, workload), given, gate, json)


def _given(invocation: typer.Context) -> dict[str, Any]:
    """What the user said himself, by parameter."""
    sources = {name: invocation.get_parameter_source(name) for name in invocation.params}
    return {name: invocation.params[name] for name, s in sources.items() if s is not None and s.name == "COMMANDLINE"}


def _choose(given: Mapping[str, Any], name: str) -> Workload:
    """The workload, with what the user wants otherwise."""
    from edge.bench.workload import load_workload

    workload = load_workload(name)
    changes: dict[str, Any] = {}
    if "contexts" in given:
        changes |= {"lengths": _numbers(given["contexts"], "contexts", "128,512,2048"), "whole": False}
    if "batch" in given:
        changes["batches"] = _numbers(given["batch"], "batch", "1,4,8")
    names = {"new_tokens": "new_tokens", "repeat": "repetitions", "seed": "seed"}
    changes |= {field: given[option] for option, field in names.items() if option in given}
    return replace(workload, **changes)


def _measure(bundle: Path, workload: Workload, given: Mapping[str, Any], gate: bool, json: bool) -> None:
    """Open an engine for the cases that fit, measure them, write and print the report; EdgeError if the gate failed."""
    from edge.bench.fit import open_fitting
    from edge.bench.html import render_html
    from edge.bench.options import BenchOptions
    from edge.bench.report import to_json
    from edge.bench.run import bench_engine
    from edge.bench.tables import markdown, terminal

    forms = (("html", render_html), ("markdown", markdown), ("output", to_json))
    wanted = wanted_forms(*((given.get(name), render) for name, render in forms))
    peers = (*workload.peers(), *load_peers(given.get("peer")))
    settings = _engine_options(bundle, workload, given)

    def open_engine(tokens: int, sequences: int) -> Engine:
        rows = max(opt.EngineOptions.logits_rows, 2 * sequences)
        context = given.get("context", tokens)
        return opt.load_engine(bundle, context, **settings, sequences=sequences, logits_rows=rows, prefix_cache=False)

    engine, cases, skipped = open_fitting(workload.cases(), open_engine)
    options = BenchOptions(cases, workload.repetitions, workload.seed, peers, skipped, workload.facts, gate=gate)
    with progress_bar("measuring", quiet=json) as progress:
        report = bench_engine(engine, options, progress)
    write_forms(wanted, report)
    print(to_json(report)) if json else out.print(terminal(report))
    if report.gate is not None and (failure := report.gate.failure) is not None:
        raise EdgeError(failure)


def _engine_options(bundle: Path, workload: Workload, given: Mapping[str, Any]) -> dict[str, Any]:
    """For load_engine: the workload's, or what the user said."""
    from edge.bundle import open_bundle

    wanted = workload.engine
    speculative = wanted.speculative
    if speculative == "eagle":
        manifest = open_bundle(bundle, verify=False).manifest
        if manifest.draft is None or manifest.target != "onnxruntime":
            speculative = "lookup"
            note("the workload wants a draft model and none can run here: --speculative lookup instead")
    return {
        "memory": given.get("memory"),
        "threads": given.get("threads"),
        "chunk": given.get("chunk", wanted.chunk or opt.EngineOptions.chunk),
        "attention": given.get("attention", wanted.attention),
        "sparse": given.get("sparse", wanted.sparse),
        "offload": given.get("offload", Path(tempfile.gettempdir()) if wanted.offload else None),
        "speculative": given.get("speculative", speculative),
    }


def _list_workloads(json: bool) -> None:
    from edge.bench.workload import load_workload, workload_names

    facts = [load_workload(name).facts for name in workload_names()]
    if json:
        print_json([vars(each) for each in facts])
        return
    for each in facts:
        out.print(Text.assemble((f"{each.name}\n", "bold"), f"  {each.description}\n  for {each.model}"))


def _report_static(given: Mapping[str, Any], json: bool) -> None:
    """Compile the kernels and print their costs; UsageError if any option but --json was given."""
    for name in given:
        if name not in ("static", "json"):
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


def _numbers(text: str, option: str, example: str) -> tuple[int, ...]:
    """Of an option's text, ascending and each once."""
    try:
        numbers = {int(part) for part in text.split(",")}
    except ValueError:
        raise UsageError(f"--{option} {text!r} is no list of whole numbers; write it as {example}") from None
    if min(numbers) < 1:
        raise UsageError(f"--{option} {text!r} holds a number below 1; the least is 1")
    return tuple(sorted(numbers))
