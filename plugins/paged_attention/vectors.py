"""Vectors of attention over pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from plugins import PAGE_TOKENS
from plugins.infllmv2.launch import scratch as selection_scratch
from plugins.infllmv2.meaning import masked_attention, tree_blocks
from plugins.launch import Launch
from plugins.paged_attention import meaning
from plugins.paged_attention.launch import AttentionShape, append, attend_split, attend_tiles, combine, keep, scratch
from plugins.paged_attention.pages import NO_PAGE, Step, Trees, device_order, from_device, make_step, to_device
from plugins.vectors import ELEMENTS, Buffers, Expected, Form, Vector, eighths, normal

Sequences = Sequence[tuple[int, int]]  # (tokens in the cache, new tokens) of each

# A kernel rounds probabilities to the element type before it multiplies them with values, and the result once more: by
# 2^-11 in half, 2^-8 in bf16. The first errors average out as the values do, so both are measured by the row's largest
# result; eight times as much is allowed.
_TOLERANCE = {"half": 2.0**-8, "bf16": 2.0**-5}


def shape_of(sequences: Sequences, shape: AttentionShape) -> AttentionShape:
    """`shape` with the tokens, sequences and page table of a step that `make_step` makes."""
    width = max(-(-(past + new) // PAGE_TOKENS) for past, new in sequences) + 1
    return replace(shape, tokens=sum(new for _, new in sequences), sequences=len(sequences), table_width=width)


def kv_row_bytes(shape: AttentionShape) -> int:
    """Bytes of one token's key, or value, of one head."""
    return shape.head_dim + 4 if shape.is_byte else 2 * shape.head_dim


def vector_name(name: str, trees: Sequence[object]) -> str:
    """`name`, and that there are trees."""
    return f"{name}, tree" if trees else name


