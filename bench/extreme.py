"""A context whose dense KV cache is eight times the memory for it: dense attention that pages its cache from disk
beside our sparse attention with --offload, both inside the same enforced budget; and both with all in memory.

    python -m bench.extreme                              # 64K, 128K and 256K tokens, the 0.5B shape
    python -m bench.extreme --contexts 131072 --layers 8

The budget is the model's memory by the plan and an eighth of the dense cache. It is a limit on the process's data
(RLIMIT_DATA) and, where a control group can be made, on all of its memory; O_DIRECT keeps the pages out of the system's
cache.
Pages hold random keys and values and nothing is prefilled for decode: 'greedy' feeds the model its own tokens, 'drawn'
random ones, which makes each token's choice of blocks as good as independent of the last one's, the worst case.
Prefill: chunks of 512 tokens at several depths of the context, integrated over them, with few layers.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.checkpoints import write_safetensors_once
from bench.weight_bytes import prepare_bundle
from build_engine.export import ExportOptions
from build_engine.formats import WeightFormat
from build_engine.long_context import LongContext
from edge.bench.machine import describe_machine
from edge.bundle import open_bundle
from edge.kv_cache import pages_for
from edge.memory.fit import make_plan
from edge.memory.ledger import page_bytes
from edge.models import MINICPM4_05B
from edge.plan import EngineOptions

SHARE = 8  # the dense cache over the memory for it
FEW_LAYERS = 2  # of the prefill
CHUNK, DEPTHS, REPEAT = 512, 5, 2
MIB, MB = 1 << 20, 1e6
CASES = (("dense", True), ("sparse", True), ("dense", False), ("sparse", False))  # attention, inside the budget


def bundles(folder: Path, layers: int) -> dict[str, Path]:
    """The shape's bundles with each attention, made once."""
    place = folder / f"extreme-{layers}-layers"
    checkpoint = write_safetensors_once(place / "checkpoint", replace(MINICPM4_05B, num_hidden_layers=layers))
    weights = WeightFormat("w4a16", 64, symmetric=True, head="int4")
    return {
        attention: prepare_bundle(
            checkpoint,
            place / f"bundle-{attention}",
            ExportOptions(weights=weights, long_context=LongContext(attention), kv="bfloat16"),
        )
        for attention in ("dense", "sparse")
    }


def budget_of(dense: Path, context: int, threads: int) -> int:
    """The plan's memory without a cache, and an eighth of the dense cache."""
    bundle = open_bundle(dense, verify=False)
    plan = make_plan(bundle, EngineOptions(context=context, threads=threads, chunk=CHUNK, offload=Path()))
    return plan.total - plan.kv + pages_for(context) * sum(page_bytes(bundle.config, bundle.manifest.types)) // SHARE


def run_case(task: dict) -> dict:
    """One process (bench/extreme_worker.py)."""
    command = [sys.executable, "-m", "bench.extreme_worker", json.dumps(task)]
    # One thread of numpy's own: its buffers would count as data.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def disk_speed(folder: Path, size: int, block: int) -> float:
    """Bytes a second of direct sequential reads, one after the other, of a file without a name."""
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    with mmap.mmap(-1, block) as memory:
        memory.write(os.urandom(block))
        for start in range(0, size, block):
            os.pwritev(fd, [memory], start)
        began = time.perf_counter()
        for start in range(0, size, block):
            os.preadv(fd, [memory], start)
        seconds = time.perf_counter() - began
    os.close(fd)
    return size / seconds


def prefill_speed(result: dict, context: int) -> float:
    """tok/s of a whole prompt: the seconds of a chunk, by trapezoids over the depths at which they were measured."""
    starts, seconds = np.array(result["starts"]), np.array(result["chunk_s"])
    total = float((np.diff(starts) * (seconds[1:] + seconds[:-1]) / 2).sum()) / CHUNK + seconds[-1]
    return (starts[-1] + CHUNK) / total


def measure(context: int, deep: dict, few: dict, folder: Path, steps: int, threads: int) -> dict:
    """All cases of one context: decode with all layers, prefill with few."""
    found = {}
    for attention, is_limited in CASES:
        common = {"context": context, "threads": threads, "folder": str(folder), "chunk": CHUNK, "repeat": REPEAT}
        figures = {}
        for phase, models in (("decode", deep), ("prefill", few)):
            budget = budget_of(models["dense"], context + 2 * CHUNK, threads) if is_limited else None
            effort = {"steps": steps, "depths": 0} if phase == "decode" else {"steps": 0, "depths": DEPTHS}
            task = {**common, **effort, "bundle": str(models[attention]), "budget": budget}
            figures[phase] = run_case(task) | {"budget": budget}
        found[attention, is_limited] = figures
    return found


