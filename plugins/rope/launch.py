"""Launches of the rotation table's kernel."""

from __future__ import annotations

import numpy as np

from plugins.launch import Kernel, Launch, divide_up

_THREADS = 128


def rope_table(
    tokens: int,
    half: int,
    sequences: int,
    original_length: int | None = None,
    attention_factor: float = 1.0,
) -> Launch:
    """positions [tokens], query_start [sequences + 1] -> cos, sin [tokens, half] float32.

    The constants inverse_short, inverse_long and frequency [half] are those of plugins/rope/meaning.py. With an
    `original_length`, switch_length [sequences] chooses each sequence's list; without, the short one is everyone's.
    Angles must stay below 2^19.
    """
    switches = original_length is not None
    arguments = (
        "positions",
        "query_start" if switches else None,
        "switch_length" if switches else None,
        "inverse_short",
        "inverse_long" if switches else None,
        "frequency",
        "cos",
        "sin",
        np.int32(tokens),
        np.int32(half),
        np.int32(sequences),
        np.int32(original_length or 0),
        np.float32(attention_factor),
    )
    kernel = Kernel("rope/kernel.cu", f"rope_table<{_THREADS}>", "RopeArguments", _THREADS)
    return Launch(kernel, (divide_up(tokens * half, _THREADS), 1, 1), arguments)


def product_launches() -> dict[str, Launch]:
    """What MiniCPM4-8B and 0.5B launch to decode one token."""
    return {"rope_table_8b": rope_table(1, 64, 1, 32768), "rope_table_0.5b": rope_table(1, 32, 1)}
