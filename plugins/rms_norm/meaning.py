"""What `edge.RMSNorm` and `edge.AddRMSNorm` compute (spec: infllmv2.md 2)."""

from __future__ import annotations

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """x [T, H], weight [H] -> [T, H]; the normalised value is rounded to x's dtype before the weight is applied."""
    wide = x.astype(np.float32)
    scale = 1 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(epsilon))
    return ((wide * scale).astype(x.dtype) * weight).astype(x.dtype)


def add_rms_norm(
    hidden: np.ndarray, branch: np.ndarray, weight: np.ndarray, scale: float, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """(hidden + scale * branch, its RMSNorm); all [T, H]."""
    scaled = (branch.astype(np.float32) * np.float32(scale)).astype(hidden.dtype)
    total = hidden + scaled
    return total, rms_norm(total, weight, epsilon)
