"""Launches of the sampling kernels; buffers have the names of plugins/sampling."""

from __future__ import annotations

import numpy as np

from edge.errors import EdgeError
from plugins.launch import Kernel, Launch, divide_up

MAX_VOCABULARY = 2**18  # more masses of 2^45 would not fit 64 bits
_BINS, _WARPS = 2048, 32
_ADVANCE_THREADS = 32
_SHARED = _BINS * 8 + _WARPS * (8 + 4) + 16
_KERNEL = Kernel("sampling/kernel.cu", "sampling::sample", "SampleArguments", 1024)
_INPUTS = ("logits", "temperature", "top_k", "top_p", "min_p", "seed", "step")


def sample(rows: int, vocabulary: int, penalised: bool = False) -> Launch:
    """token [rows] int32 from logits [rows, vocabulary] float32 and its parameters, each [rows].

    `penalised`: there are penalties, and `seen`, which is updated.
    """
    if not 0 < vocabulary <= MAX_VOCABULARY:
        raise EdgeError(f"vocabulary of {vocabulary} tokens: the sampling kernel takes 1 to {MAX_VOCABULARY}")
    penalty = ("penalty", "seen") if penalised else (None, None)
    return Launch(_KERNEL, (rows, 1, 1), (*_INPUTS, *penalty, "token", np.int32(vocabulary)), _SHARED)


def advance(rows: int, capacity: int) -> Launch:
    """token [rows] -> what the next decode step reads (input_ids, positions, switch_length, step, each [rows] int32),
    and a line of `history` [capacity, rows]; `count` [rows] int32 are the lines that it holds.
    """
    names = ("token", "input_ids", "positions", "switch_length", "step", "count", "history")
    kernel = Kernel("sampling/advance.cu", f"advance<{_ADVANCE_THREADS}>", "AdvanceArguments", _ADVANCE_THREADS)
    grid = (divide_up(rows, _ADVANCE_THREADS), 1, 1)
    return Launch(kernel, grid, (*names, np.int32(rows), np.int32(capacity)))


def product_launches() -> dict[str, Launch]:
    """What MiniCPM4 launches to choose one token and feed it back."""
    return {"sample": sample(1, 73448), "advance": advance(1, 16)}
