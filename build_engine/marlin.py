"""Marlin's order of int4 weights and scales, undone (spec: quantization_and_speculation.md 3.3).

The matrix [K, N] is cut in tiles of 16 x 16. Four neighbouring tiles, 1024 codes, are permuted to what the 32 lanes of
a warp load, and packed eight to an int32, low bits first: [K / 16, 2 N]. Entry i of a permutation is the place in the
natural order (tile, k, n) of what is stored at i.
"""

from __future__ import annotations

import numpy as np

from build_engine.quantize import unpack_nibbles

RUN_ROWS = 64  # output features that are permuted together
TILE = 16


def _code_permutation() -> np.ndarray:
    """Every lane holds two 16-bit pairs of k and two n of each of the four tiles, in the order of its registers."""
    lane = np.arange(32).reshape(32, 1, 1, 1)
    tile = np.arange(4).reshape(1, 4, 1, 1)
    n = lane // 4 + np.array([0, 8]).reshape(1, 1, 2, 1)
    k = 2 * (lane % 4) + np.array([0, 1, 8, 9])
    return (TILE * k + n + TILE * TILE * tile).reshape(32, 4, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)


CODE_ORDER = _code_permutation()
GROUPED_SCALE_ORDER = np.arange(64).reshape(8, 8).T.reshape(-1)
# One scale a row: pairs of n, as the lanes hold their sums.
SINGLE_SCALE_ORDER = (2 * np.arange(4)[:, None] + [0, 1, 8, 9, 16, 17, 24, 25]).reshape(-1)


def unpack_codes(words: np.ndarray, first: int, last: int) -> np.ndarray:
    """int32 [K / 16, 2 N] -> codes of the rows first..last, [last - first, K] uint8; N is a multiple of 64."""
    start, stop = _whole_runs(first, last)
    tiles, rows = len(words), stop - start
    part = np.ascontiguousarray(words[:, 2 * start : 2 * stop]).view(np.uint8)
    stored = unpack_nibbles(part).reshape(tiles, rows // RUN_ROWS, len(CODE_ORDER))
    # Natural places as (tile, n, k): 16 codes of one row stay together when the tiles are then put side by side.
    natural = np.argsort(CODE_ORDER).reshape(4, TILE, TILE).swapaxes(1, 2).reshape(-1)
    codes = np.take(stored, natural, axis=-1).reshape(tiles, rows, TILE)
    return codes.swapaxes(0, 1).reshape(rows, tiles * TILE)[first - start : last - start]


def unpack_scales(scales: np.ndarray, first: int, last: int) -> np.ndarray:
    """[groups, N] -> the scales of the rows first..last, [last - first, groups], of the same type."""
    start, stop = _whole_runs(first, last)
    permutation = GROUPED_SCALE_ORDER if len(scales) > 1 else SINGLE_SCALE_ORDER
    runs = scales[:, start:stop].reshape(len(scales), (stop - start) // len(permutation), len(permutation))
    natural = np.take(runs, np.argsort(permutation), axis=-1).reshape(len(scales), stop - start)
    return natural[:, first - start : last - start].T


def _whole_runs(first: int, last: int) -> tuple[int, int]:
    return first // RUN_ROWS * RUN_ROWS, -(-last // RUN_ROWS) * RUN_ROWS
