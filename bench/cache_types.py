"""What the type of the KV cache does to decoding: one model with caches of several types, from filled pools.

    python -m bench.cache_types                          # bfloat16 beside int8, 512 to 32K tokens, a few minutes
    python -m bench.cache_types --cpu-time               # on a machine that others use: CPU seconds of one thread

The shape is MiniCPM4-0.5B's with random weights (bench/checkpoints.py), the pools hold random keys and values
(bench/decode_worker.py). The types take turns within each round, and ratios are paired by round, so that a drift of the
machine hits all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.checkpoints import write_safetensors_once
from bench.decode_worker import MODES, WARM_UP, decode, fill_pools
from bench.weight_bytes import prepare_bundle
from build_engine.export import ExportOptions
from build_engine.formats import WeightFormat
from build_engine.long_context import LongContext
from edge.bundle import open_bundle
from edge.executors.onnxruntime import OnnxRuntimeExecutor
from edge.kv_cache import pages_for
from edge.models import MINICPM4_05B

MB = 1e6
Case = tuple[int, str, str]  # context, dense or sparse, the cache's type


def open_executor(folder: Path, kv: str, tokens: int, threads: int) -> OnnxRuntimeExecutor:
    """The model with a cache of one type, filled, for a context of `tokens`."""
    checkpoint = write_safetensors_once(folder / "checkpoint", MINICPM4_05B)
    weights = WeightFormat("w4a16", 64, symmetric=True, head="int4")
    options = ExportOptions(weights=weights, long_context=LongContext("sparse"), kv=kv)
    bundle = open_bundle(prepare_bundle(checkpoint, folder / f"bundle-sparse-{kv}-int4-head", options), verify=False)
    executor = OnnxRuntimeExecutor(bundle, pages_for(tokens), threads)
    fill_pools(executor, bundle)
    return executor


def main(
    types: Annotated[str, typer.Option(help="Types of the cache; ratios are to the first.")] = "bfloat16,int8",
    contexts: Annotated[str, typer.Option(help="Lengths.")] = "512,8192,32768",
    rounds: Annotated[int, typer.Option(help="Rounds over all cases.", min=1)] = 7,
    steps: Annotated[int, typer.Option(help="Tokens decoded by every measurement.", min=1)] = 16,
    threads: Annotated[int, typer.Option(help="Threads; --cpu-time has one.")] = 2,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Count CPU seconds of one thread.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the models are kept.")] = Path("build/bench"),
) -> None:
    """Measure and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = time.process_time if cpu_time else time.perf_counter
    lengths, kinds = [int(n) for n in contexts.split(",")], types.split(",")
    tokens = max(lengths) + WARM_UP + steps
    executors = {kv: open_executor(folder, kv, tokens, 1 if cpu_time else threads) for kv in kinds}
    step_s: dict[Case, list[float]] = {(n, mode, kv): [] for n in lengths for mode in MODES for kv in kinds}
    pool_bytes: dict[Case, float] = {}
    for _ in range(rounds):
        for context, mode, kv in step_s:
            seconds, pool_bytes[context, mode, kv] = decode(executors[kv], context, steps, mode, clock)
            step_s[context, mode, kv].append(median(seconds))
    what = "CPU seconds of one thread" if cpu_time else f"{threads} threads"
    print_cases(step_s, pool_bytes, kinds, f"medians of {rounds} rounds and {steps} steps, {what}")


def print_cases(
    step_s: Mapping[Case, Sequence[float]], pool_bytes: Mapping[Case, float], kinds: Sequence[str], effort: str
) -> None:
    """A row a case: tokens a second, the ratio to the first type in the same round, and what attention read."""
    table = Table(title=f"Decode, MiniCPM4-0.5B shape, from filled caches; {effort}", title_justify="left")
    for column in ("context", "attention", "KV cache", "tok/s", f"to {kinds[0]}", "KV MB a step"):
        table.add_column(column, justify="left" if column in ("attention", "KV cache") else "right")
    for (context, mode, kv), seconds in step_s.items():
        first = step_s[context, mode, kinds[0]]
        ratio = median(theirs / ours for theirs, ours in zip(first, seconds, strict=True))
        read = pool_bytes[context, mode, kv] / MB
        table.add_row(str(context), mode, kv, f"{1 / median(seconds):.1f}", f"{ratio:.2f}x", f"{read:.1f}")
    Console(width=100, highlight=False).print(table)


if __name__ == "__main__":
    typer.run(main)
