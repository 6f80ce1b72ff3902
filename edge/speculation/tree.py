"""Token trees to verify in one step, and EAGLE-2's dynamic tree (arXiv 2406.16858), grown level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edge.errors import EdgeError

MOST_TREE_ROWS = 64  # bits of a row's mask
Masks = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenTree:
    """Proposed continuations of a sequence: node 0 is its last token, every other node one token after its parent.

    parents[0] is -1 and parents[i] < i. At most 65 nodes: the root, which is a plain row of the step, and 64 tree rows.
    Siblings should differ; of equal ones only the first can be accepted.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents) or not 1 <= len(self.tokens) <= MOST_TREE_ROWS + 1:
            raise ValueError(
                f"a tree has 1 to {MOST_TREE_ROWS + 1} nodes with a token and a parent each, not "
                f"{len(self.tokens)} tokens and {len(self.parents)} parents"
            )
        if self.parents[0] != -1 or any(not 0 <= parent < i for i, parent in enumerate(self.parents) if i):
            raise ValueError(f"the root's parent must be -1 and every other node's an earlier node: {self.parents}")

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> TokenTree:
        """A tree without branches: the root's token, then one child after the other."""
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)))

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> npt.NDArray[np.int32]:
        """[nodes]: 0 for the root. A node's position in the sequence is the root's plus this."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return np.asarray(depths, np.int32)

    @cached_property
    def row_masks(self) -> Masks:
        """[nodes - 1], of the tree rows: bit i - 1 is set where node i is the row's node or an ancestor of it.

        This is what a step takes, with the tree beginning at the slot after the root's.
        """
        masks = [0]
        for node, parent in enumerate(self.parents[1:]):
            masks.append(masks[parent] | 1 << node)
        return np.asarray(masks[1:], np.uint64)

    @property
    def masks(self) -> Masks:
        """[nodes]: bit i is set where node i is the node or an ancestor of it, the root (bit 0) included.

        A tree of 65 nodes does not fit (ValueError); its `row_masks` do.
        """
        if len(self) > MOST_TREE_ROWS:
            raise ValueError(f"masks that include the root have {MOST_TREE_ROWS} bits, the tree has {len(self)} nodes")
        return np.concatenate([np.zeros(1, np.uint64), self.row_masks << np.uint64(1)]) | np.uint64(1)

    @cached_property
    def _children(self) -> tuple[tuple[int, ...], ...]:
        children: list[list[int]] = [[] for _ in self.tokens]
        for node, parent in enumerate(self.parents[1:], 1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    def children(self, node: int) -> tuple[int, ...]:
        """The nodes whose parent is `node`, ascending."""
        return self._children[node]

    def limited(self, depth: int, nodes: int) -> TokenTree:
        """This tree without nodes deeper than `depth`, and of the others only the first `nodes`, root included.

        Of a tree by `TreeExpansion` that is the tree which fewer levels and a smaller size would have given.
        """
        if depth < 0 or nodes < 1:
            raise ValueError(f"a tree keeps its root: depth {depth} must be at least 0, and {nodes} nodes at least 1")
        kept = np.flatnonzero(self.depths <= depth)[:nodes].tolist()
        index = {node: new for new, node in enumerate(kept)}
        parents = (-1, *(index[self.parents[node]] for node in kept[1:]))
        return TokenTree(tuple(self.tokens[node] for node in kept), parents)


@dataclass(frozen=True)
class Beam:
    """The rows that the draft runs for one level of the tree; w is at most k, and 0 if the tree is as good as it gets.

    tokens [w]: ids of the draft's vocabulary. parents [w]: the row of the previous level (0 for the first level: the
    root's row) whose hidden state each continues. masks [w]: which slots of the draft's own tree each row sees, its own
    included. first_slot: the slot in that tree of the first row; the others follow.
    """

    tokens: Ids
    parents: Ids
    masks: Masks
    first_slot: int


class TreeExpansion:
    """EAGLE-2's expansion: each level continues the k likeliest nodes of the last by their k likeliest tokens each.

    `logits` [V'] are the draft's after the sequence's last token, and `scale` what they are multiplied by. Likelihoods
    are cumulative log-probabilities in float32, ties go to the node that was found first (a parent before its
    children), and between equal logits of a row to the lower id. Logits that are NaN, +inf or all -inf raise EdgeError.

    `size`: of the largest tree that will be asked for, root included; None is any. Nodes whose children cannot be in it
    are not continued, which changes no tree: a child is no likelier than its parent and was found later, so that it is
    among the n likeliest only if its parent is among the n - 1 likeliest.
    """

    def __init__(self, logits: npt.NDArray[Any], k: int, scale: float = 1.0, size: int | None = None) -> None:
        if k < 1 or not scale > 0:
            raise ValueError(f"a level needs k of at least 1 and a positive scale of the logits, not {k} and {scale}")
        self._k = k
        self._size = size
        self._each = k if size is None else max(1, min(k, size - 1))  # children of a node that may be in the tree
        self._scale = np.float32(scale)
        # The history: every candidate ever found, in the order of finding. Parents are indices into it.
        self._tokens, self._scores = self._best(logits[None])
        self._parents = np.full(self._tokens.size, -1)
        self._beam = self._continued(np.arange(self._tokens.size))
        self._beam_parents = np.zeros(self._beam.size, np.int64)
        self._paths = [1 << row for row in range(self._beam.size)]
        self._first_slot = 0
        self.depth = 1

    @property
    def beam(self) -> Beam:
        """The rows to run for the next level; ValueError if they do not fit the 64 slots of a mask."""
        slots = self._first_slot + self._beam.size
        if slots > MOST_TREE_ROWS:
            raise ValueError(f"level {self.depth} of the tree needs {slots} slots and a mask has {MOST_TREE_ROWS}")
        masks = np.asarray(self._paths, np.uint64)
        return Beam(self._tokens[self._beam], self._beam_parents, masks, self._first_slot)

    def extend(self, logits: npt.NDArray[Any]) -> None:
        """Add a level, by the draft's logits [w, V'] after the rows of `beam`."""
        if logits.shape[0] != self._beam.size:
            raise ValueError(f"the level has {self._beam.size} rows, not {logits.shape[0]}")
        tokens, scores = self._best(logits)
        each = tokens.size // self._beam.size
        scores = np.repeat(self._scores[self._beam], each) + scores
        found = self._tokens.size
        self._tokens = np.concatenate([self._tokens, tokens])
        self._parents = np.concatenate([self._parents, np.repeat(self._beam, each)])
        self._scores = np.concatenate([self._scores, scores])
        self._first_slot += self._beam.size
        self._beam = self._continued(found + _largest(scores, self._k))
        rows = (self._beam - found) // each  # of the level just run
        self._paths = [self._paths[row] | 1 << (self._first_slot + i) for i, row in enumerate(rows.tolist())]
        self._beam_parents = rows
        self.depth += 1

    def _continued(self, level: Ids) -> Ids:
        """Those of the level's best nodes (indices into the history) whose children may be in the tree."""
        if self._size is None:
            return level
        return level[np.isin(level, _largest(self._scores, self._size - 2))]

    def tree(self, root_token: int, size: int, remap: npt.NDArray[Any] | None = None) -> TokenTree:
        """The tree of the likeliest `size` nodes of all levels, root included, by descending likelihood.

        `remap` [V'] gives the model's id of each of the draft's (FR-Spec, arXiv 2502.14856); None is the same id.
        A node that cannot occur (probability 0) is left out, so the tree may be smaller.
        """
        # A child's score is its parent's plus something that is not positive, and it was found later: whatever is
        # chosen, its parent is chosen and stands before it.
        chosen = _largest(self._scores, size - 1)
        chosen = chosen[self._scores[chosen] > -np.inf]
        nodes = {-1: 0} | {index: node for node, index in enumerate(chosen.tolist(), 1)}
        parents = tuple(nodes[index] for index in self._parents[chosen].tolist())
        tokens = self._tokens[chosen]
        if remap is not None:
            tokens = remap[tokens]
        return TokenTree((root_token, *tokens.tolist()), (-1, *parents))

    def _best(self, logits: npt.NDArray[Any]) -> tuple[Ids, npt.NDArray[np.float32]]:
        """Of each row of [w, V'] the k best ids, best first, and their log-probabilities, one row after the other."""
        ids, scores = [], []
        for row in logits:  # one at a time stays in the processor's cache
            best = _largest(row, self._each)
            scaled = row.astype(np.float32) * self._scale
            largest = scaled[best[0]]
            if not (np.isfinite(largest) and largest == scaled.max()):
                raise EdgeError("the draft's logits are not finite: check its weights, or run without speculation")
            scaled -= largest
            ids.append(best)
            likeliest = scaled[best]
            scores.append(likeliest - np.log(np.exp(scaled, out=scaled).sum()))
        return np.concatenate(ids), np.concatenate(scores)


def _largest(values: npt.NDArray[Any], k: int) -> Ids:
    """Indices of the k largest of `values` [n], largest first, of equals the lower index first."""
    candidates = np.arange(values.size)
    maxima = values[: values.size // 64 * 64].reshape(64, -1).max(axis=0)
    if 0 < k < maxima.size:
        # At least k values reach the k-th largest of these maxima: sort among those few.
        candidates = np.flatnonzero(values >= np.partition(maxima, maxima.size - k)[maxima.size - k])
    order = np.argsort(-values[candidates], kind="stable")
    return candidates[order[: max(k, 0)]]
