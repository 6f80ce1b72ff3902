"""Vectors of the kernels that keep compressed keys, score blocks and choose them.

Each is judged on inputs of its own, none by what an earlier one left: a block more or less is never a matter of the
last bits of a score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from plugins import PAGE_TOKENS
from plugins.infllmv2 import STRIDE, meaning
from plugins.infllmv2.launch import compress, score_coarse, score_fine, scratch, select
from plugins.paged_attention.launch import AttentionShape
from plugins.paged_attention.pages import Trees, from_device, make_step
from plugins.paged_attention.vectors import Sequences, kv_row_bytes, shape_of, vector_name
from plugins.vectors import ELEMENTS, Buffers, Expected, Vector, eighths, normal, poisoned

_WINDOWS = {"c1_pool": meaning.FINE, "c2_pool": meaning.COARSE}
_SLOTS = PAGE_TOKENS // STRIDE  # fine windows of a block


def compress_vector(sequences: Sequences, shape: AttentionShape, trees: Trees = ()) -> Vector:
    """The windows that end with the step's tokens, but for those of trees; others untouched.

    Keys are multiples of 1/8, or bytes whose scales are powers of two: sums are exact, averages are rounded once.
    """
    shape, dtype = shape_of(sequences, shape), ELEMENTS[shape.element]

    def inputs(rng: np.random.Generator) -> Buffers:
        step = make_step(rng, sequences, trees=trees)
        form = (step.pages, shape.planes, shape.kv_heads, PAGE_TOKENS)
        if shape.is_byte:
            pool = {"kv_pool": rng.integers(1, 256, (*form, shape.head_dim), dtype=np.uint8)}
            pool["kv_scales"] = np.exp2(rng.integers(-6, -3, form)).astype(np.float32)
        else:
            pool = {"kv_pool": eighths(rng, (*form, shape.head_dim), 31, dtype)}
        windows = {
            name: poisoned((step.pages, shape.kv_heads, PAGE_TOKENS // stride, shape.head_dim), dtype)
            for name, (_, stride) in _WINDOWS.items()
        }
        return {**step.buffers, **pool, **windows}

    def expect(before: Buffers) -> dict[str, Expected]:
        keys, expected = from_device(before), {name: before[name].copy() for name in _WINDOWS}
        for b, pages in enumerate(before["page_table"]):
            slots = before["slots"][before["query_start"][b] : before["query_start"][b + 1]]
            for name, sizes in _WINDOWS.items():
                meaning.compress(expected[name], keys, pages, slots[slots < before["tree_start"][b]], *sizes)
        return {name: Expected(values) for name, values in expected.items()}

    ends = [np.arange(past, past + new) for past, new in sequences]
    windows = [(p, size) for p in np.concatenate(ends) for size, stride in _WINDOWS.values() if _ends(p, size, stride)]
    read = sum(size for _, size in windows) * kv_row_bytes(shape)
    return Vector(
        vector_name(f"compress {shape.tokens}", trees),
        (compress(shape),),
        inputs,
        {},
        expect,
        moved=shape.kv_heads * (read + len(windows) * shape.head_dim * 2),
    )


def _ends(position: int, window: int, stride: int) -> bool:
    return position + 1 >= window and (position + 1) % stride == 0


def score_vector(tokens: int, blocks: int, selected: int, shape: AttentionShape, tree: Sequence[int] = ()) -> Vector:
    """block_scores of the last `tokens` (at most 64) of a sequence of `blocks` (a multiple of 8) full blocks.

    A `tree` of fewer than 64 tokens may end the sequence. Products and sums of float32 in another order, and
    exponentials of the hardware, which are good to 2^-22.
    """
    shape, dtype = shape_of([(PAGE_TOKENS * blocks - tokens, tokens)], shape), ELEMENTS[shape.element]
    scale = shape.head_dim**-0.5
    q_name, q_heads = ("qkv", shape.heads + 2 * shape.kv_heads) if shape.use_nope else ("q", shape.heads)

    def inputs(rng: np.random.Generator) -> Buffers:
        step = make_step(rng, [(PAGE_TOKENS * blocks - tokens, tokens)], trees=[tree])
        windows = {
            name: normal(rng, (step.pages, shape.kv_heads, PAGE_TOKENS // stride, shape.head_dim), dtype)
            for name, (_, stride) in _WINDOWS.items()
        }
        return {
            q_name: normal(rng, (tokens, q_heads, shape.head_dim), dtype, 1.5),
            **step.buffers,
            **windows,
            "switch_length": np.array([PAGE_TOKENS * blocks], np.int32),
            "sparse_settings": np.array([-1, 1, 0, selected], np.int32),
        }

    def expect(before: Buffers) -> dict[str, Expected]:
        pages, length = before["page_table"][0][:blocks], PAGE_TOKENS * blocks
        c1, c2 = (
            meaning.stored_windows(before[name], pages, meaning.window_count(length, *sizes))
            for name, sizes in _WINDOWS.items()
        )
        last = np.minimum(before["positions"], before["tree_start"][0] - 1)
        scores = meaning.window_scores(before[q_name][:, : shape.heads], c1, c2, last, scale)
        by_block = np.pad(scores, ((0, 0), (0, 0), (1, 0))).reshape(*scores.shape[:2], blocks, _SLOTS)
        pairs = np.stack([by_block.max(axis=-1), by_block[..., 0]], axis=-1).swapaxes(0, 1)
        block_scores = poisoned(scratch(shape)["block_scores"][0], np.dtype(np.float32))
        block_scores[:, :, :blocks] = pairs
        return {"block_scores": Expected(block_scores, absolute=1e-30, relative=1e-4)}

    return Vector(
        vector_name(f"score {tokens} at {PAGE_TOKENS * blocks}", tree),
        (score_coarse(shape, scale), score_fine(shape, scale)),
        inputs,
        {name: form for name, form in scratch(shape).items() if name in ("softmax", "block_scores")},
        expect,
        moved=shape.kv_heads * blocks * ((_SLOTS + 1) * shape.head_dim * 2 + tokens * 8)
        + tokens * shape.heads * shape.head_dim * 2,
    )


def select_vector(
    tokens: int, blocks: int, settings: tuple[int, int, int], shape: AttentionShape, tree: Sequence[int] = ()
) -> Vector:
    """blocks and block_counts of rows in a context of `blocks`, with many equal scores. Comparisons alone: exact.

    settings: init, local, selected. With several tokens a first sequence of one is dense, and chooses none; a `tree`
    ends the second one, whose tokens then lie on two pages.
    """
    sequences = [(PAGE_TOKENS * blocks - tokens, tokens)]
    if tokens > 1:
        end = PAGE_TOKENS * blocks - (PAGE_TOKENS - tokens // 2 if tree else 1)
        sequences = [(PAGE_TOKENS * blocks - 1, 1), (end - tokens + 1, tokens - 1)]
    trees = [()] * (len(sequences) - 1) + [tree]
    shape = shape_of(sequences, shape)
    width = scratch(shape)["block_scores"][0][2]

    def inputs(rng: np.random.Generator) -> Buffers:
        step = make_step(rng, sequences, trees=trees)
        scores = np.round(rng.exponential(size=(tokens, shape.kv_heads, width, 2)) * 20) / 64
        for row in np.flatnonzero(step.slots >= step.tree_start[-1]) if tree else ():
            scores[row, :, (step.tree_start[-1] - 1) // PAGE_TOKENS + 1 :] = np.nan  # of a tree's row, never written
        return {
            "block_scores": scores.astype(np.float32),
            **step.buffers,
            "switch_length": np.array([1] * (len(sequences) - 1) + [2], np.int32),
            "sparse_settings": np.array([2, *settings], np.int32),
        }

    def expect(before: Buffers) -> dict[str, Expected]:
        own, first = np.moveaxis(before["block_scores"], -1, 0)
        pooled = np.fmax(own, np.pad(first[..., 1:], ((0, 0), (0, 0), (0, 1))))[..., :blocks]
        chosen = meaning.select_blocks(pooled.swapaxes(0, 1), before["positions"], *settings)
        chosen |= meaning.tree_blocks(before["slots"], int(before["tree_start"][-1]), blocks)
        chosen[:, : before["query_start"][len(sequences) - 1]] = False
        listed = np.full(scratch(shape)["blocks"][0], -1, np.int32)
        for head, row in np.ndindex(chosen.shape[:2]):
            found = np.flatnonzero(chosen[head, row])
            listed[row, head, : len(found)] = found
        return {"blocks": Expected(listed), "block_counts": Expected(chosen.sum(axis=-1).T)}

    return Vector(
        vector_name(f"select {tokens} of {blocks} blocks", tree),
        (select(shape),),
        inputs,
        {name: form for name, form in scratch(shape).items() if name in ("blocks", "block_counts")},
        expect,
        moved=tokens * shape.kv_heads * (blocks * 8 + shape.limit * 4),
    )
