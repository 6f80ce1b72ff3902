"""Vectors of the rotation table."""

from __future__ import annotations

import numpy as np

from plugins.rope import meaning
from plugins.rope.launch import rope_table
from plugins.vectors import Buffers, Expected, Vector

_ORIGINAL_LENGTH = 32768


def table_vector(tokens: int, half: int) -> Vector:
    """cos and sin of `tokens` positions up to 131071 for each list: two sequences, of which one takes the long list.

    The kernel's polynomials are good to 1.5e-7 (rope/kernel.cu), and float32 rounds the result once more.
    """
    tables = meaning.rope_tables(10000.0, np.linspace(1, 4, half).tolist(), np.linspace(1, 40, half).tolist())

    def inputs(rng: np.random.Generator) -> Buffers:
        positions = rng.integers(0, 131072, 2 * tokens, dtype=np.int32)
        positions[:1], positions[-1:] = 0, 131071
        return {
            "positions": positions,
            "query_start": np.array([0, tokens, 2 * tokens], np.int32),
            "switch_length": np.array([_ORIGINAL_LENGTH, _ORIGINAL_LENGTH + 1], np.int32),
            "inverse_short": tables.inverse_short,
            "inverse_long": tables.inverse_long,
            "frequency": tables.frequency,
        }

    def expect(before: Buffers) -> dict[str, Expected]:
        positions, query_start, switch_length = (before[n] for n in ("positions", "query_start", "switch_length"))
        cos, sin = meaning.rope_table(positions, query_start, switch_length, tables, _ORIGINAL_LENGTH, 1.0)
        return {"cos": Expected(cos, absolute=2e-7), "sin": Expected(sin, absolute=2e-7)}

    return Vector(
        f"rope_table {2 * tokens}x{half}",
        (rope_table(2 * tokens, half, 2, _ORIGINAL_LENGTH),),
        inputs,
        dict.fromkeys(("cos", "sin"), ((2 * tokens, half), np.dtype(np.float32))),
        expect,
        moved=(4 * tokens + 3) * half * 4 + 2 * tokens * 4,
    )
