"""What an EAGLE drafter asks its draft model: slots, tokens and hidden states as the spec aligns them (4.2, 4.4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from edge.speculation.draft import DraftBatch, DraftResult
from edge.speculation.eagle import CHUNK, EagleDrafter
from edge.speculation.speculator import Limits
from edge.speculation.tree import TokenTree

VOCAB = np.array([7, 11, 13, 17, 19, 23, 29, 31], np.int32)  # the base's ids of the draft's tokens
TOP_K, WIDTH = 3, 4


class Recorder:
    """A draft that keeps what it is asked. Its logits follow from a row's token; its hidden state names the row."""

    vocab = VOCAB

    def __init__(self) -> None:
        self.batches: list[DraftBatch] = []

    def step(self, batch: DraftBatch) -> DraftResult:
        """See Draft."""
        self.batches.append(batch)
        ids = batch.input_ids[batch.rows]
        logits = np.stack([np.random.default_rng(int(token)).standard_normal(len(VOCAB)) for token in ids])
        hidden = np.full((len(ids), WIDTH), len(self.batches), np.float32) + np.arange(len(ids))[:, None] / 10
        return DraftResult(logits.astype(np.float32), hidden.astype(np.float32))

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Not needed."""


def hidden_of(first: int, count: int) -> np.ndarray:
    """Rows that name their positions."""
    return np.repeat(np.arange(first, first + count, dtype=np.float32)[:, None], WIDTH, axis=1)


def test_a_slot_takes_its_hidden_state_and_the_token_after_it() -> None:
    draft, tokens = Recorder(), list(range(100, 100 + 2 * CHUNK + 31))
    root = len(tokens) - 1
    drafter = EagleDrafter(draft, TOP_K, reach=10 * CHUNK)
    for first, last in ((0, 200), (200, root)):
        drafter.follow(first, hidden_of(first, last - first))
    drafter.propose(tokens, range(40), root + 1, Limits(rows=5, depth=1))
    positions = np.concatenate([batch.positions for batch in draft.batches])
    np.testing.assert_array_equal(positions, np.arange(root))
    np.testing.assert_array_equal(np.concatenate([batch.input_ids for batch in draft.batches]), tokens[1:])
    np.testing.assert_array_equal(np.concatenate([batch.hidden for batch in draft.batches]), hidden_of(0, root))
    assert all(batch.tree is None and list(batch.rows) == [len(batch.positions) - 1] for batch in draft.batches)


def test_levels_lie_behind_each_other_and_see_their_ancestors() -> None:
    draft, tokens = Recorder(), [100, 101, 106]
    drafter = EagleDrafter(draft, TOP_K, reach=64)
    drafter.follow(0, hidden_of(0, 2))
    tree = drafter.propose(tokens, [0], 3, Limits(rows=9, depth=3))
    assert isinstance(tree, TokenTree) and len(tree) == 10 and tree.tokens[0] == 106
    assert set(tree.tokens[1:]) <= set(VOCAB.tolist()) and tree.depths.max() <= 3
    _, one, two = draft.batches
    best = np.argsort(-np.random.default_rng(106).standard_normal(len(VOCAB)))[:TOP_K]
    np.testing.assert_array_equal(one.input_ids, VOCAB[best])
    for depth, batch in enumerate((one, two), 1):
        assert batch.tree is not None
        np.testing.assert_array_equal(batch.positions, [2 + depth - 1] * TOP_K)
        np.testing.assert_array_equal(batch.tree.slots, 2 + (depth - 1) * TOP_K + np.arange(TOP_K))
        assert batch.tree.start.tolist() == [2] and list(batch.rows) == [*range(TOP_K)]
    np.testing.assert_array_equal(one.tree.mask, [1, 2, 4])
    np.testing.assert_array_equal(one.hidden, np.ones((TOP_K, WIDTH)))  # the root row's state, for each
    rows = np.rint(10 * (two.hidden[:, 0] - 2)).astype(int)  # of the first level, whose states these are
    assert set(rows.tolist()) == {0, 1, 2}  # each of which goes on, with this token
    np.testing.assert_array_equal(two.tree.mask, [1 << row | 1 << TOP_K + i for i, row in enumerate(rows.tolist())])


def test_after_a_step_only_the_accepted_rows_are_computed() -> None:
    draft, tokens = Recorder(), [*range(100, 130)]
    drafter = EagleDrafter(draft, TOP_K, reach=64)
    drafter.follow(0, hidden_of(0, 29))
    drafter.propose(tokens, [0], 30, Limits(rows=4, depth=2))
    drafter.follow(29, hidden_of(29, 3))  # the root and two accepted nodes
    tokens += [200, 201, 202]
    draft.batches.clear()
    drafter.propose(tokens, [0], 33, Limits(rows=4, depth=1))
    (batch,) = draft.batches
    assert batch.positions.tolist() == [29, 30, 31] and batch.input_ids.tolist() == [200, 201, 202]


def test_what_is_out_of_reach_or_was_not_followed_is_left_out() -> None:
    draft, tokens = Recorder(), [*range(1000)]
    drafter = EagleDrafter(draft, TOP_K, reach=100)
    assert not drafter.ready(tokens)
    drafter.follow(0, hidden_of(0, 999))
    drafter.propose(tokens, range(16), 1000, Limits(rows=4, depth=1))
    assert draft.batches[0].positions[0] == 899
    drafter.follow(1005, hidden_of(1005, 1))  # others were computed in between
    assert not drafter.ready([*range(1006)])
    assert drafter.ready([*range(1007)])


def test_levels_are_as_many_as_pages_have_room_for() -> None:
    draft, tokens = Recorder(), [*range(61)]
    drafter = EagleDrafter(draft, TOP_K, reach=100)
    drafter.follow(0, hidden_of(0, 60))
    drafter.propose(tokens, [0], 61, Limits(rows=9, depth=4))  # 4 slots are left on the page: one level
    assert len(draft.batches) == 2


@pytest.mark.parametrize(("root", "nodes"), [(59, 5), (61, 3), (62, 2), (63, 10)])
def test_a_tree_keeps_to_the_page_of_its_first_node(root: int, nodes: int) -> None:
    """There its nodes are computed as in plain decoding, to the last bit."""
    draft, tokens = Recorder(), [*range(100, 101 + root)]
    drafter = EagleDrafter(draft, TOP_K, reach=100)
    drafter.follow(0, hidden_of(0, root))
    assert len(drafter.propose(tokens, [0, 1], root + 1, Limits(rows=9, depth=3))) == nodes
