"""What the row kernel computes (spec: infllmv2.md 2, steps 1 and 4)."""

from __future__ import annotations

import numpy as np


def scaled_rows(table: np.ndarray, index: np.ndarray | None, scale: float) -> np.ndarray:
    """table [V, H], index [T] int32 (None: every row in order) -> [T, H], times `scale` in the table's dtype.

    The host checks ids before a step. One that is outside the table still gives NaN, so that it shows, and no other
    row's values.
    """
    if index is None:
        return table * table.dtype.type(scale)
    inside = (index >= 0) & (index < len(table))
    rows = table[np.where(inside, index, 0)] * table.dtype.type(scale)
    rows[~inside] = np.nan
    return rows
