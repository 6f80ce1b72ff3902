"""What `edge.BlockLinear` and `edge.BlockLinearOffsets` compute (spec: quantization_and_speculation.md 1.1, 2.4)."""

from __future__ import annotations

import numpy as np

from plugins.linear import meaning as linear
from plugins.linear.meaning import ZEROS


def weights(
    codes: np.ndarray, scales: np.ndarray, bits: int, block: int, offsets: np.ndarray | None = None
) -> np.ndarray:
    """codes [N, K] uint8; scales, offsets [N, ceil(K / block)] -> [N, K] float64, exactly."""
    k = codes.shape[1]
    whole = np.pad(codes, ((0, 0), (0, -k % block)), constant_values=ZEROS[bits])
    values = linear.weights(whole, scales, bits)[:, :k]
    return values if offsets is None else values + np.repeat(offsets.astype(np.float64), block, axis=1)[:, :k]


def round_rows(x: np.ndarray, block: int) -> np.ndarray:
    """x [T, K] float32 as the kernels see it, float64: codes of -127 to 127 times max|x| / 127 of their block.

    Offsets are not multiplied with it but with x itself.
    """
    rows, k = x.shape
    blocks = np.pad(x, ((0, 0), (0, -k % block))).reshape(rows, -1, block)
    largest = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, 0)
    codes = np.rint(blocks.astype(np.float64) * inverse)  # rounded once, as a fused product and sum is
    return (codes * (largest / np.float32(127))).reshape(rows, -1)[:, :k]
