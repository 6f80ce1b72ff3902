"""Round-to-nearest 4-bit quantisation of linear weights, in blocks along the input dimension."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Int4Rows:
    """Some rows of a weight matrix: value = (code - zero_point) * scale.

    codes [rows, blocks, group] uint8 in 0..15; scales, zero_points [rows, blocks] (float32, uint8).
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    def dequantize(self) -> np.ndarray:
        """[rows, blocks * group] float32."""
        values = (self.codes.astype(np.float32) - self.zero_points[..., None]) * self.scales[..., None]
        return values.reshape(len(values), -1)


def quantize_int4(weight: np.ndarray, group_size: int, symmetric: bool) -> Int4Rows:
    """weight [rows, K] float32 -> codes; K is padded with zeros to whole groups.

    Symmetric: zero point 8, and the value of largest magnitude maps to code 0 exactly (GGML's Q4_0 rule).
    Asymmetric: 16 levels between the group's minimum and maximum, 0 always among them.
    """
    rows, width = weight.shape
    blocks = -(-width // group_size)
    if blocks * group_size != width:
        weight = np.pad(weight, ((0, 0), (0, blocks * group_size - width)))
    groups = weight.reshape(rows, blocks, group_size)
    if symmetric:
        largest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)[..., 0]
        scales = largest / np.float32(-8)
        zero_points = np.full((rows, blocks), 8, np.uint8)
    else:
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scales = (high - low) / np.float32(15)
        zero_points = np.rint(np.divide(-low, scales, out=np.zeros_like(low), where=scales != 0)).astype(np.uint8)
    scales[scales == 0] = 1  # an all-zero group; TensorRT refuses a zero scale
    codes = np.rint(groups / scales[..., None]) + zero_points[..., None]
    return Int4Rows(np.clip(codes, 0, 15).astype(np.uint8), scales, zero_points)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Two 4-bit codes a byte along the last axis, the first in the low nibble; an odd end is padded with 0."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., ::2] | (codes[..., 1::2] << 4)