def main(
    contexts: Annotated[str, typer.Option(help="Tokens in the cache.")] = "65536,131072,262144",
    layers: Annotated[int, typer.Option(help="Layers of the model that decodes.")] = 24,
    steps: Annotated[int, typer.Option(help="Tokens decoded by every measurement.", min=2)] = 16,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    folder: Annotated[Path, typer.Option(help="Where models and pages are kept.")] = Path("build/bench"),
    output: Annotated[Path | None, typer.Option(help="Also write all figures as JSON.")] = None,
) -> None:
    """Measure and print a table for each context."""
    console, machine = Console(width=120, highlight=False), describe_machine()
    deep, few = bundles(folder, layers), bundles(folder, FEW_LAYERS)
    sequential, small = disk_speed(folder, 512 * MIB, MIB), disk_speed(folder, 64 * MIB, 16 << 10)
    console.print(
        f"MiniCPM4-0.5B shape, random weights, int4 g64, bfloat16 KV cache; decode with {layers} layers, prefill with "
        f"{FEW_LAYERS}\n{machine.cpu_model}, {threads} threads; disk: {sequential / MB:.0f} MB/s in reads of 1 MiB, "
        f"{small / MB:.0f} in reads of 16 KiB, one at a time"
    )
    values = []
    for context in (int(n) for n in contexts.split(",")):
        found = measure(context, deep, few, folder, steps, threads)
        print_context(console, context, found)
        print_checks(console, found)
        values.append({"context": context, "cases": {str(case): found[case] for case in found}})
    if output is not None:
        output.write_text(json.dumps({"disk": [sequential, small], "contexts": values}, indent=1) + "\n")


def print_context(console: Console, context: int, found: dict) -> None:
    """A row for each case and kind of token."""
    table = Table(title=f"{context} tokens", title_justify="left")
    for column in ("attention", "cache", "tokens", "prefill tok/s", "decode tok/s", "hits", "MB a token", "peak MiB"):
        table.add_column(column, justify="left" if column in ("attention", "cache", "tokens") else "right")
    for (attention, is_limited), figures in found.items():
        decode, speed = figures["decode"], prefill_speed(figures["prefill"]["prefill"], context)
        for kind in ("greedy", "forced"):
            run, counters = decode[kind], decode[kind]["counters"]
            units = counters and counters["hits"] + counters["misses"]
            table.add_row(
                attention,
                "on disk" if is_limited else "in memory",
                "drawn" if kind == "forced" else kind,
                f"{speed:.0f}" if kind == "greedy" else "",
                f"{1 / median(run['step_s']):.2f}",
                f"{counters['hits'] / units:.1%}" if counters else "",
                f"{counters['bytes_read'] / len(run['step_s']) / MB:.1f}" if counters else "",
                f"{peak(decode):.0f}" if kind == "greedy" else "",
            )
    console.print(table)


def peak(result: dict) -> float:
    """MiB: of the control group where there was one, which counts cached files too, else resident."""
    return (result["group_peak_bytes"] or result["peak_bytes"]) / MIB


def print_checks(console: Console, found: dict) -> None:
    """Ratios, the budgets and whether the tokens agree."""
    for place, is_limited in (("on disk", True), ("in memory", False)):
        dense, sparse = found["dense", is_limited], found["sparse", is_limited]
        ratios = [
            median(dense["decode"][kind]["step_s"]) / median(sparse["decode"][kind]["step_s"])
            for kind in ("greedy", "forced")
        ]
        seconds = [sum(side["prefill"]["prefill"]["chunk_s"]) for side in (dense, sparse)]
        console.print(
            f"{place}: sparse decodes {ratios[0]:.1f}x (greedy) and {ratios[1]:.1f}x (drawn) as fast as dense, and "
            f"prefills {seconds[0] / seconds[1]:.1f}x as fast"
        )
    limited, free = found["sparse", True]["decode"], found["sparse", False]["decode"]
    same = all(limited[kind]["tokens"] == free[kind]["tokens"] for kind in ("greedy", "forced"))
    group = "RLIMIT_DATA and a control group" if limited["group_peak_bytes"] else "RLIMIT_DATA alone"
    console.print(
        f"budget {limited['budget'] / MIB:.0f} MiB, enforced by {group}; dense: "
        f"{found['dense', True]['decode']['describe']['offload']}; sparse: {limited['describe']['offload']}\n"
        f"sparse tokens on disk and in memory are {'the same' if same else 'DIFFERENT'}"
    )
    shares = [figures[phase]["other_cpu"] for figures in found.values() for phase in figures]
    if None not in shares:
        console.print(
            f"Other processes took {min(shares):.0%} to {max(shares):.0%} of the machine's CPU time meanwhile."
        )
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
