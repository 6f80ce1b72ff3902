"""What `edge.InfLLMv2Attention` computes: one ragged step of block-sparse attention (spec: infllmv2.md 3, 8).

Every query token attends, in each KV head, to the blocks of 64 tokens that the head's queries score highest on
averaged keys. Score, tie and causal rules are exact: no key after the query is averaged, scored or attended, and
equal scores go to the lower block. Short sequences attend to everything. Tokens of a tree see what
plugins/paged_attention says; their blocks are attended besides those chosen, and their keys are not averaged.
"""

from __future__ import annotations

import numpy as np

from plugins import PAGE_TOKENS
from plugins.infllmv2 import STRIDE, WINDOW
from plugins.paged_attention import meaning as paged
from plugins.paged_attention.meaning import append, attend, gather, rotate, stored_values, visible_keys

FINE, COARSE = (WINDOW, STRIDE), (4 * WINDOW, 4 * STRIDE)
LARGEST_EXPONENT = np.float32(80)  # exp(80) times any number of heads is finite
ROWS = 256  # query rows scored at once: bounds this file's memory, changes no result


def window_count(n: int, window: int, stride: int) -> int:
    """Full windows among n tokens (spec: infllmv2.md 3.2)."""
    return max(0, (n - window) // stride + 1)


def visible_windows(i: np.ndarray, window: int, stride: int) -> np.ndarray:
    """Windows that end at or before position i (spec: infllmv2.md 3.4)."""
    return np.maximum(0, (i + 1 - window) // stride + 1)


def compress(
    pool: np.ndarray, kv_pool: np.ndarray, pages: np.ndarray, slots: np.ndarray, window: int, stride: int
) -> None:
    """Write, in place, the average of every window that ends in `slots`.

    pool [pages, Hkv, 64 / stride, d]; kv_pool [pages, 2 or 3, Hkv, 64, d] gives the keys as it stores them: before
    rotation if it has a third plane. float32 sums, rounded once to the pool's type (spec: infllmv2.md 3.2).
    """
    plane = 2 if kv_pool.shape[1] == 3 else 0
    last = slots[(slots >= window - 1) & ((slots + 1) % stride == 0)]
    tokens = last[:, None] + np.arange(1 - window, 1)
    keys = kv_pool[pages[tokens // PAGE_TOKENS], plane, :, tokens % PAGE_TOKENS]  # [windows, window, Hkv, d]
    page, place = np.divmod(last // stride, PAGE_TOKENS // stride)
    pool[pages[page], :, place] = keys.mean(axis=1, dtype=np.float32)


def compress_all(
    c1_pool: np.ndarray, c2_pool: np.ndarray, kv_pool: np.ndarray, pages: np.ndarray, slots: np.ndarray
) -> None:
    """`compress` of both kinds of windows."""
    compress(c1_pool, kv_pool, pages, slots, *FINE)
    compress(c2_pool, kv_pool, pages, slots, *COARSE)


def keep_tokens(
    kv_pool: np.ndarray,
    c1_pool: np.ndarray,
    c2_pool: np.ndarray,
    pages: np.ndarray,
    first: int,
    slots: np.ndarray,
    kv_scales: np.ndarray | None = None,
) -> None:
    """`paged_attention.meaning.keep_tokens`, and the average of every window that ends with one of these tokens."""
    paged.keep_tokens(kv_pool, pages, first, slots, kv_scales)
    kept = first + np.arange(len(slots))
    compress_all(c1_pool, c2_pool, stored_values(kv_pool, kv_scales), np.asarray(pages), kept)


def stored_windows(pool: np.ndarray, pages: np.ndarray, count: int) -> np.ndarray:
    """Windows 0..count-1 of one sequence, [Hkv, count, d] float32: window j is slot j + 1 of the page list."""
    flat = pool[pages].swapaxes(0, 1).reshape(pool.shape[1], -1, pool.shape[3])
    return flat[:, 1 : count + 1].astype(np.float32)


def by_kv_head(q: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """q [T, Hq, d] -> [Hkv, G, T, d] float32."""
    tokens, _, head_dim = q.shape
    return q.reshape(tokens, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3).astype(np.float32)


def products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x [Hkv, G, T, m] times y [Hkv, m, n] -> [Hkv, G, T, n]: one large matrix product for each KV head."""
    return (x.reshape(x.shape[0], -1, x.shape[3]) @ y).reshape(*x.shape[:3], y.shape[2])


def window_scores(q: np.ndarray, c1: np.ndarray, c2: np.ndarray, last: np.ndarray, scale: float) -> np.ndarray:
    """S: every group's softmax over the fine keys, normalised over the coarse ones (spec: infllmv2.md 3.5).

    q [T, Hq, d]; c1 [Hkv, n1, d]; c2 [Hkv, n2, d]; last [T]: the last token whose windows a row sees. ->
    [Hkv, T, n1] float32, finite, 0 for windows that end after it and for rows that no coarse window precedes.
    """
    queries = by_kv_head(q, c1.shape[0])
    fine, coarse = (np.float32(scale) * products(queries, c.swapaxes(1, 2)) for c in (c1, c2))  # [Hkv, G, T, n]
    fine_visible = np.arange(c1.shape[1]) < visible_windows(last, *FINE)[:, None]
    coarse_visible = np.arange(c2.shape[1]) < visible_windows(last, *COARSE)[:, None]
    lowest = np.finfo(np.float32).min
    maximum = np.max(coarse, axis=-1, keepdims=True, where=coarse_visible, initial=lowest)
    weights = np.exp(coarse - maximum, where=coarse_visible, out=np.zeros_like(coarse))
    total = np.maximum(weights.sum(axis=-1, keepdims=True), 1)  # exp(0) is among them: a no-op unless there is none
    scores = (np.exp(np.minimum(fine - maximum, LARGEST_EXPONENT)) / total).sum(axis=1)
    counted = fine_visible & coarse_visible.any(axis=1, keepdims=True) & ~np.isnan(scores)
    return np.where(counted, scores, np.float32(0))


def block_scores(scores: np.ndarray, blocks: int) -> np.ndarray:
    """Block b's score is the best of the windows that touch it, S[4b-1 .. 4b+3] (spec: infllmv2.md 3.6).

    scores [Hkv, T, n1] -> [Hkv, T, blocks]. What is not there cannot win: scores are never negative.
    """
    per_block = PAGE_TOKENS // STRIDE
    padded = np.zeros((*scores.shape[:2], per_block * blocks + 1), np.float32)
    padded[..., 1 : scores.shape[2] + 1] = scores
    around = np.lib.stride_tricks.sliding_window_view(padded, per_block + 1, axis=-1)
    return around[..., ::per_block, :].max(axis=-1)


def select_blocks(scores: np.ndarray, positions: np.ndarray, init: int, local: int, selected: int) -> np.ndarray:
    """Which blocks a row attends to: forced ones, then by (score descending, block ascending) (spec: 3.6, 3.7, 3.9).

    scores [Hkv, T, blocks]; the first `init` blocks, the row's own and the `local` before it are forced; `selected`
    counts all. -> [Hkv, T, blocks] bool, never a block after the row's own.
    """
    block, own = np.arange(scores.shape[-1]), positions[:, None] // PAGE_TOKENS
    forced = (block < init) | (block >= own - local)
    priority = np.where(block > own, -np.inf, np.where(forced, np.inf, scores))
    best = np.argsort(-priority, axis=-1, kind="stable")[..., :selected]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, best, True, axis=-1)
    return chosen & (block <= own)


def tree_blocks(slots: np.ndarray, tree_start: int, blocks: int) -> np.ndarray:
    """Which blocks a row attends to whether chosen or not, [T, blocks]: a tree's, up to the row's own slot."""
    block, slot = np.arange(blocks), slots[:, None]
    return (slot >= tree_start) & (block >= tree_start // PAGE_TOKENS) & (block <= slot // PAGE_TOKENS)


def masked_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, scale: float) -> np.ndarray:
    """q [T, Hq, d]; k, v [n, Hkv, d]; visible [Hkv, T, n], shared by the heads of a group. -> [T, Hq, d]."""
    keys, values = k.transpose(1, 2, 0).astype(np.float32), v.swapaxes(0, 1).astype(np.float32)
    scores = np.float32(scale) * products(by_kv_head(q, k.shape[1]), keys)
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return products(weights, values).transpose(2, 0, 1, 3).reshape(q.shape).astype(q.dtype)


def infllmv2_attention(
    qkv: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    kv_pool: np.ndarray,
    c1_pool: np.ndarray,
    c2_pool: np.ndarray,
    positions: np.ndarray,
    slots: np.ndarray,
    query_start: np.ndarray,
    page_table: np.ndarray,
    tree_start: np.ndarray,
    tree_mask: np.ndarray,
    switch_length: np.ndarray,
    sparse_settings: np.ndarray,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    use_nope: bool,
    kv_scales: np.ndarray | None = None,
) -> np.ndarray:
    """One step; the pools, and an int8 one's scales, are updated in place. Shapes: see the package's docstring.

    Returns [T, Hq d]. Compressed keys are kept up in every step. Sequence b is sparse if dense_len is negative or
    switch_length[b] has reached it. With `use_nope` blocks are chosen by queries and keys before rotation; attention
    always rotates.
    """
    tokens, head_dim = qkv.shape[0], kv_pool.shape[-1]
    q_plain, k_plain, v = np.split(qkv.reshape(tokens, -1, head_dim), [num_heads, num_heads + num_kv_heads], axis=1)
    q, k = rotate(q_plain, cos, sin), rotate(k_plain, cos, sin)
    q_scored = q_plain if use_nope else q
    dense_len, init, local, selected = (int(setting) for setting in sparse_settings)
    out = np.empty_like(q)
    for b, pages in enumerate(page_table):
        new = np.arange(query_start[b], query_start[b + 1])
        if not len(new):
            continue
        planes = (k[new], v[new], k_plain[new])[: 3 if use_nope else 2]
        append(kv_pool, planes, pages, slots[new], kv_scales)
        stored, start = stored_values(kv_pool, kv_scales), int(tree_start[b])
        compress_all(c1_pool, c2_pool, stored, pages, slots[new][slots[new] < start])

        length = int(slots[new].max()) + 1
        keys, values = (kept.astype(q.dtype) for kept in gather(stored[:, :2], pages, length))
        c1 = stored_windows(c1_pool, pages, window_count(length, *FINE))
        c2 = stored_windows(c2_pool, pages, window_count(length, *COARSE))
        blocks = -(-length // PAGE_TOKENS)
        for rows in np.array_split(new, -(-len(new) // ROWS)):
            visible = visible_keys(slots[rows], start, tree_mask[rows], length)
            if switch_length[b] < dense_len:
                out[rows] = attend(q[rows], keys, values, visible, scale)
                continue
            last = np.minimum(positions[rows], start - 1)
            scores = block_scores(window_scores(q_scored[rows], c1, c2, last, scale), blocks)
            chosen = select_blocks(scores, positions[rows], init, local, selected)
            chosen |= tree_blocks(slots[rows], start, blocks)
            attended = chosen.repeat(PAGE_TOKENS, axis=-1)[..., :length] & visible
            out[rows] = masked_attention(q[rows], keys, values, attended, scale)
    return out.reshape(tokens, -1)
