"""What an engine must offer: one ragged step (DESIGN 7), and on a device also decoding without the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from plugins.paged_attention import NO_TREE


@dataclass(frozen=True)
class TreeRows:
    """Where tokens of a step are stored, and what they see, if some are nodes of a tree of which one path will remain.

    slots [T] int32: where in its sequence a token is stored; consecutive. start [B] int32: the slot at which the
    sequence's tree begins, or NO_TREE. mask [T] uint64: bit i says that the row sees slot start + i. A row sees all
    slots before the tree, and none after its own.
    """

    slots: np.ndarray
    start: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class StepBatch:
    """T new tokens of B sequences, sequence after sequence. All arrays are int32.

    positions [T]: each token's place in its sequence. query_start [B + 1]: where each sequence's tokens begin.
    page_table [B, P]: each sequence's pages in order, short rows padded with any valid page.
    logits_rows [R]: the rows of this step whose logits are wanted; at least one.
    switch_length [B]: the length that selects LongRoPE's factor list and dense or sparse attention: the prompt's while
    it is being prefilled, then the context's. tree: None if a token's place is its position and it sees all before it.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    query_start: np.ndarray
    page_table: np.ndarray
    logits_rows: np.ndarray
    switch_length: np.ndarray
    tree: TreeRows | None = None

    def inputs(self) -> dict[str, np.ndarray]:
        """The graph's inputs by name, all int32; the bits of tree_mask [T, 2] are the low word and the high one."""
        tree = self.tree or TreeRows(
            self.positions,
            np.full(len(self.query_start) - 1, NO_TREE, np.int32),
            np.zeros(len(self.positions), np.uint64),
        )
        names = ("input_ids", "positions", "query_start", "page_table", "logits_rows", "switch_length")
        arrays = {name: getattr(self, name) for name in names} | {"slots": tree.slots, "tree_start": tree.start}
        mask = np.ascontiguousarray(tree.mask, "<u8").view(np.int32).reshape(-1, 2)
        return {name: np.ascontiguousarray(values, np.int32) for name, values in arrays.items()} | {"tree_mask": mask}


@dataclass(frozen=True)
class StepResult:
    """logits [R, vocab] float32, in the order of `logits_rows`.

    hidden [T, hidden_size] float32: the final norm's output of every row, if the bundle has a draft model.
    """

    logits: np.ndarray
    hidden: np.ndarray | None = None


class Executor(Protocol):
    """Runs steps over its own KV pool of `num_pages` pages."""

    num_pages: int

    def step(self, batch: StepBatch) -> StepResult:
        """Append the new tokens' keys and values to their pages and return the wanted logits."""
        ...

    def keep_tokens(self, pages: Sequence[int], first: int, slots: Sequence[int]) -> None:
        """Move what a sequence with these pages has at `slots` to first, first + 1, ...

        `slots` ascend, and slots[i] >= first + i. The compressed keys of windows that end there are written anew.
        """
        ...

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (source, target) each, in every pool of every layer, before any later step."""
        ...

    def save_pages(self, pages: Sequence[int]) -> np.ndarray:
        """All that the executor keeps of these pages, [pages, bytes of one page] uint8."""
        ...

    def load_pages(self, pages: Sequence[int], data: np.ndarray) -> None:
        """Fill pages with what `save_pages` gave, of as many pages, in an executor of the same `page_format`."""
        ...

    @property
    def page_bytes(self) -> int:
        """Of one page in all pools of all layers."""
        ...

    @property
    def page_format(self) -> str:
        """What the bytes of a page depend on besides the bundle: its type and the kernels, which order them."""
        ...

    def describe(self) -> dict[str, str]:
        """Facts for reports: provider, kernels, threads, KV type."""
        ...

    def memory(self) -> Mapping[str, int]:
        """Bytes that the run has taken so far, by the names of its plan's lines (edge/memory/ledger.py).

        A line that cannot be measured here is left out.
        """
        ...


@dataclass(frozen=True)
class DrawParams:
    """How the device draws the tokens of B sequences (plugins/sampling); every array is [B].

    step: where in the request the next token will be. seen [B, ceil(vocabulary / 32)] uint32, a bit for each token
    that occurred, only where a `penalty` is not 1.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    step: np.ndarray
    penalty: np.ndarray | None = None
    seen: np.ndarray | None = None


@runtime_checkable
class DecodingExecutor(Executor, Protocol):
    """An executor that draws tokens and feeds them back by itself, up to `burst` a sequence before the host looks."""

    burst: int

    def decode(self, batch: StepBatch, params: DrawParams, count: int) -> np.ndarray:
        """`count` decode steps -> tokens [count, B] int32, -1 where no logit was finite.

        `batch` is the first of them: one token of each sequence. Its page table must have the pages of all.
        """
        ...
