"""Chooses the next step: which sequences contribute which tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from edge.executor import StepBatch, TreeRows
from edge.kv_cache import KVCache, NoPagesError
from edge.reuse import Runs
from edge.speculation.tree import TokenTree
from plugins.paged_attention import NO_TREE


@dataclass
class Sequence:
    """Tokens known so far, of which the first `computed` are in the cache; `runs` say how they were computed.

    `logits_from`: logits are wanted from this position on; None wants them after the last known token only. `tree`:
    what may come after the last known token, its root; a step of that token then computes its nodes too. `cuts`: places
    that no step may go across, since a step has one switch_length.
    """

    cache_id: int
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    prompt_length: int = 0
    logits_from: int | None = None
    runs: Runs = field(default_factory=list)
    tree: TokenTree | None = None
    cuts: tuple[int, ...] = ()

    @property
    def pending(self) -> int:
        """Known tokens that are not in the cache yet; 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.computed

    def length_after(self, count: int) -> int:
        """The switch_length of a step of its next `count` tokens: see StepBatch."""
        return max(self.prompt_length, self.computed + count)

    @property
    def uncut(self) -> int:
        """Pending tokens that one step may compute."""
        return min([self.pending, *(cut - self.computed for cut in self.cuts if cut > self.computed)])

    @property
    def tree_rows(self) -> int:
        """Rows of a step that nodes of the tree take: all but its root."""
        return 0 if self.tree is None else len(self.tree) - 1


@dataclass(frozen=True)
class Step:
    """A batch, and for every sequence in it how many tokens it contributes and how many rows of logits it gets.

    The nodes of a tree come after its sequence's one token and are not counted among its tokens.
    """

    batch: StepBatch
    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]
    logits_counts: tuple[int, ...]


class Scheduler:
    """Every decoding sequence takes part in every step; prompts share what is left of `chunk` tokens, in order.

    A step has logits of at most `rows` tokens, if it has fewer sequences than that; None is `chunk`.
    """

    def __init__(self, cache: KVCache, chunk: int, rows: int | None = None) -> None:
        self._cache = cache
        self._chunk = chunk
        self._rows = chunk if rows is None else rows

    def next_step(self, sequences: Iterable[Sequence], chunk: int | None = None) -> Step | None:
        """The next step for these sequences, or None if nothing is pending. Reserves the pages it writes.

        chunk: tokens of the step at most, if fewer than usual.
        A sequence for which there are no pages waits as long as another can run; NoPagesError if none can.
        """
        active = sorted((s for s in sequences if s.pending), key=lambda s: s.pending > 1)
        chosen: list[Sequence] = []
        counts: list[int] = []
        refusal: NoPagesError | None = None
        room = max(self._chunk if chunk is None else min(chunk, self._chunk), sum(s.pending == 1 for s in active))
        rows = max(1, self._rows - sum(s.logits_from is None for s in active))
        for sequence in active:
            before = 0
            count = min(sequence.uncut, room)
            if sequence.logits_from is not None:
                if rows < 1:
                    continue
                before = max(sequence.logits_from - sequence.computed, 0)
                count = min(count, before + rows)
            if count == 0:
                break
            if sequence.pending - count == 1 and count > 3:
                # A step of one token is computed by other kernels and rounded otherwise. An even number fewer, for
                # kernels that take rows in pairs.
                count -= 2
            if count + sequence.tree_rows > room:
                sequence.tree = None
            try:
                self._reserve(sequence, count)
            except NoPagesError as error:
                refusal = refusal or error
                continue
            if sequence.logits_from is not None:
                rows -= max(count - before, 0)
            chosen.append(sequence)
            counts.append(count)
            room -= count + sequence.tree_rows
        if refusal is not None and not chosen:
            raise refusal
        return self._build(chosen, counts) if chosen else None

    def _reserve(self, sequence: Sequence, count: int) -> None:
        """Pages for its next tokens; a tree for which there are none is forgotten."""
        first, end = sequence.computed, sequence.computed + count
        if sequence.tree is not None:
            try:
                self._cache.reserve(sequence.cache_id, end + sequence.tree_rows, first)
                return
            except NoPagesError:
                sequence.tree = None
        self._cache.reserve(sequence.cache_id, end, first)

    def _build(self, chosen: list[Sequence], counts: list[int]) -> Step:
        ids: list[list[int]] = []
        positions: list[np.ndarray] = []
        rows: list[int] = []
        logits_counts = []
        widths = [n + s.tree_rows for s, n in zip(chosen, counts, strict=True)]
        query_start = np.concatenate([[0], np.cumsum(widths)]).astype(np.int32)
        for sequence, count, end in zip(chosen, counts, query_start[1:], strict=True):
            first, tree = sequence.computed, sequence.tree
            ids.append(sequence.tokens[first : first + count])
            positions.append(np.arange(first, first + count))
            wanted_from = len(sequence.tokens) - 1 if sequence.logits_from is None else sequence.logits_from
            wanted = min(max(first + count - wanted_from, 0), count)
            if tree is not None:
                ids.append(list(tree.tokens[1:]))
                positions.append(first + tree.depths[1:])
                wanted += sequence.tree_rows
            logits_counts.append(wanted)
            rows.extend(range(end - wanted, end))
        tables = [self._cache.pages(sequence.cache_id) for sequence in chosen]
        page_table = np.zeros((len(tables), max(map(len, tables))), np.int32)
        for row, table in zip(page_table, tables, strict=True):
            row[: len(table)] = table
        lengths = [s.length_after(n) for s, n in zip(chosen, counts, strict=True)]
        batch = StepBatch(
            input_ids=np.concatenate(ids).astype(np.int32),
            positions=np.concatenate(positions).astype(np.int32),
            query_start=query_start,
            page_table=page_table,
            # A step must ask for at least one row: mid-prompt it is the last, and nobody reads it.
            logits_rows=np.asarray(rows or [query_start[-1] - 1], np.int32),
            switch_length=np.asarray(lengths, np.int32),
            tree=_tree_rows(chosen, counts) if any(s.tree for s in chosen) else None,
        )
        return Step(batch, tuple(chosen), tuple(counts), tuple(logits_counts))


def _tree_rows(chosen: list[Sequence], counts: list[int]) -> TreeRows:
    slots, starts, masks = [], [], []
    for sequence, count in zip(chosen, counts, strict=True):
        end, tree = sequence.computed + count, sequence.tree
        slots.append(np.arange(sequence.computed, end + sequence.tree_rows))
        starts.append(NO_TREE if tree is None else end)
        masks.append(np.zeros(count, np.uint64))
        if tree is not None:
            masks.append(tree.row_masks)
    return TreeRows(np.concatenate(slots).astype(np.int32), np.asarray(starts, np.int32), np.concatenate(masks))
