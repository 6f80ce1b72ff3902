"""Speed over the length of the context: our sparse (InfLLM-V2) and dense attention beside llama.cpp's.

    python -m bench.context                              # 512 to 128K tokens, half an hour or more

Two tables and a plot. Beside llama.cpp: real prompts, engines in turns, a process a measurement; over 8K tokens the
prompt takes llama.cpp too long, so both run a version of the shape with two layers, and the row says so. Over context:
decode with all layers, of both engines, without computing the prompt: our pools hold random keys and values
(bench/decode_worker.py), llama.cpp's cache copies of a short prompt's (bench/llama_cpp_filled.py); and the bytes our
step reads beside the least that it must. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.checkpoints import prepare
from bench.context_plot import Lines, context_svg
from bench.decode_bytes import weight_bytes
from bench.peers import Measured, llama_modes, measure_llama, measure_ours, print_table, run_llama, take_turns
from bench.weight_bytes import prepare_bundle
from build_engine.export import ExportOptions
from build_engine.formats import WeightFormat
from build_engine.long_context import LongContext
from edge.bench.machine import describe_machine
from edge.bench.report import write_text
from edge.bundle import open_bundle
from edge.models import MINICPM4_05B

SHORT, LONGEST_FULL = 2048, 8192  # repeated in rounds up to here; all layers in llama.cpp up to here
FEW_LAYERS = 2
OURS = {"edge, sparse": "sparse", "edge, dense": "dense"}
LLAMA = llama_modes("int4")
MB, GB = 1e6, 1e9
MINIMUM = """\
KV MB: keys, values and compressed keys that attention reads in a step, as it counts them.
minimum: a layer's 2 Hkv d b n; if sparse, 2 Hkv d b 6144 + Hkv d b (n/16 + n/64). Scales of int8 are counted.
Below 1: the last block is not full, and local blocks need no score."""

Row = dict[str, Measured]
PeerDecode = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Model:
    """One depth of the shape: our bundle and llama.cpp's file."""

    layers: int
    bundle: Path
    gguf: Path


@dataclass(frozen=True)
class DecodeCase:
    """Our decode with one mode at one context (see bench/decode_worker.py): seconds by round, bytes a step."""

    mode: str
    context: int
    step_s: tuple[float, ...]
    pool_bytes: float
    minimum_pool_bytes: float

    @property
    def tok_s(self) -> float:
        """Median over rounds."""
        return 1 / median(self.step_s)

    def speed_against(self, other: DecodeCase) -> float:
        """This speed over another's, paired by round."""
        return median(theirs / ours for ours, theirs in zip(self.step_s, other.step_s, strict=True))


def prepare_model(folder: Path, layers: int, kv: str, head: str) -> Model:
    """Random weights of the 0.5B shape in `folder`, made once, and the bundle of one format."""
    place = folder if layers == MINICPM4_05B.num_hidden_layers else folder / f"{layers}-layers"
    checkpoint, gguf = prepare(place, replace(MINICPM4_05B, num_hidden_layers=layers))
    weights = WeightFormat("w4a16", 64, symmetric=True, head=head)
    options = ExportOptions(weights=weights, long_context=LongContext("sparse"), kv=kv)
    return Model(layers, prepare_bundle(checkpoint, place / f"bundle-sparse-{kv}-{head}-head", options), gguf)


def measure_decode(model: Model, contexts: Sequence[int], **effort: int) -> tuple[list[DecodeCase], float | None]:
    """All cases, in one process of their own, and the share of the machine that others took meanwhile."""
    task = json.dumps({"bundle": str(model.bundle), "contexts": list(contexts), **effort})
    command = [sys.executable, "-m", "bench.decode_worker", task]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    cases = [DecodeCase(**{**case, "step_s": tuple(case["step_s"])}) for case in result["cases"]]
    return cases, result["other_cpu"]


