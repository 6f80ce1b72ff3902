"""Bytes that attention's threads work in on the CPU (plugins/paged_attention/buffer.h counts what they really take)."""

from __future__ import annotations

from dataclasses import dataclass

from edge.config import ModelConfig
from edge.kv_cache import pages_for
from edge.memory.run import Run
from plugins import PAGE_TOKENS

TILE_ROWS = 512  # query rows of one task (plugins/paged_attention/cpu.h: kTileRows)
PART_BLOCKS = 16  # pages of one part of a single token's attention (kPartBlocks)
PART_CHOSEN = 256  # and of its choice of blocks (plugins/infllmv2/parts.h: kPartCoarse)
CHUNK_BLOCKS = 16  # scores of blocks come in so many (plugins/infllmv2/select.h: kChunkBlocks)
# Heads that are multiplied as packed elements where the processor can (library.cpp): a multiple of so many values as
# pairs of bfloat16, up to so many as fours of int8 (plugins/paged_attention/quad_tile.h).
_PAIR_DIM, _MOST_QUAD_DIM, _QUAD_ROWS = 32, 256, 16


def attention_bytes(config: ModelConfig, kv: str, run: Run) -> int:
    """Every thread keeps the largest tile it had; beside them is what a step of a prompt lists, or one of decoding.

    With pages on disk all tasks of a step are at work at once, and their queries and sums are kept beside the threads'.
    """
    group, heads, pages = config.group_size, config.num_key_value_heads, pages_for(run.context)
    tile_tokens = min(max(1, TILE_ROWS // group), run.tokens)
    tile = _tile(tile_tokens * group, config.head_dim, kv, run.packed)
    row = tile.state // (tile_tokens * group)
    is_stored = run.resident is not None
    thread = tile.scratch if is_stored else tile.scratch + tile.state
    scores = 4 * CHUNK_BLOCKS * -(-pages // CHUNK_BLOCKS)  # of a token's blocks
    if is_choosing := _is_choosing(config, run.context):  # by scores: a tile of its own
        compressed = _tile(tile_tokens * group, config.head_dim, "bfloat16" if kv == "int8" else kv, run.packed)
        # a key for each block, and the best of each eight
        thread += compressed.scratch + compressed.state + tile_tokens * (scores + 4) + 8 * pages + pages // 2
    tiles = heads * (run.sequences - 1 + -(-run.chunk // tile_tokens))
    prompt = 4 * tiles * pages + (run.tokens * heads * group * row if is_stored else 0)
    attended = _most_attended(config, pages) if is_choosing else pages
    parts = -(-attended // PART_BLOCKS)
    part = group * (row if is_stored else 4 * (config.head_dim + 2))
    decode = run.sequences * heads * (4 * attended + (parts * part if is_stored or parts > 1 else 0))
    if is_choosing:  # which comes before, and leaves nothing
        decode = max(decode, run.sequences * heads * (scores + -(-pages // PART_CHOSEN) * (4 + 8 * group)))
    choices = 0 if config.sparse is None else heads * 8 * -(-pages // 64)  # of a token: a bit for each block
    return run.threads * thread + max(prompt + run.tokens * choices, decode + run.sequences * choices)


@dataclass(frozen=True)
class _Tile:
    """state: a tile's queries and what was found for them; scratch: what it works in."""

    state: int
    scratch: int


def _tile(rows: int, dim: int, kv: str, packed: bool) -> _Tile:
    """plugins/paged_attention/tile.h: queries, keys, values and weights are elements, the rest float32."""
    sums = 4 * (dim + 2)
    if packed and kv == "int8" and dim <= _MOST_QUAD_DIM:
        return _Tile(rows * (2 * dim + 12 + sums), _QUAD_ROWS * 2 * (4 * max(dim, PAGE_TOKENS) + PAGE_TOKENS))
    element = 2 if packed and kv == "bfloat16" and dim % _PAIR_DIM == 0 else 4
    scratch = (element + 4) * rows * PAGE_TOKENS + 2 * element * PAGE_TOKENS * dim
    return _Tile(rows * (element * dim + sums), scratch)


def _is_choosing(config: ModelConfig, context: int) -> bool:
    sparse = config.sparse
    return sparse is not None and context >= sparse.dense_len and pages_for(context) > sparse.selected_blocks


def _most_attended(config: ModelConfig, pages: int) -> int:
    """Pages that a token attends to at most: the chosen ones, or all as long as its attention is dense."""
    assert config.sparse is not None
    return min(pages, max(config.sparse.selected_blocks, pages_for(max(config.sparse.dense_len, 1))))
