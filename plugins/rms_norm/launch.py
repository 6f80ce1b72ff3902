"""Launches of edge.RMSNorm and edge.AddRMSNorm; buffers have the operators' names."""

from __future__ import annotations

import numpy as np

from edge.errors import EdgeError
from plugins.launch import Kernel, Launch, divide_up

MAX_HIDDEN = 16384
_MAX_THREADS = 512


def rms_norm(rows: int, hidden: int, element: str, epsilon: float) -> Launch:
    """y = RMSNorm(x), both [rows, hidden] of `element` ('half' or 'bf16'); hidden is a multiple of 8 up to 16384."""
    names = ("x", None, "weight", None, "y")
    return _launch(rows, hidden, names, 1, epsilon, _kernel(hidden, element, add=False))


def add_rms_norm(rows: int, hidden: int, element: str, scale: float, epsilon: float) -> Launch:
    """total = hidden + scale * branch, y = RMSNorm(total); `total` may be the memory of `hidden`."""
    names = ("hidden", "branch", "weight", "total", "y")
    return _launch(rows, hidden, names, scale, epsilon, _kernel(hidden, element, add=True))


def _kernel(hidden: int, element: str, add: bool) -> Kernel:
    vectors = hidden // 8
    if hidden % 8 or not 0 < hidden <= MAX_HIDDEN:
        raise EdgeError(f"hidden size {hidden}: the norm kernel takes multiples of 8 up to {MAX_HIDDEN}")
    # One vector a thread as long as a block has the threads: a decode step has few rows, and latency counts.
    threads = min(divide_up(vectors, 32) * 32, _MAX_THREADS)
    body = f"rms_norm<{element}, {threads}, {divide_up(vectors, threads)}, {str(add).lower()}>"
    return Kernel("rms_norm/kernel.cu", body, "NormArguments", threads)


def _launch(
    rows: int, hidden: int, names: tuple[str | None, ...], scale: float, epsilon: float, kernel: Kernel
) -> Launch:
    numbers = (np.int32(hidden // 8), np.float32(scale), np.float32(epsilon))
    warp_sums = kernel.threads // 32 * 4
    return Launch(kernel, (rows, 1, 1), (*names, *numbers), warp_sums)


def product_launches() -> dict[str, Launch]:
    """What MiniCPM4-8B and 0.5B launch to decode one token."""
    launches = {}
    for element in ("half", "bf16"):
        launches[f"rms_norm_8b_{element}"] = rms_norm(1, 4096, element, 1e-6)
        launches[f"rms_norm_0.5b_{element}"] = rms_norm(1, 1024, element, 1e-5)
        launches[f"add_rms_norm_8b_{element}"] = add_rms_norm(1, 4096, element, 1.4 / 32**0.5, 1e-6)
        launches[f"add_rms_norm_0.5b_{element}"] = add_rms_norm(1, 1024, element, 1.4 / 24**0.5, 1e-5)
    return launches