def append_vector(sequences: Sequences, shape: AttentionShape, trees: Trees = ()) -> Vector:
    """Rotated queries, and keys and values in their pages; other slots untouched.

    Elements, cos and sin are multiples of 1/8: what rotates is rounded once, and bytes are made by one division and one
    product. Exact.
    """
    shape, dtype = shape_of(sequences, shape), ELEMENTS[shape.element]
    rows = shape.heads + 2 * shape.kv_heads

    def inputs(rng: np.random.Generator) -> Buffers:
        step = make_step(rng, sequences, trees=trees)
        pool = np.full((step.pages, shape.planes, shape.kv_heads, PAGE_TOKENS, shape.head_dim), np.nan, dtype)
        angles = (shape.tokens, shape.head_dim // 2)
        return {
            "qkv": eighths(rng, (shape.tokens, rows, shape.head_dim), 31, dtype),
            "cos": eighths(rng, angles, 8, np.dtype(np.float32)),
            "sin": eighths(rng, angles, 8, np.dtype(np.float32)),
            **step.buffers,
            **to_device(pool, shape.kv_element),
        }

    def expect(before: Buffers) -> dict[str, Expected]:
        q, k, v = np.split(before["qkv"], [shape.heads, shape.heads + shape.kv_heads], axis=1)
        q, rotated = (meaning.rotate(x, before["cos"], before["sin"]) for x in (q, k))
        pool = np.full((*before["kv_pool"].shape[:2], shape.kv_heads, PAGE_TOKENS, shape.head_dim), np.nan, dtype)
        for b, pages in enumerate(before["page_table"]):
            new = slice(before["query_start"][b], before["query_start"][b + 1])
            planes = [x[new] for x in (rotated, v, k)[: shape.planes]]
            meaning.append(pool, planes, pages, before["slots"][new], None)
        held = {name: Expected(values) for name, values in to_device(pool, shape.kv_element).items()}
        return {"q": Expected(q), **held}

    written = shape.tokens * shape.kv_heads * shape.planes * kv_row_bytes(shape)
    return Vector(
        vector_name(f"append {shape.tokens}", trees),
        (append(shape),),
        inputs,
        {"q": ((shape.tokens, shape.heads, shape.head_dim), dtype)},
        expect,
        moved=shape.tokens * (rows + shape.heads) * shape.head_dim * 2 + shape.tokens * shape.head_dim * 4 + written,
    )


def keep_vector(first: int, slots: Sequence[int], shape: AttentionShape) -> Vector:
    """What one sequence has at `slots` moves to slot `first` and those after it. Exact."""
    width = slots[-1] // PAGE_TOKENS + 1
    shape, dtype = replace(shape, tokens=len(slots), sequences=1, table_width=width), ELEMENTS[shape.element]

    def inputs(rng: np.random.Generator) -> Buffers:
        pool = normal(rng, (width, shape.planes, shape.kv_heads, PAGE_TOKENS, shape.head_dim), dtype)
        return {
            **to_device(pool, shape.kv_element),
            "slots": np.array(slots, np.int32),
            "kept": np.arange(first, first + len(slots), dtype=np.int32),
            "page_table": rng.permutation(width).astype(np.int32)[None],
        }

    def expect(before: Buffers) -> dict[str, Expected]:
        pool, scales = before["kv_pool"].copy(), before.get("kv_scales")
        values = before["kv_pool"][:, 1]
        transposed = values.reshape(*values.shape[:2], shape.head_dim, PAGE_TOKENS).swapaxes(-1, -2)
        pool[:, 1] = transposed
        held = {} if scales is None else {"kv_scales": scales.copy()}
        meaning.keep_tokens(pool, before["page_table"][0], first, np.array(slots), held.get("kv_scales"))
        return {name: Expected(array) for name, array in ({"kv_pool": device_order(pool)} | held).items()}

    moved = 2 * len(slots) * shape.planes * shape.kv_heads * kv_row_bytes(shape)
    return Vector(f"keep {len(slots)}", (keep(shape),), inputs, {}, expect, moved=moved)


def tiles_vector(sequences: Sequences, shape: AttentionShape, trees: Trees = ()) -> Vector:
    """Attention by whole tiles."""
    shape = shape_of(sequences, shape)
    return _attend_vector("attend_tiles", sequences, trees, shape, [attend_tiles(shape, _scale(shape))], {})


def split_vector(sequences: Sequences, shape: AttentionShape, splits: int, trees: Trees = ()) -> Vector:
    """Attention by split tiles, and what puts their parts together."""
    shape = shape_of(sequences, shape)
    launches = [attend_split(shape, _scale(shape), splits), combine(shape, _scale(shape), splits)]
    parts = {name: form for name, form in scratch(shape, splits).items() if name != "q"}
    return _attend_vector("attend_split", sequences, trees, shape, launches, parts)


def _kind(shape: AttentionShape) -> str:
    return "sparse" if shape.limit else f"in {shape.window} blocks" if shape.window else "dense"


def _scale(shape: AttentionShape) -> float:
    return shape.head_dim**-0.5


def _attend_vector(
    name: str,
    sequences: Sequences,
    trees: Trees,
    shape: AttentionShape,
    launches: Sequence[Launch],
    parts: dict[str, Form],
) -> Vector:
    """With a limit, rows attend to blocks chosen at random and the pool has no other pages.

    Else to all before them, or as many of these as the window has.
    """
    output = ((shape.tokens, shape.heads, shape.head_dim), ELEMENTS[shape.element])
    context = max(past + new for past, new in sequences)
    keys = 0
    for past, new in sequences:
        for length in range(past + 1, past + new + 1):
            most = min(length, (shape.limit or shape.window) * PAGE_TOKENS or length)
            keys += most if shape.limit else most * (length == past + new)
    return Vector(
        vector_name(f"{name} {shape.tokens} at {context} {_kind(shape)}", trees),
        tuple(launches),
        lambda rng: _attend_inputs(rng, sequences, trees, shape),
        {"output": output, **parts},
        lambda before: _attended(before, shape),
        moved=2 * keys * shape.kv_heads * kv_row_bytes(shape) + 2 * shape.tokens * shape.heads * shape.head_dim * 2,
    )


def _attend_inputs(rng: np.random.Generator, sequences: Sequences, trees: Trees, shape: AttentionShape) -> Buffers:
    step, chosen = make_step(rng, sequences, trees=trees), {}
    if shape.limit:
        chosen = _choose_blocks(rng, step, shape)
        step = _with_pages_of(rng, step, chosen["blocks"])
    dtype = ELEMENTS[shape.element]
    pool = normal(rng, (step.pages, shape.planes, shape.kv_heads, PAGE_TOKENS, shape.head_dim), dtype)
    return {
        "q": normal(rng, (shape.tokens, shape.heads, shape.head_dim), dtype, 1.5),
        **step.buffers,
        **chosen,
        **to_device(pool, shape.kv_element),
    }


def _choose_blocks(rng: np.random.Generator, step: Step, shape: AttentionShape) -> Buffers:
    """Every row's own block, others before it and those of its tree, ascending."""
    blocks = np.full(selection_scratch(shape)["blocks"][0], -1, np.int32)
    counts = np.zeros((shape.tokens, shape.kv_heads), np.int32)
    for b in range(step.sequences):
        for row in step.rows(b):
            own, slot = (int(at[row]) // PAGE_TOKENS for at in (step.positions, step.slots))
            in_tree = np.flatnonzero(tree_blocks(step.slots[row : row + 1], int(step.tree_start[b]), slot + 1)[0])
            for head in range(shape.kv_heads):
                chosen = rng.permutation(own)[: min(own, shape.limit - 1)]
                listed = np.unique([*chosen, own, *in_tree])
                blocks[row, head, : len(listed)], counts[row, head] = listed, len(listed)
    return {"blocks": blocks, "block_counts": counts}


def _with_pages_of(rng: np.random.Generator, step: Step, blocks: np.ndarray) -> Step:
    """The step with pages for the blocks that some row has chosen, and no others."""
    table, used = np.full_like(step.page_table, NO_PAGE), []
    for b in range(step.sequences):
        used += [(b, block) for block in np.unique(blocks[step.rows(b)]) if block >= 0]
    for page, (b, block) in zip(rng.permutation(len(used)), used, strict=True):
        table[b, block] = page
    return replace(step, page_table=table, pages=len(used))


def _attended(before: Buffers, shape: AttentionShape) -> dict[str, Expected]:
    held, q = from_device(before), before["q"].astype(np.float32)
    output = np.zeros(q.shape, np.float32)
    for b, pages in enumerate(before["page_table"]):
        for row in range(before["query_start"][b], before["query_start"][b + 1]):
            one, last = slice(row, row + 1), int(before["slots"][row]) // PAGE_TOKENS
            seen = meaning.visible_keys(
                before["slots"][one], int(before["tree_start"][b]), before["tree_mask"][one], (last + 1) * PAGE_TOKENS
            )
            first = max(0, int(before["positions"][row]) // PAGE_TOKENS + 1 - shape.window) if shape.window else 0
            for head in range(shape.kv_heads):
                blocks = np.arange(first, last + 1)
                if shape.limit:
                    blocks = before["blocks"][row, head, : before["block_counts"][row, head]]
                keys, values = held[pages[blocks], :2, head].swapaxes(0, 1).reshape(2, -1, 1, shape.head_dim)
                group = slice(head * shape.group, (head + 1) * shape.group)
                visible = seen.reshape(1, last + 1, PAGE_TOKENS)[:, blocks].reshape(1, 1, -1)
                output[row, group] = masked_attention(q[row : row + 1, group], keys, values, visible, _scale(shape))[0]
    largest = np.abs(output).max(axis=-1, keepdims=True)
    return {"output": Expected(output, absolute=_TOLERANCE[shape.element] * largest)}
