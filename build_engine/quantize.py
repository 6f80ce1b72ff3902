"""Round-to-nearest quantisation of linear weights, in groups along the input dimension."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class QuantizedRows:
    """Some rows of a weight matrix: value = code * scale + minimum.

    codes [rows, groups, group_size] uint8; scales, minima [rows, groups] float32. Scales are positive.
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray

    def dequantize(self) -> np.ndarray:
        """[rows, groups * group_size] float32."""
        values = self.codes.astype(np.float32) * self.scales[..., None] + self.minima[..., None]
        return values.reshape(len(values), -1)


def quantize_symmetric(weight: np.ndarray, group_size: int, bits: int) -> QuantizedRows:
    """weight [rows, K] float32 -> codes around 2^(bits-1), the one that means 0.

    The scale is the smallest positive one that clips nothing: max(w / (2^(bits-1) - 1), -w / 2^(bits-1)).
    8 bits: max|w| / 127, so that the values of a GGML Q8_0 block come back exactly.
    """
    groups = _groups(weight, group_size)
    zero = 1 << (bits - 1)
    if bits == 8:
        scales = np.abs(groups).max(-1) / np.float32(zero - 1)
    else:
        scales = np.maximum(groups.max(-1) / np.float32(zero - 1), groups.min(-1) / np.float32(-zero))
    scales[scales == 0] = 1  # an all-zero group; TensorRT refuses a zero scale
    codes = np.rint(groups / scales[..., None]) + zero
    return QuantizedRows(np.clip(codes, 0, 2 * zero - 1).astype(np.uint8), scales, -zero * scales)


def quantize_affine(weight: np.ndarray, group_size: int) -> QuantizedRows:
    """weight [rows, K] float32 -> 16 levels from each group's minimum to its maximum.

    The minimum is kept as it is and not rounded to a whole number of steps, so that the values of a GGML Q4_1
    block come back exactly.
    """
    groups = _groups(weight, group_size)
    minima = groups.min(-1)
    scales = (groups.max(-1) - minima) / np.float32(15)
    scales[scales == 0] = 1
    # A subnormal scale rounds by whole steps: without the limit a code would spill into its neighbour's nibble.
    codes = np.minimum(np.rint((groups - minima[..., None]) / scales[..., None]), 15)
    return QuantizedRows(codes.astype(np.uint8), scales, minima)


def _groups(weight: np.ndarray, group_size: int) -> np.ndarray:
    """[rows, K] -> [rows, groups, group_size], K padded with zeros to whole groups."""
    rows, width = weight.shape
    if missing := -width % group_size:
        weight = np.pad(weight, ((0, 0), (0, missing)))
    return weight.reshape(rows, -1, group_size)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Two 4-bit codes a byte along the last axis (of even length), the first in the low nibble."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """The inverse of pack_nibbles: uint8 [..., bytes] -> [..., 2 bytes]."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., ::2])
    np.right_shift(packed, 4, out=codes[..., 1::2])
    return codes
