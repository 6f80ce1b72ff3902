"""What `edge.TileLinear` computes."""

from __future__ import annotations

import numpy as np

from plugins.tile_linear.pack import unpack_tiles


def tile_linear(x: np.ndarray, weights: np.ndarray, n: int) -> np.ndarray:
    """x [T, K], weights [ceil(n / 16), K, 16] -> [T, n] float64."""
    return x.astype(np.float64) @ unpack_tiles(weights, n).astype(np.float64).T
