"""How much memory compiling an engine takes, refused beforehand where it is not there, and watched while it runs.

What counts is anonymous memory: mapped weights are resident too, but the kernel drops their pages when it must. The
estimate was fitted to builds with TensorRT-RTX 1.7.1 (docs/benchmarks.md has its residuals). The sizes of profiles,
their number, and the number of GPUs compiled for made no difference of more than a few MiB.
"""

from __future__ import annotations

import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import onnx
import psutil

from edge.errors import EdgeError
from edge.machine import available_memory, available_swap

MIB, GIB = 1 << 20, 1 << 30
_SAMPLE_SECONDS = 0.02
_RESERVE = 128 * MIB  # what must stay free: below, the kernel ends whatever it likes
# The process without weights, a node, and how often weights of a kind are held; TensorRT packs int4 weights of its own
# operators anew, for which it also needs what `int4_process` says.
_PLUGINS = {"process": 170 * MIB, "node": 200 << 10, "plain": 1.03, "shared": 1, "packed": 2.03, "int4": 2.43}
_PLUGINS_INT4_PROCESS = 60 * MIB
# Functions are thousands of nodes, all weights are laid out anew, and packed ones are taken apart, to float32.
_FUNCTIONS = {"process": 205 * MIB, "node": 102 << 10, "plain": 2, "shared": 0, "packed": 7.7, "int4": 2.6}
_FUNCTIONS_INT4_PROCESS = 160 * MIB
_MARGIN = 1.05  # builds of one graph differ by a few percent
# A GPU that shares this memory: its context, and what one layer may use (tensorrt_compile.WORKSPACE_BYTES). The weights
# are there once more. Not measured, since it needs a device.
_GPU_PROCESS = 900 * MIB


@dataclass(frozen=True)
class GraphSizes:
    """Bytes of a graph's stored weights by what they are, and its nodes without and with functions written out.

    shared: those of `plain` that several nodes use, as a tied head's are.
    """

    plain: int
    shared: int
    int4: int
    packed: int
    nodes: int
    function_nodes: int

    @property
    def weights(self) -> int:
        """All bytes."""
        return self.plain + self.int4 + self.packed


def graph_sizes(graph: Path) -> GraphSizes:
    """Read from the graph alone."""
    model = onnx.load(graph, load_external_data=False)
    functions = {function.name: len(function.node) for function in model.functions}
    users: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node.op_type)
    sizes = {"plain": 0, "shared": 0, "int4": 0, "packed": 0}
    kinds = {"DequantizeLinear": "int4", "PackedLinear": "packed", "PackedHead": "packed"}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            length = next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
            used_by = users.get(tensor.name, [""])
            sizes[kinds.get(used_by[0], "plain")] += length
            sizes["shared"] += length * (len(used_by) > 1)
    expanded = sum(functions.get(node.op_type, 1) for node in model.graph.node)
    return GraphSizes(**sizes, nodes=len(model.graph.node), function_nodes=expanded)


def estimate_memory(sizes: GraphSizes, *, plugins: bool, streams: bool = True, shares_gpu: bool = False) -> int:
    """Anonymous bytes at the peak of a build. streams: TensorRT writes the engine in pieces (edge/tensorrt.py);
    shares_gpu: it builds on a GPU that has no memory of its own."""
    costs, nodes, int4_process = (
        (_PLUGINS, sizes.nodes, _PLUGINS_INT4_PROCESS)
        if plugins
        else (_FUNCTIONS, sizes.function_nodes, _FUNCTIONS_INT4_PROCESS)
    )
    peak = costs["process"] + costs["node"] * nodes + int4_process * (sizes.int4 > 0)
    peak += sum(costs[kind] * getattr(sizes, kind) for kind in ("plain", "shared", "packed", "int4"))
    peak += sizes.weights * (not streams) + (_GPU_PROCESS + sizes.weights) * shares_gpu
    return int(_MARGIN * peak)


def free_memory() -> int:
    """Bytes that a build can have, swap included: it reads most of what it holds only once."""
    return available_memory() + available_swap()


def refuse_beyond(needed: int, limit: int | None, what: Path, remedy: str) -> None:
    """EdgeError if a build of `what` will not fit in the limit the user set, or in what is free."""
    if limit is not None and needed > limit:
        size = f"{-(-needed // MIB)}MiB"
        raise EdgeError(
            f"building {what} needs about {_gib(needed)} and --memory allows {_gib(limit)}; give --memory {size}"
            f"{remedy}"
        )
    free = free_memory()
    if limit is None and needed + _RESERVE > free:
        raise EdgeError(
            f"building {what} needs about {_gib(needed)} and {_gib(free)} are free; close other programs, add swap"
            f"{remedy}, or set --memory if you know better"
        )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


class MemoryWatch:
    """Samples a process's anonymous memory while the block runs; ends the process beyond `limit`, or when nothing is
    left on the machine. `verdict` says so; `peak` is in bytes."""

    def __init__(self, child: subprocess.Popen[str], limit: int | None) -> None:
        self.peak = 0
        self.verdict: str | None = None
        self._child, self._limit = child, limit
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process(self._child.pid)
        while not self._done.wait(_SAMPLE_SECONDS):
            try:
                memory = process.memory_info()
            except psutil.Error:  # it has just ended
                return
            anonymous = memory.rss - memory.shared
            self.peak = max(self.peak, anonymous)
            self.verdict = self._judge(anonymous)
            if self.verdict is not None:
                self._child.kill()
                return

    def _judge(self, anonymous: int) -> str | None:
        if self._limit is not None and anonymous > self._limit:
            return f"it takes more than the {_gib(self._limit)} of --memory; allow more, or leave --memory out"
        if free_memory() < _RESERVE:
            return f"it has {_gib(anonymous)} and the machine has no more; close other programs or add swap"
        return None
