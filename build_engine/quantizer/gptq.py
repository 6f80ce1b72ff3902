"""GPTQ on one matrix (Frantar et al. 2022): symmetric int4 in static groups, errors fed back to later inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from build_engine.quantize import quantize_symmetric
from edge.errors import EdgeError

ZERO, LEVELS = 8, 16
BLOCK = 128  # inputs whose errors stay among themselves before they reach the rest of the matrix in one product
ERROR_ROWS = 256  # of a matrix, widened to float64 at once
_SMALLEST_SCALE = np.float16(2.0**-24)


@dataclass(frozen=True)
class Int4Matrix:
    """W[n, k] = (codes[n, k] - 8) scales[n, k // group]: codes [N, K] uint8, scales [N, K / group] float16 over 0."""

    codes: np.ndarray
    scales: np.ndarray

    def dequantize(self) -> np.ndarray:
        """[N, K] float32."""
        rows, groups = self.scales.shape
        values = self.codes.reshape(rows, groups, -1).astype(np.float32) - ZERO
        values *= self.scales.astype(np.float32)[..., None]
        return values.reshape(rows, -1)


def group_scales(name: str, weight: np.ndarray, group: int) -> np.ndarray:
    """weight [N, K] float32 -> [N, K / group] float16: the smallest step of each group that clips nothing.

    Rounded to the type they are stored in before any code is chosen. EdgeError names a matrix too large for float16.
    """
    scales = quantize_symmetric(weight, group, bits=4).scales
    if scales.max() > np.finfo(np.float16).max:
        raise EdgeError(
            f"tensor {name} needs an int4 step of {float(scales.max()):g}, beyond float16's 65504; its weights are "
            "damaged or must stay exact"
        )
    return np.maximum(scales.astype(np.float16), _SMALLEST_SCALE)


def round_to_nearest(weight: np.ndarray, scales: np.ndarray) -> Int4Matrix:
    """Every weight [N, K] to its nearest code."""
    rows, groups = scales.shape
    steps = weight.reshape(rows, groups, -1) / scales.astype(np.float32)[..., None]
    return Int4Matrix(_codes(steps).reshape(weight.shape), scales)


def input_order(hessian: np.ndarray) -> np.ndarray:
    """[K]: the inputs with the largest activations first, for an early error has most inputs left to make it good.

    Scales are fixed before, and groups stay groups of neighbours: of this order nothing reaches the file (which would
    need desc_act only for groups that follow it).
    """
    return np.argsort(-hessian.diagonal(), kind="stable")


def inverse_factor(name: str, hessian: np.ndarray, order: np.ndarray, damping: float) -> np.ndarray:
    """Upper triangular U [K, K] float32 with U^T U = (H + damping mean(diag H) I)^-1, rows and columns in `order`.

    With everything reversed, H = L L^T gives the triangle that is needed, U = reversed L^-1, without ever inverting H
    (symmetric, float64). EdgeError with the `name` if H is not positive definite.
    """
    mean = float(hessian.diagonal().mean())
    damped = hessian[np.ix_(order[::-1], order[::-1])]
    np.fill_diagonal(damped, damped.diagonal() + damping * (mean if mean > 0 else 1.0))
    try:
        lower = np.linalg.cholesky(damped)
    except np.linalg.LinAlgError:
        raise EdgeError(
            f"{name}: the Hessian of the calibration text is not positive definite with a --damping of {damping:g}; "
            "raise it to 0.01 or more"
        ) from None
    del damped
    _invert_lower(lower)
    return np.ascontiguousarray(lower[::-1, ::-1], np.float32)


def _invert_lower(matrix: np.ndarray) -> None:
    """Invert a lower triangular matrix in place, by halves: most of it is products."""
    size = len(matrix)
    if size <= 64:
        matrix[:] = np.tril(np.linalg.inv(matrix))
        return
    half = size // 2
    first, corner, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    _invert_lower(first)
    _invert_lower(last)
    corner[:] = -last @ (corner @ first)


def gptq(weight: np.ndarray, scales: np.ndarray, factor: np.ndarray, order: np.ndarray) -> Int4Matrix:
    """Round input after input; what rounding one does to the output, those after it make good as far as they can.

    weight [N, K] float32; scales [N, K / group], of the original weights (static groups); factor [K, K] of
    `inverse_factor` for the `order` [K] of rounding.
    """
    inputs = weight.shape[1]
    group = inputs // scales.shape[1]
    steps = np.ascontiguousarray(scales.T.astype(np.float32))
    remaining = weight.T[order]  # [K, N]: an input's weights lie together
    codes = np.empty(remaining.shape, np.uint8)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = np.empty_like(remaining[start:stop])
        for k in range(start, stop):
            step = steps[order[k] // group]
            code = _codes(remaining[k] / step)
            error = (remaining[k] - (code.astype(np.float32) - ZERO) * step) / factor[k, k]
            remaining[k + 1 : stop] -= factor[k, k + 1 : stop, None] * error
            errors[k - start] = error
            codes[order[k]] = code
        remaining[stop:] -= factor[start:stop, stop:].T @ errors
    return Int4Matrix(np.ascontiguousarray(codes.T), scales)


def _codes(steps: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(steps) + ZERO, 0, LEVELS - 1).astype(np.uint8)


def output_error(weight: np.ndarray, other: np.ndarray, hessian: np.ndarray) -> float:
    """||X (W - V)^T|| / ||X W^T|| (Frobenius) from H ~ X^T X alone: ||X A^T||^2 = trace(A H A^T)."""
    numerator = denominator = 0.0
    for start in range(0, len(weight), ERROR_ROWS):
        rows = weight[start : start + ERROR_ROWS].astype(np.float64)
        difference = rows - other[start : start + ERROR_ROWS]
        numerator += float(np.vdot(difference @ hessian, difference))
        denominator += float(np.vdot(rows @ hessian, rows))
    return float(np.sqrt(max(numerator, 0.0) / denominator)) if denominator > 0 else 0.0


def weight_error(weight: np.ndarray, other: np.ndarray) -> float:
    """||W - V|| / ||W|| (Frobenius)."""
    size = float(np.linalg.norm(weight))
    return float(np.linalg.norm(weight - other)) / size if size else 0.0
