"""Vectors of sampling."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from plugins.sampling import meaning
from plugins.sampling.launch import advance, sample
from plugins.vectors import Buffers, Expected, Vector, normal

_PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "seed", "step", "penalty")


def sample_vector(rows: int, vocabulary: int) -> Vector:
    """token and seen; greedy in the first row, other filters in the others. Whole numbers: exact."""

    def inputs(rng: np.random.Generator) -> Buffers:
        turn = np.arange(rows)
        return {
            "logits": normal(rng, (rows, vocabulary), np.dtype(np.float32), 3),
            "temperature": np.choose(turn % 3, [0.0, 0.8, 1.0]).astype(np.float32),
            "top_k": np.choose(turn % 3, [0, 0, 40]).astype(np.int32),
            "top_p": np.choose(turn % 3, [1.0, 0.9, 1.0]).astype(np.float32),
            "min_p": np.choose(turn % 3, [0.0, 0.0, 0.02]).astype(np.float32),
            "seed": rng.integers(2**63, size=rows, dtype=np.uint64),
            "step": rng.integers(2**31 - 1, size=rows, dtype=np.int32),
            "penalty": np.full(rows, 1.25, np.float32),
            "seen": rng.integers(2**32, size=(rows, -(-vocabulary // 32)), dtype=np.uint32),
        }

    def expect(before: Buffers) -> dict[str, Expected]:
        parameters = {name: before[name] for name in _PARAMETERS}
        tokens = meaning.sample(meaning.SamplingInputs(before["logits"], **parameters, seen=before["seen"]))
        seen = before["seen"].copy()
        meaning.mark_seen(seen, tokens)
        return {"token": Expected(tokens), "seen": Expected(seen)}

    return Vector(
        f"sample {rows}x{vocabulary}",
        (sample(rows, vocabulary, penalised=True),),
        inputs,
        {"token": ((rows,), np.dtype(np.int32))},
        expect,
        moved=rows * (4 * vocabulary + vocabulary // 8),
    )


def advance_vector(rows: int) -> Vector:
    """What the next decode step reads; the history has room for all rows but the last. Whole numbers: exact."""
    capacity = 3

    def inputs(rng: np.random.Generator) -> Buffers:
        positions = rng.integers(0, 10000, rows, dtype=np.int32)
        count = np.arange(rows, dtype=np.int32) % capacity
        count[1:][-1:] = capacity
        return {
            "token": rng.integers(-1, 70000, rows, dtype=np.int32),
            "input_ids": rng.integers(0, 70000, rows, dtype=np.int32),
            "positions": positions,
            "switch_length": positions + np.arange(1, rows + 1, dtype=np.int32),
            "step": rng.integers(0, 50, rows, dtype=np.int32),
            "count": count,
            "history": rng.integers(0, 70000, (capacity, rows), dtype=np.int32),
        }

    def expect(before: Buffers) -> dict[str, Expected]:
        state = meaning.DecodeState(**{f.name: before[f.name].copy() for f in fields(meaning.DecodeState)})
        meaning.advance(before["token"], state)
        return {name: Expected(values) for name, values in vars(state).items()}

    return Vector(f"advance {rows}", (advance(rows, capacity),), inputs, {}, expect, moved=rows * 11 * 4)