def beside_llama(model: Model, context: int, new_tokens: int, rounds: int, threads: int) -> Row:
    """Prefill and decode of real prompts: ours with either attention, llama.cpp with either of its modes."""
    repeat = 3 if context <= SHORT else 1 if context <= LONGEST_FULL else 0
    workload = {"context": context, "new_tokens": new_tokens, "repeat": repeat, "threads": threads}
    engines: dict[str, Callable[[], Mapping[str, float]]] = {}
    for name, mode in OURS.items():
        engines[name] = partial(measure_ours, model.bundle, "--attention", mode, **workload)
    for name, flash in LLAMA.items():
        engines[name] = partial(measure_llama, model.gguf, flash, **workload)
    return take_turns(engines, rounds if context <= SHORT else max(1, rounds // 3))


def measure_filled_llama(gguf: Path, contexts: Sequence[int], steps: int, rounds: int, threads: int) -> PeerDecode:
    """llama.cpp's decode tok/s by mode and context, medians of rounds; a process a measurement."""
    values: dict[tuple[str, int], list[float]] = {(name, n): [] for name in LLAMA for n in contexts}
    for _ in range(rounds):
        for name, context in values:
            task = {"model": str(gguf), "context": context, "new_tokens": steps, "flash": LLAMA[name]}
            values[name, context].append(run_llama("bench.llama_cpp_filled", {**task, "threads": threads})["decode"])
    return {case: median(rates) for case, rates in values.items()}


def main(
    contexts: Annotated[str, typer.Option(help="Lengths for our decode.")] = "512,2048,8192,32768,131072",
    peer_contexts: Annotated[str, typer.Option(help="Prompt lengths beside llama.cpp.")] = "512,2048,8192,32768",
    rounds: Annotated[int, typer.Option(help="Rounds over the contexts; long prompts get a third.", min=1)] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded by every measurement.", min=2)] = 48,
    threads: Annotated[int, typer.Option(help="Threads of both engines.")] = 2,
    kv: Annotated[str, typer.Option(help="Our KV cache: bfloat16, float16, float32 or int8.")] = "bfloat16",
    head: Annotated[str, typer.Option(help="Our head: int4, as Q4_0 has, or int8, our default.")] = "int4",
    folder: Annotated[Path, typer.Option(help="Where the models are kept.")] = Path("build/bench"),
    plot: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("build/bench/context.svg"),
    output: Annotated[Path | None, typer.Option(help="Also write all figures as JSON.")] = None,
) -> None:
    """Measure, print both tables, draw the plot."""
    for path in (plot, output):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    full = prepare_model(folder, MINICPM4_05B.num_hidden_layers, kv, head)
    lengths = sorted(int(n) for n in contexts.split(","))
    cases, other_cpu = measure_decode(full, lengths, rounds=rounds, steps=new_tokens, threads=threads)
    filled = measure_filled_llama(full.gguf, lengths, new_tokens, max(1, rounds // 2), threads)
    peers: dict[tuple[int, int], Row] = {}  # by context and layers
    for context in sorted(int(n) for n in peer_contexts.split(",") if n):
        fits = context <= LONGEST_FULL
        model = full if fits else prepare_model(folder, FEW_LAYERS, kv, head)
        peers[context, model.layers] = beside_llama(model, context, new_tokens, rounds, threads)
    bundle, machine = open_bundle(full.bundle, verify=False), describe_machine()
    shape = "MiniCPM4-0.5B shape, random weights"
    ours = f"edge: {bundle.manifest.weights['description']}, {kv} KV cache"
    place = f"{machine.cpu_model}, {threads} threads"
    print_peers(f"{shape}; {place}\n{ours}", peers)
    print_decode(cases, filled, weight_bytes(bundle), f"{rounds} rounds and {new_tokens} steps", other_cpu)
    notes = [f"{shape}; both engines from filled caches", ours, place]
    write_text(plot, context_svg(notes, *plot_lines(cases, filled)))
    print(f"plot written to {plot}")
    if output is not None:
        values = {
            "machine": asdict(machine),
            "threads": threads,
            "weights": bundle.manifest.weights,
            "weight_bytes": weight_bytes(bundle),
            "kv": kv,
            "decode": [asdict(case) for case in cases],
            "decode_other_cpu": other_cpu,
            "decode_llama_cpp": [{"mode": m, "context": n, "tok_s": rate} for (m, n), rate in filled.items()],
            "beside_llama_cpp": [
                {"context": context, "layers": layers, "tok_s": {name: asdict(m) for name, m in row.items()}}
                for (context, layers), row in peers.items()
            ],
        }
        write_text(output, json.dumps(values, indent=1) + "\n")


def print_peers(title: str, peers: Mapping[tuple[int, int], Row]) -> None:
    """Ours beside llama.cpp; a context that runs with fewer layers says so."""
    all_layers = MINICPM4_05B.num_hidden_layers
    named = {f"{n}" if layers == all_layers else f"{n}, {layers} layers": row for (n, layers), row in peers.items()}
    if named:
        print_table(
            f"{title}\nReal prompts, all {all_layers} layers if not said; decode at the median step", named, LLAMA
        )


def print_decode(
    cases: Sequence[DecodeCase], filled: PeerDecode, weights: int, effort: str, other_cpu: float | None
) -> None:
    """Speed and bytes of every case; the ratio to our own shortest context is paired by round."""
    shortest = cases[0].context
    title = (
        f"Decode, {MINICPM4_05B.num_hidden_layers} layers, from filled caches; medians of {effort}\n"
        f"Weights are {weights / MB:.0f} MB a step; the ratio is to llama.cpp's faster mode"
    )
    table = Table(title=title, title_justify="left")
    headings = ("context", "engine", "tok/s", "ratio", f"of {shortest}", "KV MB", "minimum", "", "all MB", "GB/s")
    for column in headings:
        table.add_column(column, justify="left" if column == "engine" else "right")
    first = {case.mode: case for case in cases if case.context == shortest}
    for context in sorted({case.context for case in cases}):
        best = max(filled[name, context] for name in LLAMA)
        for name, mode in OURS.items():
            case = next(case for case in cases if (case.mode, case.context) == (mode, context))
            total = weights + case.pool_bytes
            table.add_row(
                str(context),
                name,
                f"{case.tok_s:.1f}",
                f"{case.tok_s / best:.2f}x",
                f"{case.speed_against(first[case.mode]):.2f}x",
                f"{case.pool_bytes / MB:.1f}",
                f"{case.minimum_pool_bytes / MB:.1f}",
                f"{case.pool_bytes / case.minimum_pool_bytes:.3f}",
                f"{total / MB:.0f}",
                f"{total * case.tok_s / GB:.1f}",
            )
        for name in LLAMA:
            rate = filled[name, context]
            short = name.replace(" Q4_0", "").replace(" attention", "")
            table.add_row(str(context), short, f"{rate:.1f}", "", f"{rate / filled[name, shortest]:.2f}x")
        table.add_section()
    console = Console(width=100, highlight=False)
    console.print(table)
    console.print(MINIMUM)
    if other_cpu is not None:
        console.print(f"Other processes took {other_cpu:.0%} of the machine's CPU time while ours was measured.")


def plot_lines(cases: Sequence[DecodeCase], filled: PeerDecode) -> tuple[Lines, Lines]:
    """tok/s over context, of llama.cpp the faster mode; megabytes read of the pools."""
    speed: dict[str, dict[int, float]] = {}
    read: dict[str, dict[int, float]] = {}
    least: dict[str, dict[int, float]] = {}
    for name, mode in OURS.items():
        ours = [case for case in cases if case.mode == mode]
        speed[name] = {case.context: case.tok_s for case in ours}
        read[name] = {case.context: case.pool_bytes / MB for case in ours}
        least[f"{mode} minimum"] = {case.context: case.minimum_pool_bytes / MB for case in ours}
    contexts = sorted({case.context for case in cases})
    faster = {context: max(filled[name, context] for name in LLAMA) for context in contexts}
    return {**speed, "llama.cpp Q4_0": faster}, {**read, **least}


if __name__ == "__main__":
    typer.run(main)
