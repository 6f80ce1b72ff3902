"""Launches of dense, block-sparse and tree-masked attention over pages: append, attend_tiles, attend_split, combine;
and, after a tree was verified, keep.

Grids follow from the number of new tokens and sequences alone, so that a step can be captured once for all contexts.
Buffers have the operators' names (plugins/infllmv2/__init__.py) and those of `scratch`; a pool's pages are laid out as
append.cu says. The rotated queries are `q`, the result is `output`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edge.errors import UsageError
from plugins import PAGE_TOKENS
from plugins.launch import Argument, Kernel, Launch, divide_up

ROWS = 16  # of a tile
MAX_GROUP = ROWS
TREE_BLOCKS = 2  # that 64 slots may lie on

# Thread blocks: attend_tiles has few warps, whose tiles are neighbours; attend_split many, which meet in the end.
_TILE_WARPS, _SPLIT_WARPS, _APPEND_WARPS = 4, 8, 4
_PARTS = ("partial", "partial_softmax")
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class AttentionShape:
    """A step of T `tokens` of B `sequences` whose page tables are `table_width` pages wide.

    limit: the most blocks that a row may select (0: all rows are dense); element: 'half' or 'bf16'; kv_element:
    `element` or 'uint8_t'; window: dense rows see so many blocks, the last of which is their position's (0: all).
    Where the tokens are and what a row sees of a tree say slots, tree_start and tree_mask (plugins/infllmv2).
    """

    tokens: int
    sequences: int
    table_width: int
    heads: int
    kv_heads: int
    head_dim: int
    element: str = "half"
    kv_element: str = "half"
    limit: int = 0
    use_nope: bool = False
    window: int = 0

    def __post_init__(self) -> None:
        if self.head_dim not in (64, 128):
            raise UsageError(f"head_dim {self.head_dim} has no attention kernel: it must be 64 or 128")
        if self.heads % self.kv_heads or self.group > MAX_GROUP:
            raise UsageError(
                f"{self.heads} query heads on {self.kv_heads} KV heads have no attention kernel: "
                f"1 to {MAX_GROUP} query heads must share a KV head"
            )

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def columns(self) -> int:
        """Of `blocks` [T, Hkv, columns]: those that a row selects, and those of its tree."""
        return self.limit + TREE_BLOCKS if self.limit else 0

    @property
    def planes(self) -> int:
        """Planes of a page: keys, values, and keys before rotation."""
        return 3 if self.use_nope else 2

    @property
    def tile_tokens(self) -> int:
        """Tokens that share a tile: those of sparse rows have block lists of their own."""
        return 1 if self.limit else ROWS // self.group

    @property
    def tiles(self) -> int:
        """Enough for every way to divide the tokens among the sequences."""
        most = (self.tokens + self.sequences * (self.tile_tokens - 1)) // self.tile_tokens
        return min(self.tokens, most)

    @property
    def is_byte(self) -> bool:
        """Are keys and values quantised?"""
        return self.kv_element == "uint8_t"


def scratch(shape: AttentionShape, splits: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """What the launches pass on: q from append; partial and partial_softmax from attend_split to combine."""
    parts = (splits, shape.tiles, shape.kv_heads, ROWS)
    real = np.dtype(np.float32)
    return {
        "q": ((shape.tokens, shape.heads, shape.head_dim), np.dtype(np.uint16)),
        "partial": ((*parts, shape.head_dim), real),
        "partial_softmax": ((*parts, 2), real),
    }


def scratch_up_to(shape: AttentionShape, multiprocessors: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """`scratch` of `append` and `attend` that is enough for this shape and for all smaller ones."""
    pairs = min(shape.tiles * shape.kv_heads, _TILE_WARPS * multiprocessors)  # of tile and KV head; of split ones
    parts = min(pairs * _most_splits(shape), multiprocessors + pairs)  # as `choose_splits` rounds
    most = scratch(shape, 1)
    for name in _PARTS:
        row, dtype = most[name]
        most[name] = (parts, *row[3:]), dtype
    return most


def choose_splits(shape: AttentionShape, multiprocessors: int) -> int:
    """Thread blocks a tile of a decode step: about one for each multiprocessor, at most one for every 8 blocks of keys.

    More would read the queries and write partial results more often than they gain.
    """
    wanted = divide_up(multiprocessors, shape.tiles * shape.kv_heads)
    return max(1, min(wanted, _most_splits(shape)))


def _most_splits(shape: AttentionShape) -> int:
    # Not for the blocks of a tree: a decode step is divided as if there were none.
    return divide_up(min(shape.table_width, shape.limit or shape.window or shape.table_width), _SPLIT_WARPS)


def attend(shape: AttentionShape, scale: float, multiprocessors: int) -> list[Launch]:
    """q, kv_pool -> output: tiles are split only where whole ones would leave multiprocessors without work."""
    if divide_up(shape.tiles, _TILE_WARPS) * shape.kv_heads >= multiprocessors:
        return [attend_tiles(shape, scale)]
    splits = choose_splits(shape, multiprocessors)
    return [attend_split(shape, scale, splits), combine(shape, scale, splits)]


def append(shape: AttentionShape) -> Launch:
    """qkv, cos, sin -> q, and the step's keys and values into kv_pool (and kv_scales)."""
    arguments = (
        "qkv",
        "cos",
        "sin",
        "q",
        "kv_pool",
        "kv_scales" if shape.is_byte else None,
        "slots",
        "query_start",
        "page_table",
        np.int32(shape.tokens),
        np.int32(shape.sequences),
        np.int32(shape.table_width),
        np.int32(shape.heads),
        np.int32(shape.kv_heads),
        np.int32(shape.planes),
    )
    rows = shape.tokens * (shape.heads + 2 * shape.kv_heads)
    kernel = _kernel("append.cu", "append", shape, _APPEND_WARPS, "AppendArguments", 1)
    return Launch(kernel, (divide_up(rows, _APPEND_WARPS), 1, 1), arguments)


