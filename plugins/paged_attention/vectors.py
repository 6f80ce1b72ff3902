"""Vectors of attention over pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from plugins import PAGE_TOKENS
from plugins.infllmv2.meaning import masked_attention
from plugins.launch import Launch
from plugins.paged_attention import meaning
from plugins.paged_attention.launch import AttentionShape, append, attend_split, attend_tiles, combine, scratch
from plugins.paged_attention.pages import NO_PAGE, Step, from_device, make_step, to_device
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


def append_vector(sequences: Sequences, shape: AttentionShape) -> Vector:
    """Rotated queries, and keys and values in their pages; other slots untouched.

    Elements, cos and sin are multiples of 1/8: what rotates is rounded once, and bytes are made by one division and one
    product. Exact.
    """
    shape, dtype = shape_of(sequences, shape), ELEMENTS[shape.element]
    rows = shape.heads + 2 * shape.kv_heads

    def inputs(rng: np.random.Generator) -> Buffers:
        step = make_step(rng, sequences)
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
            page, slot = pages[before["positions"][new] // PAGE_TOKENS], before["positions"][new] % PAGE_TOKENS
            for plane, x in enumerate((rotated, v, k)[: shape.planes]):
                pool[page, plane, :, slot] = x[new]
        held = {name: Expected(values) for name, values in to_device(pool, shape.kv_element).items()}
        return {"q": Expected(q), **held}

    written = shape.tokens * shape.kv_heads * shape.planes * kv_row_bytes(shape)
    return Vector(
        f"append {shape.tokens}",
        (append(shape),),
        inputs,
        {"q": ((shape.tokens, shape.heads, shape.head_dim), dtype)},
        expect,
        moved=shape.tokens * (rows + shape.heads) * shape.head_dim * 2 + shape.tokens * shape.head_dim * 4 + written,
    )


def tiles_vector(sequences: Sequences, shape: AttentionShape) -> Vector:
    """Attention by whole tiles."""
    shape = shape_of(sequences, shape)
    return _attend_vector("attend_tiles", sequences, shape, [attend_tiles(shape, _scale(shape))], {})


def split_vector(sequences: Sequences, shape: AttentionShape, splits: int) -> Vector:
    """Attention by split tiles, and what puts their parts together."""
    shape = shape_of(sequences, shape)
    launches = [attend_split(shape, _scale(shape), splits), combine(shape, _scale(shape), splits)]
    parts = {name: form for name, form in scratch(shape, splits).items() if name != "q"}
    return _attend_vector("attend_split", sequences, shape, launches, parts)


def _scale(shape: AttentionShape) -> float:
    return shape.head_dim**-0.5


def _attend_vector(
    name: str, sequences: Sequences, shape: AttentionShape, launches: Sequence[Launch], parts: dict[str, Form]
) -> Vector:
    """With a limit, rows attend to blocks chosen at random and the pool has no other pages; else to all before them."""
    output = ((shape.tokens, shape.heads, shape.head_dim), ELEMENTS[shape.element])
    context = max(past + new for past, new in sequences)
    keys = 0
    for past, new in sequences:
        for length in range(past + 1, past + new + 1):
            keys += min(length, shape.limit * PAGE_TOKENS) if shape.limit else length * (length == past + new)
    return Vector(
        f"{name} {shape.tokens} at {context} {'sparse' if shape.limit else 'dense'}",
        tuple(launches),
        lambda rng: _attend_inputs(rng, sequences, shape),
        {"output": output, **parts},
        lambda before: _attended(before, shape),
        moved=2 * keys * shape.kv_heads * kv_row_bytes(shape) + 2 * shape.tokens * shape.heads * shape.head_dim * 2,
    )


def _attend_inputs(rng: np.random.Generator, sequences: Sequences, shape: AttentionShape) -> Buffers:
    step, chosen = make_step(rng, sequences), {}
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
    """Every row's own block and others before it, ascending."""
    blocks = np.full((shape.tokens, shape.kv_heads, shape.limit), -1, np.int32)
    counts = np.zeros((shape.tokens, shape.kv_heads), np.int32)
    for row, position in enumerate(step.positions):
        own = int(position) // PAGE_TOKENS
        count = min(own + 1, shape.limit)
        for head in range(shape.kv_heads):
            blocks[row, head, :count] = np.sort(np.append(rng.permutation(own)[: count - 1], own))
            counts[row, head] = count
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
            position = int(before["positions"][row])
            for head in range(shape.kv_heads):
                blocks = np.arange(position // PAGE_TOKENS + 1)
                if shape.limit:
                    blocks = before["blocks"][row, head, : before["block_counts"][row, head]]
                tokens = (blocks[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).reshape(-1)
                keys, values = held[pages[blocks], :2, head].swapaxes(0, 1).reshape(2, -1, 1, shape.head_dim)
                group = slice(head * shape.group, (head + 1) * shape.group)
                visible = (tokens <= position)[None, None]
                output[row, group] = masked_attention(q[row : row + 1, group], keys, values, visible, _scale(shape))[0]
    largest = np.abs(output).max(axis=-1, keepdims=True)
    return {"output": Expected(output, absolute=_TOLERANCE[shape.element] * largest)}
