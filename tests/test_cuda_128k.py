"""Decoding at 131072 tokens with MiniCPM4-8B's shape: scores, selection and attention of one KV head, in a chain."""

from __future__ import annotations

import numpy as np
import pytest

from plugins import PAGE_TOKENS
from plugins.infllmv2.launch import score_coarse, score_fine, select
from plugins.infllmv2.launch import scratch as sparse_scratch
from plugins.infllmv2.meaning import block_scores, masked_attention, select_blocks, stored_windows, window_scores
from plugins.paged_attention import NO_TREE
from plugins.paged_attention.launch import AttentionShape, attend_split, choose_splits, combine, scratch
from plugins.paged_attention.pages import from_device, to_device
from plugins.vectors import ELEMENTS, poisoned
from tests.cuda_routes import run_route

TOKENS, PAGES, DIM, HEADS = 131072, 2048, 128, 16
SETTINGS = np.array([8192, 1, 32, 96], np.int32)


@pytest.mark.parametrize("route", ["fast", "ptx"])
def test_decode_at_131072_tokens(route: str) -> None:
    rng, dtype = np.random.default_rng(0), ELEMENTS["bf16"]
    shape = AttentionShape(1, 1, PAGES, HEADS, 1, DIM, "bf16", "bf16", limit=96)
    splits = choose_splits(shape, multiprocessors=16)
    pool = rng.normal(size=(PAGES, 2, 1, PAGE_TOKENS, DIM)).astype(np.float32).astype(dtype)
    inputs = {
        **to_device(pool, "bf16"),
        "c1_pool": rng.normal(size=(PAGES, 1, 4, DIM)).astype(dtype),
        "c2_pool": rng.normal(size=(PAGES, 1, 1, DIM)).astype(dtype),
        "positions": np.array([TOKENS - 1], np.int32),
        "slots": np.array([TOKENS - 1], np.int32),
        "query_start": np.array([0, 1], np.int32),
        "page_table": rng.permutation(PAGES).astype(np.int32)[None],
        "tree_start": np.array([NO_TREE], np.int32),
        "tree_mask": np.zeros(1, np.uint64),
        "switch_length": np.array([TOKENS], np.int32),
        "sparse_settings": SETTINGS,
    }
    room = {**sparse_scratch(shape), **scratch(shape, splits), "output": ((1, HEADS, DIM), dtype)}
    buffers = {**{name: poisoned(*form) for name, form in room.items()}, **inputs}
    buffers["q"] = rng.normal(size=(1, HEADS, DIM)).astype(dtype)
    scale = DIM**-0.5
    launches = [score_coarse(shape, scale), score_fine(shape, scale), select(shape)]
    run_route(route, [*launches, attend_split(shape, scale, splits), combine(shape, scale, splits)], buffers)

    pages, q = inputs["page_table"][0], buffers["q"].astype(np.float32)
    c1 = stored_windows(inputs["c1_pool"], pages, TOKENS // 16 - 1)
    c2 = stored_windows(inputs["c2_pool"], pages, TOKENS // 64 - 1)
    scores = block_scores(window_scores(q, c1, c2, inputs["positions"], scale), PAGES)
    chosen = select_blocks(scores, inputs["positions"], *SETTINGS[1:])[0, 0]
    blocks = buffers["blocks"][0, 0, :96]  # a tree would need the columns after them
    assert buffers["block_counts"][0, 0] == 96
    assert np.array_equal(blocks, np.flatnonzero(chosen))  # no near tie at the cut in this data
    held = from_device({"kv_pool": buffers["kv_pool"][pages[blocks]]}).swapaxes(0, 1)  # [planes, blocks, 1, 64, d]
    keys, values = held.reshape(2, -1, 1, DIM)
    expected = masked_attention(q, keys, values, np.ones((1, 1, len(keys)), bool), scale)
    assert np.abs(buffers["output"].astype(np.float32) - expected).max() < 2e-2
