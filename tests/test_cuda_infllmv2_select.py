"""The CUDA kernel that chooses blocks, by all routes: exactly what plugins/infllmv2/meaning.py chooses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins import PAGE_TOKENS
from plugins.infllmv2 import meaning
from plugins.infllmv2.launch import scratch, select
from plugins.paged_attention import NO_TREE
from plugins.paged_attention.launch import AttentionShape
from tests.cuda_cases import Case, run_cases
from tests.cuda_routes import ROUTES, SEEDS


def selection(scores: np.ndarray, own: np.ndarray, *sizes: int, limit: int) -> Case:
    """scores [Hkv, T, blocks]; row t is a sequence's, in block own[t]. sizes: init, local, selected.

    A score is a value of its own block or of the next one; what lies behind a row's own block was never written.
    """
    positions = (own * PAGE_TOKENS + np.arange(len(own)) % PAGE_TOKENS).astype(np.int32)
    heads, rows, blocks = scores.shape
    shape = AttentionShape(rows, rows, blocks, heads, heads, 64, limit=limit)
    lower = scores * np.random.default_rng(blocks).random(scores.shape, np.float32)
    is_next = np.arange(blocks) % 3 == 1
    values = np.zeros((*scores.shape, 2), np.float32)
    values[..., 0] = np.where(is_next, lower, scores)
    values[..., 1:, 1] = np.where(is_next, scores, lower)[..., :-1]
    values[:, np.arange(blocks) > own[:, None]] = np.nan
    stored = np.full(scratch(shape)["block_scores"][0], np.nan, np.float32)
    stored[:, :, :blocks] = values.swapaxes(0, 1)
    inputs = {
        "block_scores": stored,
        "positions": positions,
        "slots": positions,
        "tree_start": np.full(rows, NO_TREE, np.int32),
        "query_start": np.arange(rows + 1, dtype=np.int32),
        "switch_length": np.zeros(rows, np.int32),
        "sparse_settings": np.array([-1, *sizes], np.int32),
    }
    outputs = {name: output for name, output in scratch(shape).items() if name in ("blocks", "block_counts")}
    return Case(f"init, local, selected {sizes} of {blocks}", select(shape), inputs, outputs)


def check_selections(
    route: str, selections: Sequence[tuple[np.ndarray, np.ndarray, tuple[int, int, int]]], seed: int = 0
) -> None:
    """(scores, own, sizes) each; the limit is a little above what is selected."""
    cases = [selection(scores, own, *sizes, limit=sizes[2] + 3) for scores, own, sizes in selections]
    for case, result, (scores, own, sizes) in zip(cases, run_cases(route, cases, seed), selections, strict=True):
        chosen = meaning.select_blocks(scores, own * PAGE_TOKENS, *sizes)
        for head, row in np.ndindex(chosen.shape[:2]):
            expected = np.flatnonzero(chosen[head, row])
            assert result.outputs["block_counts"][row, head] == len(expected), case.name
            columns = result.outputs["blocks"].shape[-1]
            padded = np.pad(expected, (0, columns - len(expected)), constant_values=-1)
            np.testing.assert_array_equal(result.outputs["blocks"][row, head], padded, case.name)


@pytest.mark.parametrize("route", ROUTES)
def test_selection(route: str) -> None:
    """Sizes beyond the context, empty, overlapping and with more forced blocks than selected ones; many blocks."""
    rng, own = np.random.default_rng(0), np.array([0, 1, 7, 31, 32, 33, 63])
    sizes = [(1, 100, 105), (0, 0, 1), (1, 0, 3), (0, 2, 4), (50, 2, 60), (4, 9, 12), (6, 0, 4), (2, 3, 3), (1, 2, 100)]
    sizes += [(0, 0, 31), (0, 0, 32), (0, 0, 33), (0, 0, 0)]
    few = rng.integers(0, 4, (2, len(own), 64)).astype(np.float32)
    few *= np.float32(1e-38)  # the smallest differences of their bits are in every digit
    selections = [(few, own, size) for size in sizes]
    for blocks, selected in ((4096, 96), (4095, 512), (2049, 1000)):
        many = rng.gamma(0.3, size=(1, 2, blocks)).astype(np.float32)
        selections.append((many, np.array([blocks - 1, blocks // 2]), (1, 32, selected)))
        selections.append((many.round(1), np.array([blocks - 1, blocks - 2]), (1, 32, selected)))
    for schedule in SEEDS[route]:
        check_selections(route, selections, schedule)


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_selection_of_few_distinct_scores(route: str, data: st.DataObject) -> None:
    rows, blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 600))
    values = data.draw(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores = rng.choice(np.array(values, np.float32), (2, rows, blocks))
    sizes = tuple(data.draw(st.integers(0, most)) for most in (blocks + 2, blocks + 2, blocks + 2))
    check_selections(route, [(scores, rng.integers(0, blocks, rows), sizes)])
