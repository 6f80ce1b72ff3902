"""Our decode speed over context in a process of its own; prints JSON. Used by bench/context.py.

Nothing is prefilled: the pools are filled with random keys and values, for what a step reads and computes depends on
the length of the context and not on what it says. Rounds go over all contexts, sparse and dense, so that a drift of the
machine hits all of them alike.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort

from bench.decode_bytes import minimum_pool_bytes
from edge.bench.machine import other_cpu_share, read_cpu_clock
from edge.bundle import Bundle, open_bundle
from edge.errors import EdgeError
from edge.executor import StepBatch
from edge.executors.onnxruntime import OnnxRuntimeExecutor
from edge.kv_cache import KV_BYTES, compressed_type, pages_for, pool_layout
from plugins.ort.library import find_library, take_pool_bytes_read

MODES = ("sparse", "dense")
WARM_UP = 2  # steps of a case that bring its pages and code back into the caches
TOKEN = 3  # which one does not matter
DRAWN = 1 << 22  # random values, repeated over a pool
# The mean of n independent keys has 1 / sqrt(n) of their spread.
SPREAD = {"kv_pool": 1.0, "c1_pool": 32**-0.5, "c2_pool": 128**-0.5}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}
INT8_SCALE = 2.6 / 127  # of vectors of 64 values, whose largest is mostly about 2.6 times their spread


def measure(bundle: str, contexts: Sequence[int], rounds: int, steps: int, threads: int) -> dict:
    """Cases of every mode and context, in the order of MODES and `contexts`.

    Each: step_s [rounds], the median of `steps` steps that follow a context of that many tokens; pool_bytes and
    minimum_pool_bytes, a step's mean. other_cpu: the share of the machine that others used. EdgeError without kernels.
    """
    if find_library() is None:
        raise EdgeError("no compiled operators count the bytes they read; install g++ and run `pip install -e .`")
    opened = open_bundle(Path(bundle), verify=False)
    executor = OnnxRuntimeExecutor(opened, pages_for(max(contexts) + WARM_UP + steps), threads)
    fill_pools(executor, opened)
    before = read_cpu_clock()
    step_s: dict[tuple[str, int], list[float]] = {(mode, context): [] for mode in MODES for context in contexts}
    pool_bytes: dict[tuple[str, int], float] = {}
    for _ in range(rounds):
        for context in contexts:
            for mode in MODES:
                seconds, pool_bytes[mode, context] = decode(executor, context, steps, mode)
                step_s[mode, context].append(float(np.median(seconds)))
    cases = [
        {
            "mode": mode,
            "context": context,
            "step_s": medians,
            "pool_bytes": pool_bytes[mode, context],
            "minimum_pool_bytes": mean_minimum(opened, context, steps, mode),
        }
        for (mode, context), medians in step_s.items()
    ]
    return {"cases": cases, "other_cpu": other_cpu_share(before, read_cpu_clock(), os.cpu_count() or 1)}


def fill_pools(executor: OnnxRuntimeExecutor, bundle: Bundle, seed: int = 0) -> None:
    """Random normal keys and values in every page, and compressed keys of the spread that averages have."""
    normal = np.random.default_rng(seed).standard_normal(DRAWN, dtype=np.float32)
    drawn = {}
    for name, page in pool_layout(bundle.config, bundle.manifest.types).items():
        if name == "kv_scales":
            drawn[name] = np.full(DRAWN, INT8_SCALE, np.float32)
        elif page.dtype == "int8":
            drawn[name] = np.clip(np.rint(normal / INT8_SCALE), -127, 127).astype(np.int8)
        else:
            drawn[name] = (normal * np.float32(SPREAD[name])).astype(DTYPES[page.dtype])
    for pool, name in zip(executor._pools, cycle(drawn), strict=False):
        values = pool_values(pool, drawn[name].dtype)
        for start in range(0, values.size, DRAWN):
            values[start : start + DRAWN] = drawn[name][: values.size - start]


def pool_values(pool: ort.OrtValue, dtype: np.dtype) -> np.ndarray:
    """The pool's own memory, flat."""
    size = int(np.prod(pool.shape())) * dtype.itemsize
    return np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(pool.data_ptr())), dtype)


def decode(
    executor: OnnxRuntimeExecutor,
    context: int,
    steps: int,
    mode: str,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], float]:
    """Seconds of each of `steps` steps of one token after `context` tokens, and the pool bytes a step read."""
    seconds = []
    for step in range(-WARM_UP, steps):
        if step == 0:
            take_pool_bytes_read()
        batch = next_token(context + WARM_UP + step, mode)
        started = clock()
        executor.step(batch)
        seconds.append(clock() - started)
    return seconds[WARM_UP:], (take_pool_bytes_read() or 0) / steps


def next_token(position: int, mode: str) -> StepBatch:
    """One token after `position` others, on the first pages of the pool; a length of 0 is below any dense_len."""

    def ints(*values: int) -> np.ndarray:
        return np.array(values, np.int32)

    return StepBatch(
        input_ids=ints(TOKEN),
        positions=ints(position),
        query_start=ints(0, 1),
        page_table=np.arange(pages_for(position + 1), dtype=np.int32)[None],
        logits_rows=ints(0),
        switch_length=ints(position + 1 if mode == "sparse" else 0),
    )


def mean_minimum(bundle: Bundle, context: int, steps: int, mode: str) -> float:
    """`minimum_pool_bytes` over the steps that `decode` times."""
    first, types = context + WARM_UP + 1, bundle.manifest.types
    sizes = {
        "scale_bytes": 4 if types["kv"] == "int8" else 0,
        "compressed_bytes": KV_BYTES[compressed_type(types)],
    }
    sparse = bundle.config.sparse if mode == "sparse" else None
    lengths = range(first, first + steps)
    least = [minimum_pool_bytes(bundle.config, n, KV_BYTES[types["kv"]], sparse, **sizes) for n in lengths]
    return float(np.mean(least))


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
