"""Bytes that attention's threads work in on the CPU (plugins/paged_attention/buffer.h counts what they really take)."""

from __future__ import annotations

from edge.config import ModelConfig
from edge.kv_cache import pages_for
from plugins import PAGE_TOKENS

TILE_ROWS = 512  # query rows of one task (plugins/paged_attention/cpu.h: kTileRows)
PART_BLOCKS = 16  # pages of one part of a single token's attention (kPartBlocks)
# Heads that are multiplied as packed elements where the processor can (library.cpp): a multiple of so many values as
# pairs of bfloat16, up to so many as fours of int8 (plugins/paged_attention/quad_tile.h).
_PAIR_DIM, _MOST_QUAD_DIM, _QUAD_ROWS = 32, 256, 16


def attention_bytes(
    config: ModelConfig, kv: str, *, tokens: int, sequences: int, threads: int, context: int, packed: bool
) -> int:
    """Every thread keeps the largest tile it had; beside them is what a step of `tokens` lists, or one of decoding.

    packed: whether the processor multiplies pairs of bfloat16 and fours of int8, for which less is kept.
    """
    group, pages = config.group_size, pages_for(context)
    tile_tokens = min(max(1, TILE_ROWS // group), max(1, tokens))
    thread = _tile(tile_tokens * group, config.head_dim, kv, packed)
    if is_choosing := _is_choosing(config, context):  # by scores: a tile of its own, a key for each block
        compressed = "bfloat16" if kv == "int8" else kv
        thread += _tile(tile_tokens * group, config.head_dim, compressed, packed) + 4 * tile_tokens * pages + 8 * pages
    tiles = config.num_key_value_heads * (sequences - 1 + -(-max(1, tokens - sequences + 1) // tile_tokens))
    prompt = tiles * 4 * pages + _choices(config, tokens, pages)
    attended = _most_attended(config, pages) if is_choosing else pages
    single = sequences * config.num_key_value_heads
    parts = -(-attended // PART_BLOCKS)
    decode = single * (4 * attended + (4 * parts * group * (config.head_dim + 2) if parts > 1 else 0))
    return threads * thread + max(prompt, decode + _choices(config, sequences, pages))


def _tile(rows: int, dim: int, kv: str, packed: bool) -> int:
    """One `Tile` (plugins/paged_attention/tile.h): queries, keys, values and weights are elements, the rest float32."""
    if packed and kv == "int8" and dim <= _MOST_QUAD_DIM:
        sums = _QUAD_ROWS * 2 * (4 * max(dim, PAGE_TOKENS) + PAGE_TOKENS)
        return rows * (2 * dim + 12) + sums + 4 * rows * (dim + 2)
    element = 2 if packed and kv == "bfloat16" and dim % _PAIR_DIM == 0 else 4
    elements = rows * dim + 2 * PAGE_TOKENS * dim + rows * PAGE_TOKENS
    return element * elements + 4 * rows * (PAGE_TOKENS + dim + 2)


def _choices(config: ModelConfig, tokens: int, pages: int) -> int:
    """A bit for each block, KV head and token, in words of 64."""
    return 0 if config.sparse is None else tokens * config.num_key_value_heads * 8 * -(-pages // 64)


def _is_choosing(config: ModelConfig, context: int) -> bool:
    sparse = config.sparse
    return sparse is not None and context >= sparse.dense_len and pages_for(context) > sparse.selected_blocks


def _most_attended(config: ModelConfig, pages: int) -> int:
    """Pages that a token attends to at most: the chosen ones, or all as long as its attention is dense."""
    assert config.sparse is not None
    return min(pages, max(config.sparse.selected_blocks, pages_for(max(config.sparse.dense_len, 1))))
