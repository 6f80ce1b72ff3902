"""Codes in the order of plugins/block_linear, and back; what a block has lies as plugins/tile_linear packs it."""

from __future__ import annotations

import numpy as np

from plugins.linear.meaning import ZEROS
from plugins.tile_linear.pack import TILE_ROWS

BLOCKS = (32, 64, 128)  # inputs that share a scale


def vector_inputs(bits: int) -> int:
    """Inputs of a tile whose codes fill a vector of 64 bytes."""
    return 32 // bits


def pack_codes(codes: np.ndarray, bits: int, block: int) -> np.ndarray:
    """codes [N, K] uint8 -> uint8 [ceil(N / 16), ceil(K / block), block * bits / 32, 16, 4]."""
    n, k = codes.shape
    padded = np.pad(codes, ((0, -n % TILE_ROWS), (0, -k % block)), constant_values=ZEROS[bits])
    fields = 8 // bits
    split = padded.reshape(-1, TILE_ROWS, padded.shape[1] // block, block // (4 * fields), fields, 4)
    ordered = split.transpose(0, 2, 3, 1, 5, 4)
    packed = np.zeros(ordered.shape[:-1], np.uint8)
    for field in range(fields):
        packed |= ordered[..., field] << np.uint8(bits * field)
    return packed


def unpack_codes(packed: np.ndarray, bits: int, n: int, k: int) -> np.ndarray:
    """The inverse of pack_codes: [n, k] uint8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    ordered = packed[..., None] >> shifts & np.uint8((1 << bits) - 1)
    rows = ordered.transpose(0, 3, 1, 2, 5, 4).reshape(len(packed) * TILE_ROWS, -1)
    return np.ascontiguousarray(rows[:n, :k])
