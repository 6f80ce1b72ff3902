"""KV pools in the GPU kernels' order (append.cu), from and to the natural one, and steps on pages dealt at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plugins import PAGE_TOKENS
from plugins.paged_attention import NO_TREE
from plugins.paged_attention.meaning import quantise

NO_PAGE = 2**30  # ends a row of the page table; must never be read

# Of each sequence: the parents of its last tokens, which are a tree. An earlier one of them, or -1, the tree's root.
Trees = Sequence[Sequence[int]]

UNWRITTEN = 127  # the code of no value: its byte is 0xFF


def quantise_pool(pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """pool [pages, planes, Hkv, 64, d] -> codes and scales [pages, planes, Hkv, 64]; a NaN's stay NaN."""
    with np.errstate(invalid="ignore"):
        codes, scales = quantise(pool)
    unwritten = np.isnan(pool.astype(np.float32)).any(axis=-1)
    codes[unwritten], scales[unwritten] = UNWRITTEN, np.nan
    return codes, scales


def device_order(pool: np.ndarray) -> np.ndarray:
    """kv_pool as the kernels keep it: values transposed, and codes as bytes that are 128 more."""
    values = pool.view(np.uint8) ^ np.uint8(0x80) if pool.dtype == np.int8 else pool.copy()
    values[:, 1] = values[:, 1].swapaxes(-1, -2).copy().reshape(values[:, 1].shape)
    return values


def to_device(pool: np.ndarray, kv_element: str) -> dict[str, np.ndarray]:
    """pool [pages, planes, Hkv, 64, d] -> kv_pool and, of bytes, kv_scales. NaN of the pool stays unwritten."""
    if kv_element != "uint8_t":
        return {"kv_pool": device_order(pool)}
    codes, scales = quantise_pool(pool)
    return {"kv_pool": device_order(codes), "kv_scales": scales}


def from_device(buffers: dict[str, np.ndarray]) -> np.ndarray:
    """The pool [pages, planes, Hkv, 64, d] as float32, unwritten slots as they are."""
    pool = buffers["kv_pool"].astype(np.float32)
    shape = pool[:, 1].shape
    pool[:, 1] = pool[:, 1].reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-1, -2)
    if "kv_scales" in buffers:
        pool = (pool - 128) * buffers["kv_scales"][..., None]
    return pool


@dataclass(frozen=True)
class Step:
    """New tokens of sequences that have a past, with pages dealt at random. Arrays are as the operators have them."""

    positions: np.ndarray
    slots: np.ndarray
    query_start: np.ndarray
    page_table: np.ndarray
    tree_start: np.ndarray
    tree_mask: np.ndarray
    pages: int

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(self.page_table)

    @property
    def buffers(self) -> dict[str, np.ndarray]:
        """What the kernels read of it."""
        names = ("positions", "slots", "query_start", "page_table", "tree_start", "tree_mask")
        return {name: getattr(self, name) for name in names}

    def rows(self, b: int) -> range:
        """Tokens of sequence b."""
        return range(self.query_start[b], self.query_start[b + 1])


def make_step(
    rng: np.random.Generator, sequences: Sequence[tuple[int, int]], spare_columns: int = 1, trees: Trees = ()
) -> Step:
    """sequences: (tokens in the cache, new tokens) of each. One page more than needed is never used."""
    lengths = [past + new for past, new in sequences]
    width = max(-(-n // PAGE_TOKENS) for n in lengths) + spare_columns
    needed = sum(-(-n // PAGE_TOKENS) for n in lengths)
    order = iter(rng.permutation(needed + 1))
    table = np.full((len(sequences), width), NO_PAGE, np.int32)
    for b, n in enumerate(lengths):
        for column in range(-(-n // PAGE_TOKENS)):
            table[b, column] = next(order)
    slots = np.concatenate([np.arange(past, past + new) for past, new in sequences]).astype(np.int32)
    query_start = np.cumsum([0, *(new for _, new in sequences)]).astype(np.int32)
    positions, mask = slots.copy(), np.zeros(len(slots), np.uint64)
    tree_start = np.full(len(sequences), NO_TREE, np.int32)
    for b, parents in enumerate(trees):
        if parents:
            tree_start[b] = start = lengths[b] - len(parents)
            rows = query_start[b] + np.flatnonzero(slots[query_start[b] : query_start[b + 1]] >= start)
            depths, paths = (np.array(values)[slots[rows] - start] for values in _tree_paths(parents))
            positions[rows], mask[rows] = start - 1 + depths, paths
    words = mask.view(np.int32).reshape(-1, 2)
    return Step(positions, slots, query_start, table, tree_start, words, needed + 1)


def _tree_paths(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Depths of a tree's tokens, from 1, and the bits of those that lead to each."""
    depths: list[int] = []
    paths: list[int] = []
    for i, parent in enumerate(parents):
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
        paths.append(1 << i | (paths[parent] if parent >= 0 else 0))
    return depths, paths
