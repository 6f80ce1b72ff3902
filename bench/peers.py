"""Our decode and prefill beside llama.cpp's Q4_0 or TQ2_0, same random weights, same threads, same run.

    python -m bench.peers                                # MiniCPM4-0.5B shape, contexts 512 and 8192
    python -m bench.peers --contexts 512 --rounds 5
    python -m bench.peers --weights ternary --contexts 512

Engines take turns, each measurement in a process of its own; the median over rounds counts. llama.cpp runs with
flash attention on and off, and the faster of the two is the peer in each column. Decode is the speed of the median
step. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.checkpoints import prepare
from bench.weight_bytes import INT4, TERNARY, prepare_bundle
from bench.weight_bytes import print_table as print_weight_bytes
from build_engine.export import ExportOptions
from edge.bench.machine import describe_machine
from edge.bundle import open_bundle
from edge.models import MINICPM4_05B

OURS = {"int4": INT4, "ternary": TERNARY}
PEER = {"int4": "Q4_0", "ternary": "TQ2_0, Q8_0 head"}
WITHOUT_AMX = (
    "CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON'"
)


def llama_modes(weights: str) -> dict[str, bool]:
    """{name: flash attention} of the peer's two modes."""
    return {f"llama.cpp {PEER[weights]}, {how} attention": how == "flash" for how in ("flash", "plain")}


@dataclass
class Measured:
    """tok/s of one engine at one context, a value a round; no values where a phase was not measured."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, values: Mapping[str, float]) -> None:
        """One more round."""
        for phase, value in values.items():
            getattr(self, phase).append(value)


def measure_ours(
    bundle: Path, *options: str, context: int, new_tokens: int, repeat: int, threads: int
) -> dict[str, float]:
    """Through the product's own `edge bench`, with further `options` of it."""
    command = [sys.executable, "-m", "edge", "bench", str(bundle), "--contexts", str(context), "--json", *options]
    command += ["--new-tokens", str(new_tokens), "--repeat", str(max(1, repeat)), "--threads", str(threads)]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    figures = report["cases"][0]["summary"]
    return {"prefill": figures["prefill_tok_s"]["median"], "decode": 1 / figures["interval_s"]["p50"]}


def measure_llama(model: Path, flash: bool, context: int, new_tokens: int, repeat: int, threads: int) -> dict:
    """llama.cpp in its own process."""
    task = {"model": str(model), "flash": flash, "prompt_tokens": context, "new_tokens": new_tokens}
    return run_llama("bench.llama_cpp_worker", {**task, "repeat": repeat, "threads": threads})


def run_llama(module: str, task: Mapping[str, Any]) -> Any:
    """What a worker with llama.cpp says to a task, as JSON values."""
    done = subprocess.run([sys.executable, "-m", module, json.dumps(task)], capture_output=True, text=True)
    if done.returncode == -signal.SIGILL:
        sys.exit(
            "llama.cpp was built for instructions that this machine does not execute, as AMX on some virtual ones; "
            f"build it again: {WITHOUT_AMX} pip install --force-reinstall --no-cache-dir llama-cpp-python"
        )
    if done.returncode:
        sys.exit(f"{module} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(engines: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> dict[str, Measured]:
    """Measure every engine once a round, so that a drift of the machine hits all of them alike."""
    row = {name: Measured() for name in engines}
    for _ in range(rounds):
        for name, measure in engines.items():
            row[name].add(measure())
    return row


def main(
    contexts: Annotated[str, typer.Option(help="Prompt lengths.")] = "512,8192",
    rounds: Annotated[int, typer.Option(help="Rounds at contexts up to 2048; longer ones get one third.")] = 3,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded.")] = 48,
    threads: Annotated[int, typer.Option(help="Threads of both engines.")] = 2,
    weights: Annotated[str, typer.Option(help="int4 or ternary.")] = "int4",
    formats: Annotated[str, typer.Option(help="Which of our formats, by a part of their names.")] = "",
    folder: Annotated[Path, typer.Option(help="Where the models are kept.")] = Path("build/bench"),
    output: Annotated[Path | None, typer.Option(help="Also write all figures as JSON.")] = None,
) -> None:
    """Measure, print the table, and the ratio of each of our formats to the faster llama.cpp mode."""
    checkpoint, model = prepare(folder, MINICPM4_05B, ternary=weights == "ternary")
    bundles = {
        name: prepare_bundle(checkpoint, folder / f"bundle-{_slug(name)}", ExportOptions(weights=chosen))
        for name, chosen in OURS[weights].items()
        if not formats or any(part in name for part in formats.split(","))
    }
    llama = llama_modes(weights)
    results: dict[str, dict[str, Measured]] = {}
    for context in [int(c) for c in contexts.split(",")]:
        short = context <= 2048
        workload = {"context": context, "new_tokens": new_tokens, "repeat": 3 if short else 1, "threads": threads}
        ours = {name: partial(measure_ours, bundle, **workload) for name, bundle in bundles.items()}
        peers = {name: partial(measure_llama, model, flash, **workload) for name, flash in llama.items()}
        results[str(context)] = take_turns({**ours, **peers}, rounds if short else max(1, rounds // 3))
    if output is not None:
        values = {context: {name: asdict(m) for name, m in row.items()} for context, row in results.items()}
        output.write_text(json.dumps({"machine": asdict(describe_machine()), "tok_s": values}, indent=1))
    cpu = describe_machine().cpu_model
    print_table(f"MiniCPM4-0.5B shape, random weights, {cpu}, {threads} threads", results, llama)
    print_weight_bytes({name: (OURS[weights][name], open_bundle(path)) for name, path in bundles.items()})


def _slug(name: str) -> str:
    return name.removeprefix("edge ").removeprefix("int4 ").replace(",", "").replace(" ", "-")


def print_table(title: str, results: Mapping[str, Mapping[str, Measured]], peers: Collection[str]) -> None:
    """Medians over rounds, by context and engine; the ratio is ours over the better of the peers in that column."""
    table = Table(title=title, title_justify="left")
    for column in ("context", "engine", "prefill tok/s", "ratio", "decode tok/s", "ratio"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for context, row in results.items():
        best = {kind: max(median(getattr(row[name], kind)) for name in peers) for kind in ("prefill", "decode")}
        for name, measured in row.items():
            cells = [context, name]
            for kind in ("prefill", "decode"):
                values = getattr(measured, kind)
                ratio = f"{median(values) / best[kind]:.2f}x" if values and name not in peers else ""
                cells += [f"{median(values):.1f}" if values else "-", ratio]
            table.add_row(*cells)
        table.add_section()
    Console(width=100, highlight=False).print(table)


if __name__ == "__main__":
    typer.run(main)
