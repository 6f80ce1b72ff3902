"""What the linear kernels compute (spec: quantization_and_speculation.md 1.1, 2.4)."""

from __future__ import annotations

import numpy as np

ZEROS = {2: 1, 4: 8, 8: 128}  # bits -> the code that means 0


def weights(codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """codes [N, K] uint8; scales [N, K / group] or [N] -> [N, K] float64, exactly."""
    groups = codes.reshape(len(codes), 1 if scales.ndim == 1 else scales.shape[1], -1)
    values = (groups.astype(np.float64) - ZEROS[bits]) * scales.reshape(len(codes), -1, 1).astype(np.float64)
    return values.reshape(codes.shape)


def linear(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """x [M, K] -> [M, N] float64, before it is rounded to the output's type."""
    return x.astype(np.float64) @ weights(codes, scales, bits).T


def argmax(logits: np.ndarray) -> np.ndarray:
    """logits [M, N] -> [M] int32: the lowest id of the largest, NaN counting as -infinity."""
    return np.argmax(np.where(np.isnan(logits), -np.inf, logits), axis=-1).astype(np.int32)
