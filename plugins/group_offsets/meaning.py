"""What `edge.AddGroupOffsets` computes."""

from __future__ import annotations

import numpy as np


def add_group_offsets(x: np.ndarray, product: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """product + (sums of x by group) offsets.

    x [T, K]; product [T, N]; offsets [K / group, N] float16. If every weight of output n in input group g is
    w + offsets[g, n] and product = x w^T, the result is x times the whole weights.
    """
    groups = len(offsets)
    sums = x.reshape(len(x), groups, -1).sum(axis=-1)
    return product + sums @ offsets.astype(x.dtype)
