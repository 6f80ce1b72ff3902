"""One case of bench/extreme.py in a process of its own, under an enforced budget; prints JSON.

Nothing is prefilled: the pages hold random keys and values. A budget is a limit on the process's data (RLIMIT_DATA)
and, where control groups can be made, on all its memory, the system's cache of its files included.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from bench.decode_worker import DRAWN, DTYPES, SPREAD, fill_pools, next_token, pool_values
from edge.bench.machine import other_cpu_share, read_cpu_clock, read_memory, reset_peak_memory
from edge.bundle import Bundle, open_bundle
from edge.executor import StepBatch
from edge.executors.onnxruntime import OnnxRuntimeExecutor
from edge.kv_cache import pages_for, pool_layout
from edge.memory.fit import make_plan
from edge.offload import Offload
from edge.plan import EngineOptions
from plugins import PAGE_TOKENS

# Where a memory group of our own can be made: version 2, and the memory controller of version 1.
GROUPS = {
    Path("/sys/fs/cgroup"): ("memory.max", "memory.peak"),
    Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.max_usage_in_bytes"),
}
WARM_UP = 6  # steps before the clock counts: by then what stays resident is


def enter_group(budget: int) -> tuple[Path, Path] | None:
    """Put this process into a memory group with a limit -> (the group, the file with its peak); None if none can be."""
    for place, (limit, peak) in GROUPS.items():
        group = place / f"edge-extreme-{os.getpid()}"
        if not any((place / name).exists() for name in ("cgroup.controllers", "memory.limit_in_bytes")):
            continue
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                (group / limit).write_text(str(budget))
                (group / "cgroup.procs").write_text(str(os.getpid()))
                return group, group / peak
            except OSError:
                group.rmdir()
    return None


def leave_group(group: Path) -> None:
    """Back into the group above, so that this one can go."""
    (group.parent / "cgroup.procs").write_text(str(os.getpid()))
    with contextlib.suppress(OSError):
        group.rmdir()


def open_executor(bundle: Bundle, context: int, budget: int | None, threads: int, folder: str) -> OnnxRuntimeExecutor:
    """With pages on disk as the plan of the budget says; without a budget all in memory. Filled with random numbers."""
    if budget is None:
        executor = OnnxRuntimeExecutor(bundle, pages_for(context), threads)
        fill_pools(executor, bundle)
        return executor
    options = EngineOptions(context=context, memory=budget, threads=threads, chunk=512, offload=Path(folder))
    plan = make_plan(bundle, options)
    offload = Offload(Path(folder), plan.resident_pages or plan.num_pages)
    executor = OnnxRuntimeExecutor(bundle, plan.num_pages, threads, plan.sparse, offload=offload)
    fill_stores(executor, bundle)
    return executor


def fill_stores(executor: OnnxRuntimeExecutor, bundle: Bundle, seed: int = 0) -> None:
    """What `fill_pools` puts into pools, for pages that are on disk."""
    dtype = np.dtype(DTYPES[bundle.manifest.types["kv"]])
    normal = np.random.default_rng(seed).standard_normal(DRAWN, dtype=np.float32)
    shapes = {name: page.shape for name, page in pool_layout(bundle.config, bundle.manifest.types).items()}
    for pool, name in zip(executor._pools, cycle(shapes), strict=False):
        if name != "kv_pool":
            drawn, values = (normal * np.float32(SPREAD[name])).astype(dtype), pool_values(pool, dtype)
            for start in range(0, values.size, DRAWN):
                values[start : start + DRAWN] = drawn[: values.size - start]
    drawn = normal.astype(dtype)
    size = int(np.prod(shapes["kv_pool"]))
    for store in executor.stores:
        for page in range(executor.num_pages):
            start = page * size % DRAWN
            store.write_page(page, drawn[start : start + size])


def decode(executor: OnnxRuntimeExecutor, context: int, steps: int, forced: Sequence[int] | None) -> dict:
    """Steps of one token after `context` others: greedy, or with the tokens of `forced`."""
    token, tokens, seconds = 3, [], []
    for step in range(-WARM_UP, steps):
        if step == 0:
            executor.take_offload_counters()
            reset_peak_memory()
        batch = next_token(context + WARM_UP + step, "sparse")
        batch.input_ids[0] = token if forced is None else forced[step + WARM_UP]
        started = time.perf_counter()
        logits = executor.step(batch).logits
        seconds.append(time.perf_counter() - started)
        token = int(logits[0].argmax())
        tokens.append(token)
    counters = executor.take_offload_counters()
    return {"step_s": seconds[WARM_UP:], "tokens": tokens, "counters": counters and vars(counters)}


def prefill(executor: OnnxRuntimeExecutor, context: int, chunk: int, depths: int, repeat: int) -> dict:
    """Seconds of a chunk of a prompt at `depths` places, after 0 to context - chunk tokens; the best of `repeat`."""
    starts = [int(start) // PAGE_TOKENS * PAGE_TOKENS for start in np.linspace(0, context - chunk, depths)]
    ids = np.random.default_rng(1).integers(3, 70000, chunk).astype(np.int32)
    seconds = []
    for start in starts:
        batch = StepBatch(
            input_ids=ids,
            positions=np.arange(start, start + chunk, dtype=np.int32),
            query_start=np.array([0, chunk], np.int32),
            page_table=np.arange(pages_for(start + chunk), dtype=np.int32)[None],
            logits_rows=np.array([chunk - 1], np.int32),
            switch_length=np.array([context], np.int32),
        )
        times = []
        for _ in range(repeat):
            started = time.perf_counter()
            executor.step(batch)
            times.append(time.perf_counter() - started)
        seconds.append(min(times))
    return {"starts": starts, "chunk_s": seconds}


def run(task: dict) -> dict:
    """A case: see bench/extreme.py for its fields."""
    bundle, budget = open_bundle(Path(task["bundle"]), verify=False), task["budget"]
    group = None
    if budget is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (budget, budget))
        group = enter_group(budget)
    try:
        space = task["context"] + max(WARM_UP + task["steps"], task["chunk"])
        executor = open_executor(bundle, space, budget, task["threads"], task["folder"])
        result: dict = {"describe": executor.describe()}
        before = read_cpu_clock()
        if task["steps"]:
            result["greedy"] = decode(executor, task["context"], task["steps"], None)
            drawn = np.random.default_rng(2).integers(3, 70000, WARM_UP + task["steps"]).tolist()
            result["forced"] = decode(executor, task["context"], task["steps"], drawn)
        if task["depths"]:
            result["prefill"] = prefill(executor, task["context"], task["chunk"], task["depths"], task["repeat"])
        result["other_cpu"] = other_cpu_share(before, read_cpu_clock(), os.cpu_count() or 1)
        result["peak_bytes"] = read_memory(peak_was_reset=False).peak_bytes
        result["group_peak_bytes"] = None if group is None else int(group[1].read_text())
        return result
    finally:
        if group is not None:
            leave_group(group[0])


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
