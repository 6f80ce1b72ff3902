"""Rows in tiles of 16, as the kernels of plugins/tile_linear and plugins/block_linear read them, and back."""

from __future__ import annotations

import numpy as np

TILE_ROWS = 16


def pack_tiles(rows: np.ndarray) -> np.ndarray:
    """[N, K] of any type -> [ceil(N / 16), K, 16]; rows that fill the last tile are 0."""
    padded = np.pad(rows, ((0, -len(rows) % TILE_ROWS), (0, 0)))
    return np.ascontiguousarray(padded.reshape(-1, TILE_ROWS, rows.shape[1]).transpose(0, 2, 1))


def unpack_tiles(tiles: np.ndarray, n: int) -> np.ndarray:
    """The inverse of pack_tiles: [n, K]."""
    return np.ascontiguousarray(tiles.transpose(0, 2, 1).reshape(-1, tiles.shape[1])[:n])
