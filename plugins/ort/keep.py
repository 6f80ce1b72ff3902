"""The binding of plugins/infllmv2/keep.h in the operator library."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pool", "scales", "fine", "coarse")),
        *((name, ctypes.c_int64) for name in ("type", "planes", "kv_heads", "dim")),
    )


@dataclass(frozen=True)
class Kept:
    """Which tokens of a sequence remain: those at `slots` [n] int32, ascending, go to slots first, first + 1, ...

    pages [P] int32: the sequence's. slots[i] >= first + i.
    """

    pages: np.ndarray
    first: int
    slots: np.ndarray


def keep_tokens(library: Path, pools: Mapping[str, np.ndarray], onnx_type: int, kept: Kept) -> bool:
    """Move them in one layer's pools, by the operators' names, and write the windows that end there.

    onnx_type: of kv_pool's elements. False if a page that is on disk cannot be had; the page file knows why.
    """
    _, planes, heads, _, dim = pools["kv_pool"].shape
    addresses = [
        pools[name].ctypes.data if name in pools else None for name in ("kv_pool", "kv_scales", "c1_pool", "c2_pool")
    ]
    layer = _Layer(*addresses, onnx_type, planes, heads, dim)
    pages, slots = (np.ascontiguousarray(values, np.int32) for values in (kept.pages, kept.slots))
    keep = _function(library)
    return bool(keep(ctypes.byref(layer), pages.ctypes.data, len(pages), kept.first, slots.ctypes.data, len(slots)))


@cache
def _function(library: Path) -> Any:
    """Called in every layer of a step: found once."""
    function = ctypes.CDLL(str(library)).edge_keep_tokens
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (pointer, pointer, number, number, pointer, number)
    return function
