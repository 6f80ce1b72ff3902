"""What a draft model must offer: one ragged step of its own, over the pages of the sequences that it drafts for.

Its slot i belongs to position i of the base, and lies on the same page numbers in a pool of its own. A row takes the
token after that position and the base's final-norm output at it, or of a guess the draft's own hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge.executor import StepBatch, TreeRows


@dataclass(frozen=True)
class DraftBatch:
    """T rows of B sequences; all arrays but `hidden` are int32, and as in edge/executor.py's StepBatch.

    input_ids [T]: of the base's vocabulary. hidden [T, H] float32. rows [R]: those whose logits and hidden states are
    wanted, at least one.
    """

    input_ids: np.ndarray
    hidden: np.ndarray
    positions: np.ndarray
    query_start: np.ndarray
    page_table: np.ndarray
    rows: np.ndarray
    switch_length: np.ndarray
    tree: TreeRows | None = None

    def inputs(self) -> dict[str, np.ndarray]:
        """The graph's inputs by name, int32, and `hidden` float32."""
        step = StepBatch(
            self.input_ids,
            self.positions,
            self.query_start,
            self.page_table,
            self.rows,
            self.switch_length,
            self.tree,
        )
        return step.inputs() | {"hidden": np.ascontiguousarray(self.hidden, np.float32)}


@dataclass(frozen=True)
class DraftResult:
    """Of the wanted rows: logits [R, V'] float32, and hidden [R, H] float32 for the level below."""

    logits: np.ndarray
    hidden: np.ndarray


class Draft(Protocol):
    """Runs steps over its own KV pool. vocab: the base's ids of its V' tokens, int32; None: they are the base's."""

    vocab: np.ndarray | None

    def step(self, batch: DraftBatch) -> DraftResult:
        """Append the rows' keys and values to their pages and return what is wanted."""
        ...

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (source, target) each, before any later step."""
        ...

    def memory(self) -> Mapping[str, int]:
        """Bytes taken so far, by the names of the plan's lines; what cannot be measured is left out."""
        ...
