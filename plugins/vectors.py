"""Vectors: launches with inputs made from a seed, and what numpy says that they must leave in memory.

CI runs them in the emulator (tests/test_vectors.py), `edge selftest` on a device, with the same tolerances. Where
numbers can be chosen so that every product and sum is exact in float32, they are, and the tolerance is zero: neither
the order of a sum nor a contracted multiply-add shows then, every wrong address does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from plugins.launch import Launch

ELEMENTS = {"half": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
UNIT = {"half": 2.0**-10, "bf16": 2.0**-7}  # of the last place, relative

Buffers = dict[str, np.ndarray]
Form = tuple[tuple[int, ...], np.dtype]  # shape and dtype


@dataclass(frozen=True)
class Expected:
    """A buffer after the launches: each value may be off by absolute + relative * |value|; NaN must be NaN.

    absolute: of all values, or an array that broadcasts to them.
    """

    values: np.ndarray
    absolute: float | np.ndarray = 0.0
    relative: float = 0.0


@dataclass(frozen=True)
class Vector:
    """Launches to judge.

    inputs: makes what they read, from a seeded generator; outputs: what they write, poisoned before they run; expect:
    buffers before the run -> what must hold after it, of outputs and of what is updated in place; moved: bytes that any
    implementation reads and writes.
    """

    name: str
    launches: tuple[Launch, ...]
    inputs: Callable[[np.random.Generator], Buffers]
    outputs: Mapping[str, Form]
    expect: Callable[[Buffers], dict[str, Expected]]
    moved: int

    def buffers(self) -> Buffers:
        """All buffers before the run, the same every time."""
        return self.inputs(np.random.default_rng(0)) | {name: poisoned(*form) for name, form in self.outputs.items()}


@dataclass(frozen=True)
class Deviation:
    """The element of a vector's outputs that uses most of its tolerance, or exceeds it most; NaN: where it is wrong."""

    buffer: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it is within its tolerance."""
        return self.error <= self.allowed


def worst(expected: Mapping[str, Expected], got: Mapping[str, np.ndarray]) -> Deviation:
    """The worst element of all expected buffers."""
    found = [_worst_of(name, e, got[name]) for name, e in expected.items()]
    return found[int(_severity(np.array([d.error for d in found]), np.array([d.allowed for d in found])).argmax())]


def _worst_of(name: str, expected: Expected, got: np.ndarray) -> Deviation:
    want, have = (array.astype(np.float64).reshape(-1) for array in (expected.values, got))
    if want.size != have.size:
        raise ValueError(f"{name} has {have.size} values, the vector expects {want.size}")
    with np.errstate(invalid="ignore"):
        error = np.where((want == have) | (np.isnan(want) & np.isnan(have)), 0.0, np.abs(want - have))
        absolute = np.broadcast_to(expected.absolute, expected.values.shape).reshape(-1)
        allowed = absolute + expected.relative * np.where(np.isfinite(want), np.abs(want), 0.0)
    at = int(_severity(error, allowed).argmax())
    return Deviation(name, float(error[at]), float(allowed[at]))


def _severity(error: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Errors by their share of the tolerance; where there is none, and where an error is NaN, infinity."""
    with np.errstate(all="ignore"):
        return np.where(error == 0, 0.0, np.where(np.isnan(error), np.inf, error / allowed))


def poisoned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that was never written: NaN, or a number that is no token."""
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = 0x7F if dtype.kind == "i" else 0xFF
    return array


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, scale: float = 1.0) -> np.ndarray:
    """Random numbers of about `scale`."""
    return (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(dtype)


def eighths(rng: np.random.Generator, shape: tuple[int, ...], most: int, dtype: np.dtype) -> np.ndarray:
    """Multiples of 1/8 up to most / 8, which sums and products in float32 keep exact."""
    return (rng.integers(-most, most, shape, endpoint=True) / 8).astype(dtype)
