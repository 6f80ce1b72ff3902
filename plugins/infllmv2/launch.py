"""Launches that keep the compressed keys, score blocks and choose them: compress, score_coarse, score_fine, select.

Grids follow from the number of new tokens and the width of the page table alone, so that a step can be captured once
for all contexts. Buffers have the operator's names (plugins/infllmv2/__init__.py) and those of `scratch`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge.errors import UsageError
from plugins import PAGE_TOKENS
from plugins.launch import Kernel, Launch, divide_up
from plugins.paged_attention.launch import MAX_GROUP, AttentionShape

MOST_SINGLE_TOKENS = 32  # of a step whose tokens get thread blocks of their own
_SETTINGS = ("switch_length", "sparse_settings")

# As in compress.cu, score.cu and select.cu.
_COMPRESS_THREADS = 128
_CHUNK_PAGES, _UNIT_PAGES = 128, 8
_COARSE_WARPS, _FINE_WARPS, _PAIR_WARPS = 12, 4, 4
_SELECT_THREADS, _SELECT_SHARED = 256, 1096


def scratch(shape: AttentionShape) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """What the launches pass on: softmax and block_scores from kernel to kernel, blocks and block_counts to attention.

    blocks [T, Hkv, columns] are ascending and end in -1, block_counts [T, Hkv] of them are attended to; 0 of dense
    sequences.
    """
    rows, real, integer = (shape.tokens, shape.kv_heads), np.dtype(np.float32), np.dtype(np.int32)
    return {
        "softmax": ((*rows, MAX_GROUP, 2), real),
        "block_scores": ((*rows, _score_width(shape), 2), real),
        "blocks": ((*rows, shape.columns), integer),
        "block_counts": (rows, integer),
    }


def compress(shape: AttentionShape, key_table: str = "page_table") -> Launch:
    """kv_pool [pages, 2 or 3, Hkv, 64 d] -> the windows of c1_pool and c2_pool that end with the step's tokens.

    key_table: the page table of kv_pool, where it is not that of the compressed keys.
    """
    # Few tokens end a window: a decode step looks at all of them at once, a long one at a fine window's stride.
    per_block = 1 if _by_token(shape) else 16
    arguments = (
        "kv_pool",
        "kv_scales" if shape.is_byte else None,
        "c1_pool",
        "c2_pool",
        "slots",
        "query_start",
        "page_table",
        key_table,
        "tree_start",
        np.int32(shape.tokens),
        np.int32(shape.sequences),
        np.int32(shape.table_width),
        np.int32(shape.kv_heads),
        np.int32(shape.planes),
        np.int32(2 if shape.use_nope else 0),
        np.int32(per_block),
    )
    body = f"infllmv2::compress<{shape.element}, {shape.kv_element}, {shape.head_dim}>"
    kernel = Kernel("infllmv2/compress.cu", body, "infllmv2::CompressArguments", _COMPRESS_THREADS)
    grid = (divide_up(shape.tokens, per_block), shape.kv_heads, 2)
    return Launch(kernel, grid, arguments, _COMPRESS_THREADS * (16 if shape.is_byte else 8) * 4)


def score_coarse(shape: AttentionShape, scale: float) -> Launch:
    """q or, with use_nope, qkv; c2_pool -> softmax, for rows with more blocks than they may attend to."""
    kernel = _score_kernel(shape, "score_coarse", _COARSE_WARPS, pair_blocks=1)
    return _score(shape, scale, kernel, 1, _COARSE_WARPS * MAX_GROUP * 8)


def score_fine(shape: AttentionShape, scale: float) -> Launch:
    """q or qkv, c1_pool, softmax -> block_scores, for rows with more blocks than they may attend to."""
    # Three blocks of pairs keep tensor cores busy while one waits for its windows.
    kernel = _score_kernel(shape, "score_fine", _FINE_WARPS, pair_blocks=3)
    return _score(shape, scale, kernel, divide_up(shape.table_width, _CHUNK_PAGES), 0)


def _by_token(shape: AttentionShape) -> bool:
    """Does every token get thread blocks of its own?"""
    return shape.tokens <= MOST_SINGLE_TOKENS


def _score_width(shape: AttentionShape) -> int:
    """Blocks of a row of block_scores: whole units of windows."""
    return divide_up(shape.table_width, _UNIT_PAGES) * _UNIT_PAGES


def _score_kernel(shape: AttentionShape, name: str, warps: int, pair_blocks: int) -> Kernel:
    """Of `warps` warps a token, or of pairs of tokens: then an SM must hold `pair_blocks` blocks."""
    types = f"{shape.element}, {shape.head_dim}, {8 if shape.group <= 8 else 16}"
    source, arguments = "infllmv2/score.cu", "infllmv2::ScoreArguments"
    if _by_token(shape):
        return Kernel(source, f"infllmv2::{name}_of_token<{types}>", arguments, 32 * warps)
    return Kernel(source, f"infllmv2::{name}<{types}, {_PAIR_WARPS}>", arguments, 32 * _PAIR_WARPS, pair_blocks)


def _score(shape: AttentionShape, scale: float, kernel: Kernel, chunks: int, merging_bytes: int) -> Launch:
    q_heads = shape.heads + 2 * shape.kv_heads if shape.use_nope else shape.heads
    arguments = (
        "qkv" if shape.use_nope else "q",
        "c1_pool",
        "c2_pool",
        "positions",
        "query_start",
        "page_table",
        "tree_start",
        *_SETTINGS,
        "softmax",
        "block_scores",
        np.int32(shape.tokens),
        np.int32(shape.sequences),
        np.int32(shape.table_width),
        np.int32(shape.kv_heads),
        np.int32(shape.group),
        np.int32(q_heads * shape.head_dim),
        np.int32(_score_width(shape)),
        np.float32(scale * np.log2(np.e)),
    )
    if _by_token(shape):
        queries_bytes = shape.group * (shape.head_dim + 32) * 2
        return Launch(kernel, (chunks, shape.kv_heads, shape.tokens), arguments, merging_bytes + queries_bytes)
    pairs = (shape.tokens + shape.sequences) // 2  # a sequence's last token may be alone
    return Launch(kernel, (chunks, shape.kv_heads, divide_up(pairs, _PAIR_WARPS)), arguments)


def select(shape: AttentionShape) -> Launch:
    """block_scores -> blocks, block_counts: as many as sparse_settings asks for, at most shape.limit, and a tree's."""
    if shape.limit < 1:
        raise UsageError(f"limit {shape.limit} leaves no block to attend to: give the most that a row may select")
    arguments = (
        "block_scores",
        "positions",
        "slots",
        "query_start",
        *_SETTINGS,
        "tree_start",
        "blocks",
        "block_counts",
        np.int32(shape.sequences),
        np.int32(shape.kv_heads),
        np.int32(_score_width(shape)),
        np.int32(shape.limit),
        np.int32(shape.columns),
    )
    kernel = Kernel("infllmv2/select.cu", "infllmv2::select", "infllmv2::SelectArguments", _SELECT_THREADS, 5)
    grid = (shape.tokens, shape.kv_heads, 1)
    return Launch(kernel, grid, arguments, _SELECT_SHARED + 4 * _score_width(shape))


def product_launches() -> dict[str, Launch]:
    """What MiniCPM4-8B and 0.5B launch at 131072 tokens of context, to decode one and to prefill 2048."""
    pages = 131072 // PAGE_TOKENS
    launches: dict[str, Launch] = {}
    for model, heads, dim in (("8b", 32, 128), ("0.5b", 16, 64)):
        decode = AttentionShape(1, 1, pages, heads, 2, dim, "bf16", "bf16", limit=96)
        prefill, scale = replace(decode, tokens=2048), dim**-0.5
        launches |= {
            f"compress_{model}": compress(decode),
            f"compress_int8_{model}": compress(replace(decode, kv_element="uint8_t")),
            f"score_coarse_{model}": score_coarse(decode, scale),
            f"score_fine_{model}": score_fine(decode, scale),
            f"score_coarse_prefill_{model}": score_coarse(prefill, scale),
            f"score_fine_prefill_{model}": score_fine(prefill, scale),
            f"select_{model}": select(decode),
        }
    return launches
