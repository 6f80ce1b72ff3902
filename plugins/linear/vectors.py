"""Vectors of the linear kernels.

x has small whole numbers and scales are powers of two, so that every product and sum is exact in float32 and on tensor
cores, whatever their order. Weights repeat after a prime number of row tiles: real sizes are made, packed and computed
in no time, and no block finds another one's rows in its place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from plugins.launch import Launch
from plugins.linear import meaning
from plugins.linear.launch import LinearShape, best_parts, head
from plugins.linear.pack import TILE_ROWS, pack_codes, pack_scales, unpack_codes, unpack_scales
from plugins.vectors import ELEMENTS, Buffers, Expected, Vector

_PERIOD = 17 * TILE_ROWS  # rows after which weights repeat


def linear_vector(launch: Launch, shape: LinearShape) -> Vector:
    """y of one gemv or gemm launch of this shape."""

    def expect(before: Buffers) -> dict[str, Expected]:
        return {"y": Expected(_product(before, shape).astype(ELEMENTS[shape.element]))}

    kernel = launch.kernel.body.partition("<")[0]
    return Vector(
        f"{_name(shape, kernel)}{_block(launch)}",
        (launch,),
        lambda rng: _inputs(rng, shape),
        {"y": ((shape.tokens, shape.n), ELEMENTS[shape.element])},
        expect,
        moved=_weight_bytes(shape) + shape.tokens * (shape.k + shape.n) * 2,
    )


def head_vector(shape: LinearShape) -> Vector:
    """logits and the lowest of the largest; every logit occurs again in a later row."""

    def expect(before: Buffers) -> dict[str, Expected]:
        logits = _product(before, shape).astype(np.float32)
        return {"logits": Expected(logits), "token": Expected(meaning.argmax(logits))}

    return Vector(
        _name(shape, "head"),
        head(shape),
        lambda rng: _inputs(rng, shape),
        {
            "logits": ((shape.tokens, shape.n), np.dtype(np.float32)),
            "best": ((shape.tokens, best_parts(shape.n), 2), np.dtype(np.int32)),
            "token": ((shape.tokens,), np.dtype(np.int32)),
        },
        expect,
        moved=_weight_bytes(shape) + shape.tokens * (shape.k * 2 + shape.n * 4),
    )


def _name(shape: LinearShape, kernel: str) -> str:
    group = f"g{shape.group}" if shape.group else ""
    return f"{kernel} {shape.tokens}x{shape.n}x{shape.k} w{shape.bits}{group}"


def _block(launch: Launch) -> str:
    """Which block size: the last number of a gemv's or gemm's template."""
    numbers = [part.strip(" <>") for part in launch.kernel.body.split(",")]
    return f" /{next(part for part in reversed(numbers) if part.isdigit())}"


def _weight_bytes(shape: LinearShape) -> int:
    scales = shape.n * (2 * (shape.k // shape.group) if shape.group else 4)
    return shape.n * shape.k * shape.bits // 8 + scales


def _inputs(rng: np.random.Generator, shape: LinearShape) -> Buffers:
    codes = rng.integers(0, 3 if shape.bits == 2 else 1 << shape.bits, (_PERIOD, shape.k), dtype=np.uint8)
    grid = (_PERIOD, shape.k // shape.group) if shape.group else (_PERIOD,)
    exponents = rng.integers(-4, 2, grid) - (4 if shape.bits == 8 else 0)  # float16 holds the largest y
    scales = np.exp2(exponents).astype(np.float16 if shape.group else np.float32)
    return {
        "x": rng.integers(-8, 8, (shape.tokens, shape.k), endpoint=True).astype(ELEMENTS[shape.element]),
        "weights": _repeated(codes, lambda rows: pack_codes(rows, shape.bits), shape.n),
        "scales": _repeated(scales, lambda rows: pack_scales(rows, shape.k, shape.bits), shape.n),
    }


def _repeated(rows: np.ndarray, pack: Callable[[np.ndarray], np.ndarray], n: int) -> np.ndarray:
    """`n` packed rows: `rows` again and again, the last tile padded."""
    packed = pack(rows)
    as_tiles = packed.reshape(_PERIOD // TILE_ROWS, -1)
    tiles, rest = divmod(n, TILE_ROWS)
    parts = [as_tiles[np.arange(tiles) % len(as_tiles)]]
    if rest:
        start = tiles * TILE_ROWS % _PERIOD
        parts.append(pack(rows[start : start + rest]).reshape(1, -1))
    return np.concatenate(parts).reshape(-1, *packed.shape[1:])


def _product(before: Buffers, shape: LinearShape) -> np.ndarray:
    """The exact y [tokens, n] in float64, from the rows that repeat."""
    rows = min(shape.n, _PERIOD)
    tiles = -(-rows // TILE_ROWS)
    codes = unpack_codes(before["weights"][:tiles], shape.bits, rows)
    scales = unpack_scales(before["scales"][: tiles if shape.group else rows], rows)
    return meaning.linear(before["x"], codes, scales, shape.bits)[:, np.arange(shape.n) % _PERIOD]
