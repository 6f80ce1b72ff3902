"""What the rotation table's kernel computes (spec: infllmv2.md 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RopeTables:
    """A model's constants, each [d / 2] float32: 1 / theta^(2c / d), and 1 over LongRoPE's two lists."""

    frequency: np.ndarray
    inverse_short: np.ndarray
    inverse_long: np.ndarray


def rope_tables(theta: float, short_factor: Sequence[float], long_factor: Sequence[float]) -> RopeTables:
    """The constants of a model whose lists have d / 2 entries; ones for a model without LongRoPE."""
    half = len(short_factor)
    exponent = np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)
    frequency = (np.float32(1) / np.float32(theta) ** exponent).astype(np.float32)
    short, long = (np.float32(1) / np.asarray(factors, np.float32) for factors in (short_factor, long_factor))
    return RopeTables(frequency, short, long)


def rope_table(
    positions: np.ndarray,
    query_start: np.ndarray,
    switch_length: np.ndarray | None,
    tables: RopeTables,
    original_length: int,
    attention_factor: float,
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [T, d / 2] float32, times the attention factor; angles in Hugging Face's order of rounding.

    positions [T]; query_start [B + 1]; switch_length [B]: a sequence longer than `original_length` takes the long
    list, none does without it.
    """
    inverse = tables.inverse_short
    if switch_length is not None:
        is_long = np.repeat(switch_length > original_length, np.diff(query_start))
        inverse = np.where(is_long[:, None], tables.inverse_long, tables.inverse_short)
    angle = positions.astype(np.float32)[:, None] * inverse * tables.frequency
    exact = angle.astype(np.float64)
    factor = np.float32(attention_factor)
    return np.cos(exact).astype(np.float32) * factor, np.sin(exact).astype(np.float32) * factor
