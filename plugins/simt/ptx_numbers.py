"""Floating-point values of PTX types in numpy: bit patterns to float64 and back, rounded once.

Types are PTX's: f16, bf16, f16x2, bf16x2 are held as unsigned integers (pairs: low half first), f32 and f64 as numpy
floats. A pair type of n registers decodes to 2 n values, so that one function serves a type and its pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(bool),
    "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
DTYPES |= {f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)}
DTYPES |= {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}

SMALLEST_NORMAL = np.finfo(np.float32).tiny
NAN = np.uint16(0x7FFF)  # the only one that half and bf16 instructions make


def decode(kind: str, bits: np.ndarray) -> np.ndarray:
    """Registers of floating-point type `kind` -> their values in float64."""
    if kind in ("f16", "f16x2"):
        return bits.view(np.float16).astype(np.float64)
    if kind in ("bf16", "bf16x2"):
        return (bits.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)


def encode(kind: str, values: np.ndarray) -> np.ndarray:
    """float64 values -> registers of type `kind`, rounded to nearest even once."""
    if kind in ("f16", "f16x2"):
        return np.where(np.isnan(values), NAN, values.astype(np.float16).view(np.uint16)).view(DTYPES[kind])
    if kind in ("bf16", "bf16x2"):
        return _to_bf16(values).view(DTYPES[kind])
    return values.astype(DTYPES[kind])


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """By way of float32 rounded to odd, which has enough bits more than bf16 to keep a second rounding exact."""
    nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    odd = (bits - (np.abs(nearest) > np.abs(values))) | (nearest != values)
    odd = odd.astype(np.uint32)
    rounded = (odd + np.uint32(0x7FFF) + ((odd >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), NAN, rounded.astype(np.uint16))


def sum_to_odd(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y in float64, rounded to odd: rounding it again, to fewer bits and in any direction, is exact.

    Where the sum is not exact its last bit is 1 (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums").
    """
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)  # exact (Knuth's two-sum); NaN beside infinities
    change = (np.abs(error) > 0) & ((total.view(np.int64) & 1) == 0)
    if change.any():
        away = np.where((error > 0) == (total > 0), 1, -1)
        total = (total.view(np.int64) + np.where(change, away, 0)).view(np.float64)
    return total


def to_float32(values: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """float64 -> float32, rounded to nearest even (rn), zero (rz), minus (rm) or plus infinity (rp)."""
    nearest = values.astype(np.float32)
    if rounding == "rn":
        return nearest
    wrong = {
        "rz": np.abs(nearest) > np.abs(values),
        "rm": nearest > values,
        "rp": nearest < values,
    }[rounding]
    target = {"rz": 0, "rm": -np.inf, "rp": np.inf}[rounding]
    return np.where(wrong, np.nextafter(nearest, np.float32(target)), nearest)


def flush(values: np.ndarray) -> np.ndarray:
    """Subnormal float32 values -> zeros of the same sign (.ftz)."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def clamp(values: np.ndarray, kind: str) -> np.ndarray:
    """Integers -> the nearest ones that type `kind` has."""
    limits = np.iinfo(DTYPES[kind].name)
    if values.dtype == np.uint64:
        return np.minimum(values, np.uint64(limits.max)).astype(DTYPES[kind])
    return np.clip(values.astype(np.int64), limits.min, min(limits.max, 2**63 - 1)).astype(DTYPES[kind])
