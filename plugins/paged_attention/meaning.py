"""What `edge.PagedAttention` computes: one ragged step of causal attention over a paged KV pool, with token trees.

`edge.PagedAttentionInt8` has a pool of codes and kv_scales [pages, planes, Hkv, 64] float32: a value is code x scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from plugins import PAGE_TOKENS


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Half-rotation RoPE (spec: infllmv2.md 2). x [T, heads, d]; cos, sin [T, d/2] float32; float32 inside."""
    first, second = np.split(x.astype(np.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [..., d] -> codes int8 and scales [...] float32: x is about code x scale, its largest magnitude is code 127."""
    wide = x.astype(np.float32)
    most = np.abs(wide).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        steps = np.where(most > 0, np.float32(127) / most, np.float32(0)).astype(np.float32)
    codes = np.clip(np.rint(wide * steps), -127, 127).astype(np.int8)
    return codes, (most[..., 0] / np.float32(127)).astype(np.float32)


def append(
    pool: np.ndarray, planes: Sequence[np.ndarray], pages: np.ndarray, slots: np.ndarray, scales: np.ndarray | None
) -> None:
    """Write planes [T, Hkv, d] (keys, values, ...) in place: pool [pages, planes, Hkv, 64, d] and, of int8, `scales`.

    `pages` is one sequence's page list, `slots` [T] where in it the tokens go.
    """
    page, place = pages[slots // PAGE_TOKENS], slots % PAGE_TOKENS
    for plane, x in enumerate(planes):
        if scales is None:
            pool[page, plane, :, place] = x
        else:
            pool[page, plane, :, place], scales[page, plane, :, place] = quantise(x)


def keep_tokens(
    pool: np.ndarray, pages: np.ndarray, first: int, slots: np.ndarray, scales: np.ndarray | None = None
) -> None:
    """Move what one sequence has at slots[i] to slot first + i, in place: every plane, and an int8 pool's `scales`.

    `slots` ascend and slots[i] >= first + i: accepted tokens of a tree close up behind the tree's root.
    """
    pages, slots = np.asarray(pages), np.asarray(slots, np.int64)
    to = first + np.arange(len(slots))
    for held in (pool,) if scales is None else (pool, scales):
        moved = held[pages[slots // PAGE_TOKENS], :, :, slots % PAGE_TOKENS]  # a copy: slots overlap
        held[pages[to // PAGE_TOKENS], :, :, to % PAGE_TOKENS] = moved


def stored_values(pool: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """What the pool stands for: itself, or of int8 code x scale."""
    return pool if scales is None else pool.astype(np.float32) * scales[..., None]


def gather(pool: np.ndarray, pages: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `length` keys and values of one sequence, [length, Hkv, d] each."""
    used = pool[pages[: -(-length // PAGE_TOKENS)]]  # [P, 2, Hkv, 64, d]
    flat = used.transpose(1, 0, 3, 2, 4).reshape(2, -1, pool.shape[2], pool.shape[4])[:, :length]
    return flat[0], flat[1]


def visible_keys(slots: np.ndarray, tree_start: int, tree_mask: np.ndarray, length: int) -> np.ndarray:
    """Which of one sequence's first `length` slots each of its rows sees, [T, length] bool.

    slots [T] of the rows; tree_mask [T, 2] int32: bit i, of 64, says that the row sees slot tree_start + i.
    """
    bits = (tree_mask.astype(np.int64)[:, :, None] >> np.arange(32) & 1).reshape(len(slots), 64).astype(bool)
    key = np.arange(length)
    seen = np.broadcast_to(key < tree_start, (len(slots), length)).copy()
    of_tree = key[tree_start : tree_start + 64]
    seen[:, of_tree] = bits[:, of_tree - tree_start]
    return seen & (key <= slots[:, None])


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, scale: float) -> np.ndarray:
    """q [T, Hq, d]; k, v [n, Hkv, d]; visible [T, n] bool; head h reads KV head h // G. -> [T, Hq, d]."""
    group = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,nhd->htn", q.astype(np.float32), keys.astype(np.float32)) * np.float32(scale)
    scores[:, ~visible] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("htn,nhd->thd", weights, values).astype(q.dtype)


def paged_attention(
    qkv: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    pool: np.ndarray,
    positions: np.ndarray,
    slots: np.ndarray,
    query_start: np.ndarray,
    page_table: np.ndarray,
    tree_start: np.ndarray,
    tree_mask: np.ndarray,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int = 0,
    kv_scales: np.ndarray | None = None,
) -> np.ndarray:
    """One step; `pool` is updated in place, and so are the scales of an int8 one. Shapes: see the package's docstring.

    With a `window` a row sees no slot of blocks up to positions[t] // 64 - window. Returns [T, Hq d].
    """
    tokens, head_dim = qkv.shape[0], pool.shape[-1]
    heads = qkv.reshape(tokens, -1, head_dim)
    q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    out = np.empty_like(q)
    for b in range(len(query_start) - 1):
        rows = slice(query_start[b], query_start[b + 1])
        if rows.start == rows.stop:
            continue
        append(pool, (k[rows], v[rows]), page_table[b], slots[rows], kv_scales)
        length = int(slots[rows].max()) + 1
        keys, values = gather(stored_values(pool, kv_scales), page_table[b], length)
        visible = visible_keys(slots[rows], int(tree_start[b]), tree_mask[rows], length)
        if window:
            block, own = np.arange(length) // PAGE_TOKENS, positions[rows, None] // PAGE_TOKENS
            visible &= block > own - window
        out[rows] = attend(q[rows], keys.astype(q.dtype), values.astype(q.dtype), visible, scale)
    return out.reshape(tokens, -1)
