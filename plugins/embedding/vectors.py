"""Vectors of the row kernel."""

from __future__ import annotations

import numpy as np

from plugins.embedding import meaning
from plugins.embedding.launch import scaled_rows
from plugins.vectors import ELEMENTS, Buffers, Expected, Vector, normal


def rows_vector(rows: int, hidden: int, element: str, scale: float, table_rows: int) -> Vector:
    """y = scale * table[index]; of three rows or more, two have ids outside the table. One rounding: exact."""
    dtype = ELEMENTS[element]

    def inputs(rng: np.random.Generator) -> Buffers:
        index = rng.integers(0, table_rows, rows, dtype=np.int32)
        if rows > 2:
            index[1], index[-1] = -1, table_rows
        return {"table": normal(rng, (table_rows, hidden), dtype), "index": index}

    def expect(before: Buffers) -> dict[str, Expected]:
        return {"y": Expected(meaning.scaled_rows(before["table"], before["index"], scale))}

    return Vector(
        f"scaled_rows {rows}x{hidden}",
        (scaled_rows(rows, hidden, element, scale, table_rows),),
        inputs,
        {"y": ((rows, hidden), dtype)},
        expect,
        moved=rows * (2 * hidden * dtype.itemsize + 4),
    )
