"""Our decode and prefill beside llama.cpp's Q4_0, same random weights, same threads, same run.

    python -m bench.peers                                # MiniCPM4-0.5B shape, contexts 512 and 8192
    python -m bench.peers --contexts 512 --rounds 5

Engines take turns, each measurement in a process of its own; the median over rounds counts. llama.cpp runs with
flash attention on and off, and the faster of the two is the peer in each column. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.checkpoints import MINICPM4_05B, write_gguf_q4_0, write_safetensors
from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bench.machine import describe_machine

OURS = {
    "g64": WeightFormat("w4a16", 64, symmetric=True, head="int4"),
    "g128": WeightFormat("w4a16", 128, symmetric=True, head="int4"),
    "g32": WeightFormat("w4a16", 32, symmetric=True, head="int4"),
    "g32 asymmetric": WeightFormat("w4a16", 32, symmetric=False, head="int4"),
}
LLAMA = {"llama.cpp Q4_0, flash attention": True, "llama.cpp Q4_0, plain attention": False}


@dataclass
class Measured:
    """tok/s of one engine at one context, a value a round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, values: dict[str, float]) -> None:
        """One more round."""
        self.prefill.append(values["prefill"])
        self.decode.append(values["decode"])


def prepare(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The GGUF and one bundle a format, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, model = folder / "checkpoint", folder / "q4_0.gguf"
    if not (checkpoint / "config.json").exists():
        write_safetensors(checkpoint, MINICPM4_05B)
    if not model.exists():
        write_gguf_q4_0(model.with_suffix(".partial"), MINICPM4_05B).rename(model)
    bundles = {}
    for name, weights in OURS.items():
        bundles[name] = folder / f"bundle-{name.replace(' ', '-')}"
        if not bundles[name].exists():
            export_bundle(open_checkpoint(checkpoint), bundles[name], ExportOptions(weights=weights))
    return model, bundles


def measure_ours(bundle: Path, context: int, new_tokens: int, repeat: int, threads: int) -> dict[str, float]:
    """Through the product's own `edge bench`."""
    command = [sys.executable, "-m", "edge", "bench", str(bundle), "--contexts", str(context), "--json"]
    command += ["--new-tokens", str(new_tokens), "--repeat", str(repeat), "--threads", str(threads)]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    figures = report["cases"][0]["summary"]
    return {"prefill": figures["prefill_tok_s"]["median"], "decode": figures["decode_tok_s"]["median"]}


def measure_llama(model: Path, flash: bool, **workload: int) -> dict[str, float]:
    """llama.cpp in its own process."""
    arguments = json.dumps({"model": str(model), "flash": flash, **workload})
    command = [sys.executable, "-m", "bench.llama_cpp_worker", arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(
    contexts: Annotated[str, typer.Option(help="Prompt lengths.")] = "512,8192",
    rounds: Annotated[int, typer.Option(help="Rounds at contexts up to 2048; longer ones get one third.")] = 3,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded.")] = 48,
    threads: Annotated[int, typer.Option(help="Threads of both engines.")] = 2,
    formats: Annotated[str, typer.Option(help=f"Of ours: {', '.join(OURS)}.")] = "g64,g128,g32,g32 asymmetric",
    folder: Annotated[Path, typer.Option(help="Where the models are kept.")] = Path("build/bench"),
    output: Annotated[Path | None, typer.Option(help="Also write all figures as JSON.")] = None,
) -> None:
    """Measure, print the table, and the ratio of each of our formats to the faster llama.cpp mode."""
    model, bundles = prepare(folder)
    chosen = formats.split(",")
    results: dict[int, dict[str, Measured]] = {}
    for context in [int(c) for c in contexts.split(",")]:
        short = context <= 2048
        row = results[context] = {name: Measured() for name in [*chosen, *LLAMA]}
        repeat = 3 if short else 1
        for _ in range(rounds if short else max(1, rounds // 3)):
            for name in chosen:
                row[name].add(measure_ours(bundles[name], context, new_tokens, repeat, threads))
            for name, flash in LLAMA.items():
                workload = {"prompt_tokens": context, "new_tokens": new_tokens, "repeat": repeat, "threads": threads}
                row[name].add(measure_llama(model, flash, **workload))
    if output is not None:
        values = {context: {name: asdict(m) for name, m in row.items()} for context, row in results.items()}
        output.write_text(json.dumps({"machine": asdict(describe_machine()), "tok_s": values}, indent=1))
    print_table(results, chosen, threads)


def print_table(results: dict[int, dict[str, Measured]], chosen: list[str], threads: int) -> None:
    """Medians over rounds; the ratio is ours over the better llama.cpp mode in that column."""
    machine = describe_machine()
    table = Table(
        title=f"MiniCPM4-0.5B shape, random weights, {machine.cpu_model}, {threads} threads", title_justify="left"
    )
    for column in ("context", "engine", "prefill tok/s", "ratio", "decode tok/s", "ratio"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for context, row in results.items():
        best = {kind: max(median(getattr(row[name], kind)) for name in LLAMA) for kind in ("prefill", "decode")}
        for name, measured in row.items():
            cells = [str(context), f"edge int4 {name}" if name in chosen else name]
            for kind in ("prefill", "decode"):
                value = median(getattr(measured, kind))
                cells += [f"{value:.1f}", f"{value / best[kind]:.2f}x" if name in chosen else ""]
            table.add_row(*cells)
        table.add_section()
    Console(width=100, highlight=False).print(table)


if __name__ == "__main__":
    typer.run(main)
