"""Proposes trees with an EAGLE draft model (spec: quantization_and_speculation.md 4.1, 4.2, 4.4; arXiv 2406.16858).

The draft's slot i takes the embedding of token i + 1 and the base's final-norm output of token i, and predicts token
i + 2. It has one layer, so what it keeps of a slot depends on these two alone: of a prompt, only as much as its window
reaches has to be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge.executor import TreeRows
from edge.speculation.draft import Draft, DraftBatch, DraftResult
from edge.speculation.speculator import Limits
from edge.speculation.tree import MOST_TREE_ROWS, TokenTree, TreeExpansion
from plugins import PAGE_TOKENS

CHUNK = 256  # slots that the draft catches up on at once


@dataclass(frozen=True)
class _Place:
    """Where a draft's step lies: a sequence's page table [1, P], and the length that selects LongRoPE's list."""

    page_table: np.ndarray
    length: int

    def batch(
        self, ids: np.ndarray, hidden: np.ndarray, positions: np.ndarray, rows: Sequence[int], tree: TreeRows | None
    ) -> DraftBatch:
        return DraftBatch(
            input_ids=ids.astype(np.int32),
            hidden=hidden,
            positions=positions.astype(np.int32),
            query_start=np.array([0, len(ids)], np.int32),
            page_table=self.page_table,
            rows=np.asarray(rows, np.int32),
            switch_length=np.array([self.length], np.int32),
            tree=tree,
        )


class EagleDrafter:
    """Of one reply: follows what the base computes, and guesses what comes next (edge/speculation/speculator.py).

    top_k: nodes of a level, and children that each may have. reach: slots that the draft's window may see; what is
    further back is not computed.
    """

    def __init__(self, draft: Draft, top_k: int, reach: int) -> None:
        self._draft, self._top_k, self._reach = draft, top_k, reach
        self._first = 0  # the slot of the first waiting row
        self._hidden: list[np.ndarray] = []  # the base's final-norm outputs that wait for the token after them

    def follow(self, first: int, hidden: np.ndarray) -> None:
        """See Drafter."""
        if first != self._first + len(self._hidden):
            self._first, self._hidden = first, []
        self._hidden.extend(hidden)
        if (far := len(self._hidden) - self._reach) > 0:
            del self._hidden[:far]
            self._first += far

    def ready(self, tokens: Sequence[int]) -> bool:
        """See Drafter: the base has computed all but the last token, and something since the last tree."""
        return bool(self._hidden) and self._first + len(self._hidden) == len(tokens) - 1

    def propose(self, tokens: Sequence[int], pages: Sequence[int], length: int, limits: Limits) -> TokenTree:
        """See Drafter."""
        root = len(tokens) - 1
        room = min(MOST_TREE_ROWS, len(pages) * PAGE_TOKENS - root)  # for the levels that the draft runs
        depth = min(limits.depth, 1 + room // self._top_k)
        place = _Place(np.asarray(pages, np.int32)[None], length)
        result = self._catch_up(tokens, place)
        # Nodes that share a page are computed as in plain decoding, to the last bit (plugins/paged_attention/tile.h).
        size = 1 + min(limits.rows, PAGE_TOKENS - (root + 1) % PAGE_TOKENS)
        expansion = TreeExpansion(result.logits[0], self._top_k, size=size)
        while expansion.depth < depth and (count := len((beam := expansion.beam).tokens)):
            slots = root + beam.first_slot + np.arange(count)
            tree = TreeRows(slots.astype(np.int32), np.array([root], np.int32), beam.masks)
            ids = beam.tokens if self._draft.vocab is None else self._draft.vocab[beam.tokens]
            positions = np.full(count, root + expansion.depth - 1)
            result = self._draft.step(place.batch(ids, result.hidden[beam.parents], positions, range(count), tree))
            expansion.extend(result.logits)
        return expansion.tree(tokens[root], size, self._draft.vocab)

    def skip(self) -> None:
        """See Drafter: what the base computes waits."""

    def _catch_up(self, tokens: Sequence[int], place: _Place) -> DraftResult:
        """Compute the slots that wait -> what comes after the last of them."""
        while True:
            count = min(CHUNK, len(self._hidden))
            ids = np.asarray(tokens[self._first + 1 : self._first + count + 1])
            positions = np.arange(self._first, self._first + count)
            result = self._draft.step(
                place.batch(ids, np.stack(self._hidden[:count]), positions, [count - 1], tree=None)
            )
            del self._hidden[:count]
            self._first += count
            if not self._hidden:
                return result
