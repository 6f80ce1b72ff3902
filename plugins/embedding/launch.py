"""Launches of the row kernel: the embedding, the choice of rows, and the scale before the head."""

from __future__ import annotations

import numpy as np

from edge.errors import EdgeError
from plugins.launch import Kernel, Launch, divide_up

_THREADS = 128


def scaled_rows(rows: int, hidden: int, element: str, scale: float, table_rows: int, indexed: bool = True) -> Launch:
    """y [rows, hidden] = scale * table [table_rows, hidden], of `element` ('half' or 'bf16').

    Row r is the table's row index[r] if `indexed`, else row r. hidden is a multiple of 8.
    """
    if hidden % 8 or hidden <= 0:
        raise EdgeError(f"hidden size {hidden}: the row kernel takes positive multiples of 8")
    kernel = Kernel("embedding/kernel.cu", f"scaled_rows<{element}, {_THREADS}>", "RowsArguments", _THREADS)
    vectors = hidden // 8
    arguments = (
        "table",
        "index" if indexed else None,
        "y",
        np.int32(vectors),
        np.int32(table_rows),
        np.float32(scale),
    )
    return Launch(kernel, (rows, divide_up(vectors, _THREADS), 1), arguments)


def product_launches() -> dict[str, Launch]:
    """What MiniCPM4-8B and 0.5B launch to decode one token."""
    launches = {}
    for element in ("half", "bf16"):
        for model, hidden, divisor in (("8b", 4096, 16), ("0.5b", 1024, 4)):
            name = f"{model}_{element}"
            launches[f"embedding_{name}"] = scaled_rows(1, hidden, element, 12, 73448)
            launches[f"logits_rows_{name}"] = scaled_rows(1, hidden, element, 1, 1)
            launches[f"head_scale_{name}"] = scaled_rows(1, hidden, element, 1 / divisor, 1, indexed=False)
    return launches
