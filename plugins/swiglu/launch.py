"""Launches of edge.SwiGLU; buffers have the operator's names."""

from __future__ import annotations

import numpy as np

from edge.errors import EdgeError
from plugins.launch import Kernel, Launch, divide_up

_THREADS = 128


def swiglu(rows: int, width: int, element: str) -> Launch:
    """gate_up [rows, 2 width] -> y [rows, width] of `element` ('half' or 'bf16'); width is a multiple of 8."""
    if width % 8 or width <= 0:
        raise EdgeError(f"intermediate size {width}: the SwiGLU kernel takes positive multiples of 8")
    kernel = Kernel("swiglu/kernel.cu", f"swiglu<{element}, {_THREADS}>", "SwigluArguments", _THREADS)
    vectors = width // 8
    return Launch(kernel, (rows, divide_up(vectors, _THREADS), 1), ("gate_up", "y", np.int32(vectors)))


def product_launches() -> dict[str, Launch]:
    """What MiniCPM4-8B and 0.5B launch to decode one token."""
    widths = {"8b": 16384, "0.5b": 4096}
    return {f"swiglu_{m}_{element}": swiglu(1, w, element) for m, w in widths.items() for element in ("half", "bf16")}
