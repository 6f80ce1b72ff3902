"""Launches of the linear kernels; buffers have the names of plugins/linear: x, weights, scales -> y.

Which kernel, and how many output rows or tokens a block takes, is a table of what was compiled and an estimate of the
time from bytes and from how evenly blocks fill the SMs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plugins.launch import Kernel, Launch, divide_up
from plugins.linear.pack import TILE_ROWS, check_format, vector_inputs

ORIN_SMS = 16
_WARPS = 8  # of gemv
_COLUMNS = 8  # tokens of a gemv block
# bits -> the most row tiles of a gemv block whose sums and codes fit the registers. Blocks of few bits want many: each
# block reads x again.
_MOST_TILES = {2: 16, 4: 8, 8: 4}
# (bits, group, row tiles) that need the registers of a whole SM; so do 16 row tiles.
_ALONE = {(2, 32, 8), (8, 128, 4)}
_GEMM_ROWS, _GEMM_THREADS = 128, 128
GEMM_TOKENS = (16, 32, 64)  # of a gemm block
_HEAD_TILES = 4
_ARGMAX_THREADS = 256


@dataclass(frozen=True)
class LinearShape:
    """y [tokens, n] = x [tokens, k] W^T; element: 'half' or 'bf16', of x and y; bits and group as in plugins/linear."""

    tokens: int
    n: int
    k: int
    bits: int
    group: int
    element: str


def linear(shape: LinearShape, sms: int = ORIN_SMS) -> Launch:
    """The launch for any number of tokens: weights read once up to 8 tokens, or once for every 16 to 64."""
    check_format(shape.k, shape.bits, shape.group)
    blocks = divide_up(shape.tokens, 16) * divide_up(shape.n, _GEMM_ROWS)
    few = shape.tokens <= 2 * _COLUMNS and blocks < sms
    if shape.tokens <= _COLUMNS or few or shape.bits == 8:
        return gemv(shape, _row_tiles(shape, sms))
    return gemm(shape, _tokens_a_block(shape, sms))


def gemv(shape: LinearShape, row_tiles: int) -> Launch:
    """Blocks of 16 row_tiles output rows (see row_tile_choices) and 8 tokens."""
    return _gemv(shape, row_tiles, shape.element, "y", None)


def gemm(shape: LinearShape, tokens: int) -> Launch:
    """Blocks of 128 output rows and so many tokens (GEMM_TOKENS); 2 or 4 bits."""
    body = f"gemm<{shape.element}, {shape.bits}, {shape.group}, {tokens}>"
    kernel = Kernel("linear/gemm.cu", body, "GemmArguments", _GEMM_THREADS)
    inputs = vector_inputs(shape.bits)
    tiles = _GEMM_ROWS // TILE_ROWS
    scales = tiles * 32 * max(inputs // shape.group, 1) if shape.group else 0
    stage = tokens * inputs * 2 + tiles * 512 + scales
    grid = (divide_up(shape.tokens, tokens), divide_up(shape.n, _GEMM_ROWS), 1)
    sizes = _sizes(shape)
    return Launch(kernel, grid, ("x", "weights", "scales", "y", *sizes), stage * (3 if tokens == 64 else 4))


def head(shape: LinearShape) -> tuple[Launch, Launch]:
    """logits [tokens, n] float32 and token [tokens] int32, the lowest of the largest; best: see best_parts."""
    check_format(shape.k, shape.bits, shape.group)
    logits = _gemv(shape, _HEAD_TILES, "float", "logits", "best")
    kernel = Kernel("linear/argmax.cu", f"argmax<{_ARGMAX_THREADS}>", "ArgmaxArguments", _ARGMAX_THREADS)
    arguments = ("best", "token", np.int32(best_parts(shape.n)))
    return logits, Launch(kernel, (shape.tokens, 1, 1), arguments, _ARGMAX_THREADS // 32 * 8)


def best_parts(n: int) -> int:
    """P of the head's scratch buffer `best` [tokens, P, 2] int32."""
    return divide_up(n, _HEAD_TILES * TILE_ROWS) * (_HEAD_TILES * TILE_ROWS // 32)


def _gemv(shape: LinearShape, row_tiles: int, output: str, y: str, best: str | None) -> Launch:
    body = f"gemv<{shape.element}, {shape.bits}, {shape.group}, {row_tiles}, {output}>"
    kernel = Kernel("linear/gemv.cu", body, "GemvArguments", _WARPS * 32, _blocks_an_sm(shape, row_tiles))
    rows = row_tiles * TILE_ROWS
    grid = (divide_up(shape.n, rows), divide_up(shape.tokens, _COLUMNS), 1)
    sums = _WARPS * min(shape.tokens, _COLUMNS) * (rows + 4) * 4
    return Launch(kernel, grid, ("x", "weights", "scales", y, best, *_sizes(shape)), sums)


def row_tile_choices(bits: int, group: int) -> tuple[int, ...]:
    """Row tiles of a gemv block for which there are kernels: without spills, and bound by memory."""
    small_groups = bits == 2 and group in (32, 64)
    fewest, most = (2, 8) if small_groups else (1, _MOST_TILES[bits])
    return tuple(tiles for tiles in (1, 2, 4, 8, 16) if fewest <= tiles <= most)


def _blocks_an_sm(shape: LinearShape, row_tiles: int) -> int:
    """How many gemv blocks the registers of an SM hold."""
    if row_tiles == 16 or (shape.bits, shape.group, row_tiles) in _ALONE:
        return 1
    return 3 if row_tiles == 1 else 2


def _sizes(shape: LinearShape) -> tuple[np.int32, ...]:
    return np.int32(shape.tokens), np.int32(shape.n), np.int32(shape.k)


def _row_tiles(shape: LinearShape, sms: int) -> int:
    """Row tiles of a gemv block, by the bytes that pass and the SMs' share of them.

    A block reads x again (from L2, counted as a quarter). A last wave of few blocks has more bandwidth for each, but
    is taken to use no more than twice its share.
    """
    tiles = divide_up(shape.n, TILE_ROWS)
    weights = TILE_ROWS * (shape.bits / 8 + (2 / shape.group if shape.group else 0))
    x = 2 * min(shape.tokens, _COLUMNS) / 4

    def cost(row_tiles: int) -> float:
        slots = sms * _blocks_an_sm(shape, row_tiles)
        waves, rest = divmod(divide_up(tiles, row_tiles), slots)
        last = max(rest / slots, 1 / 2) if rest else 0
        return (waves + last) * slots * (row_tiles * weights + x)

    return min(row_tile_choices(shape.bits, shape.group), key=cost)


def _tokens_a_block(shape: LinearShape, sms: int) -> int:
    """The most tokens that leave no SM idle and no half of a block without tokens."""
    for tokens in (64, 32):
        blocks = divide_up(shape.tokens, tokens) * divide_up(shape.n, _GEMM_ROWS)
        if shape.tokens > tokens // 2 and blocks >= sms:
            return tokens
    return 16


# (n, k) of the projections, hidden size and feed-forward of MiniCPM4-8B and 0.5B.
_8B = {"qkv": (4608, 4096), "o": (4096, 4096), "gate_up": (32768, 4096), "down": (4096, 16384)}
_05B = {"qkv": (1280, 1024), "o": (1024, 1024), "gate_up": (8192, 1024), "down": (1024, 4096)}


def product_launches() -> dict[str, Launch]:
    """What MiniCPM4-8B (GPTQ: 4 bits, group 128) and BitCPM4 launch to decode, verify 16 tokens and prefill 1024."""
    launches = {}
    for model, shapes in (("8b", _8B), ("0.5b", _05B)):
        for name, (n, k) in shapes.items():
            for bits, group in ((4, 128), (2, 0)):
                for tokens in (1, 16, 1024):
                    key = f"linear_{model}_{name}_w{bits}_{tokens}"
                    launches[key] = linear(LinearShape(tokens, n, k, bits, group, "half"))
    for model, k in (("8b", 4096), ("0.5b", 1024)):
        for bits, group in ((8, 0), (4, 128)):
            logits, argmax = head(LinearShape(1, 73448, k, bits, group, "half"))
            launches |= {f"head_{model}_w{bits}": logits, f"argmax_{model}_w{bits}": argmax}
    return launches