def keep(shape: AttentionShape) -> Launch:
    """Move what one sequence has at slots [T] to slots kept [T], in kv_pool (and kv_scales); page_table: its row."""
    arguments = (
        "kv_pool",
        "kv_scales" if shape.is_byte else None,
        "slots",
        "kept",
        "page_table",
        np.int32(shape.tokens),
        np.int32(shape.planes),
        np.int32(shape.kv_heads),
    )
    body = f"attention::keep<{shape.head_dim}, {'uint8_t' if shape.is_byte else 'uint16_t'}>"
    kernel = Kernel("paged_attention/keep.cu", body, "attention::KeepArguments", shape.head_dim)
    return Launch(kernel, (shape.planes, shape.kv_heads, 1), arguments)


def attend_tiles(shape: AttentionShape, scale: float) -> Launch:
    """q, kv_pool -> output, a warp for each tile: for many tokens. Sparse rows need blocks and block_counts."""
    min_blocks = 2 if shape.head_dim == 128 else 3
    kernel = _kernel("attend.cu", "attend_tiles", shape, _TILE_WARPS, "AttendArguments", min_blocks)
    grid = (divide_up(shape.tiles, _TILE_WARPS), shape.kv_heads, 1)
    return Launch(kernel, grid, _attend(shape, scale, 1, "output"))


def attend_split(shape: AttentionShape, scale: float, splits: int) -> Launch:
    """q, kv_pool -> partial, partial_softmax: a tile's blocks dealt to `splits` thread blocks; for decode steps."""
    kernel = _kernel("attend.cu", "attend_split", shape, _SPLIT_WARPS, "AttendArguments", 1)
    meeting = _SPLIT_WARPS * ROWS * ((shape.head_dim + 8) * 4 + 8)
    return Launch(kernel, (splits, shape.kv_heads, shape.tiles), _attend(shape, scale, splits, None, *_PARTS), meeting)


def combine(shape: AttentionShape, scale: float, splits: int) -> Launch:
    """partial, partial_softmax -> output."""
    body = f"attention::combine<{shape.element}, {shape.head_dim}>"
    kernel = Kernel("paged_attention/attend.cu", body, "attention::AttendArguments", shape.head_dim)
    return Launch(kernel, (shape.tiles, shape.kv_heads, 1), _attend(shape, scale, splits, "output", *_PARTS))


def _kernel(source: str, name: str, shape: AttentionShape, warps: int, arguments: str, min_blocks: int) -> Kernel:
    variant = ", true" if shape.window and name != "append" else ""
    body = f"attention::{name}<{shape.element}, {shape.head_dim}, {shape.kv_element}, {warps}{variant}>"
    return Kernel(f"paged_attention/{source}", body, f"attention::{arguments}", 32 * warps, min_blocks)


def _attend(
    shape: AttentionShape,
    scale: float,
    splits: int,
    output: str | None,
    partial: str | None = None,
    partial_softmax: str | None = None,
) -> tuple[Argument, ...]:
    return (
        "q",
        "kv_pool",
        "kv_scales" if shape.is_byte else None,
        "slots",
        "positions",
        "query_start",
        "page_table",
        "tree_start",
        "tree_mask",
        "blocks" if shape.limit else None,
        "block_counts" if shape.limit else None,
        output,
        partial,
        partial_softmax,
        np.int32(shape.tokens),
        np.int32(shape.sequences),
        np.int32(shape.table_width),
        np.int32(shape.heads),
        np.int32(shape.kv_heads),
        np.int32(shape.planes),
        np.int32(shape.columns),
        np.int32(shape.tile_tokens),
        np.int32(splits),
        np.int32(shape.window),
        np.float32(scale * _LOG2_E),
    )


def product_launches() -> dict[str, Launch]:
    """What MiniCPM4-8B and 0.5B launch: a prompt of 512 tokens, and a decode step with 96 blocks of 128K tokens; and
    the 8B's draft model, whose dense layer has a window."""
    launches: dict[str, Launch] = {}
    for model, heads, head_dim in (("8b", 32, 128), ("0.5b", 16, 64)):
        for element in ("half", "bf16"):
            for kv_element in (element, "uint8_t"):
                name = f"{model}_{element}_kv{'8' if kv_element == 'uint8_t' else '16'}"
                width = 131072 // PAGE_TOKENS
                prompt = AttentionShape(512, 1, width, heads, 2, head_dim, element, kv_element, limit=96)
                step = AttentionShape(1, 1, width, heads, 2, head_dim, element, kv_element, limit=96)
                splits = choose_splits(step, multiprocessors=16)
                scale = head_dim**-0.5
                launches |= {
                    f"append_{name}": append(step),
                    f"keep_{name}": keep(step),
                    f"attend_tiles_{name}": attend_tiles(prompt, scale),
                    f"attend_split_{name}": attend_split(step, scale, splits),
                    f"combine_{name}": combine(step, scale, splits),
                }
                if model == "8b" and not step.is_byte:  # its draft's layer, whose window is 1024 tokens
                    prompt, step = (replace(one, limit=0, window=1024 // PAGE_TOKENS) for one in (prompt, step))
                    launches |= {
                        f"attend_tiles_window_{name}": attend_tiles(prompt, scale),
                        f"attend_split_window_{name}": attend_split(step, scale, choose_splits(step, 16)),
                    }
    return launches
