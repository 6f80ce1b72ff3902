"""How many proposed tokens are accepted, by how many are proposed: exponential averages over verified trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge.speculation.tree import MOST_TREE_ROWS, TokenTree

# Tree rows to choose among: few, so that each is measured often; from 7 on a multiple of 8 with the root, where the
# tiles of kernels end.
ROWS = (1, 2, 3, 4, 5, 7, 11, 15, 23, 31, 47, 63)
_DECAY = 0.97  # of a verified tree's weight with each later one
_PRIOR = 0.7  # acceptance to believe in before there is any, with the weight of one trial
_SMOOTH = 2.0  # trials that a depth borrows from the depth before it

Floats = npt.NDArray[np.float64]
_INVERSE = 1 / np.arange(1, MOST_TREE_ROWS + 1)


@dataclass(frozen=True)
class Shapes:
    """Trees to choose among: tree rows [n], depth [n], and how many of their tokens will be accepted [n]."""

    rows: Sequence[int]
    depths: Sequence[int]
    expected: Floats


class Acceptance(Protocol):
    """What was accepted so far, and so what will be."""

    def observe(self, tree: TokenTree, path: Sequence[int]) -> None:
        """A tree was verified, and these nodes below its root were accepted."""
        ...

    def shapes(self, most_rows: int, most_depth: int) -> Shapes:
        """Trees of up to `most_rows` rows and `most_depth` levels."""
        ...


class ChainAcceptance:
    """Of trees with one branch, or of any tree by depth alone.

    q[d] is the share, among trees at least d deep whose path reached d - 1, of those whose path reached d; a depth
    without trials is expected to be like the one before. A path reaches d with probability q[1] ... q[d], and the
    expected number of accepted tokens of a chain of n is the sum of these up to n.
    """

    def __init__(self) -> None:
        self._tried = np.zeros(MOST_TREE_ROWS)
        self._kept = np.zeros(MOST_TREE_ROWS)

    def observe(self, tree: TokenTree, path: Sequence[int]) -> None:
        """See Acceptance."""
        self._tried *= _DECAY
        self._kept *= _DECAY
        self._tried[: min(len(path) + 1, int(tree.depths.max()))] += 1
        self._kept[: len(path)] += 1

    def expected(self, most: int) -> Floats:
        """Accepted tokens [most] of trees 1, 2, ... levels deep."""
        share, product, total, weight = _PRIOR, 1.0, 0.0, 1.0
        sums = []
        for tried, kept in zip(self._tried[:most].tolist(), self._kept[:most].tolist(), strict=True):
            share = (kept + weight * share) / (tried + weight)
            product *= share
            total += product
            sums.append(total)
            weight = _SMOOTH
        return np.asarray(sums)

    def shapes(self, most_rows: int, most_depth: int) -> Shapes:
        """See Acceptance."""
        rows = _sizes(min(most_rows, most_depth))
        return Shapes(rows, rows, self.expected(rows[-1])[np.asarray(rows) - 1])


class TreeAcceptance:
    """Of trees whose nodes come by descending likelihood, so that a smaller tree is a larger one's beginning.

    For each depth D, a verified tree at least that deep tells what its `limited(D, n)` would have given, for all n at
    once: node i (counted among those at most D deep) was on the path or not. The share r[D, i] of paths with node i is
    drawn towards c[D] / i, which also stands in for sizes never tried; c[D] is fitted to all i, and for a depth never
    tried it grows as acceptance by depth does. Expected accepted tokens: r[D, 1] + ... + r[D, n], at most D.
    """

    def __init__(self, most_depth: int) -> None:
        self._by_depth = ChainAcceptance()
        self._tried = np.zeros((most_depth, MOST_TREE_ROWS))
        self._kept = np.zeros((most_depth, MOST_TREE_ROWS))

    def observe(self, tree: TokenTree, path: Sequence[int]) -> None:
        """See Acceptance."""
        self._by_depth.observe(tree, path)
        self._tried *= _DECAY
        self._kept *= _DECAY
        depths = tree.depths[1:]
        on_path = np.zeros(depths.size)
        on_path[np.asarray(path, np.int64) - 1] = 1
        for depth in range(1, min(int(depths.max()), len(self._tried)) + 1):
            kept = on_path[depths <= depth]
            self._tried[depth - 1, : kept.size] += 1
            self._kept[depth - 1, : kept.size] += kept

    def shapes(self, most_rows: int, most_depth: int) -> Shapes:
        """See Acceptance."""
        rows, depths = _grid(most_rows, min(most_depth, len(self._tried)))
        reached = self._by_depth.expected(depths[-1]).tolist()
        kept, weight = self._kept.sum(axis=1).tolist(), (self._tried @ _INVERSE).tolist()
        scale, scales = _PRIOR, []
        for i in range(depths[-1]):
            if i:
                scale *= reached[i] / reached[i - 1]
            scale = (kept[i] + scale) / (weight[i] + 1)
            scales.append(scale)
        n = len(scales)
        shares = (self._kept[:n] + np.outer(scales, _INVERSE)) / (self._tried[:n] + 1)
        sums = shares.cumsum(axis=1)[np.asarray(depths) - 1, np.asarray(rows) - 1]
        return Shapes(rows, depths, np.minimum(sums, depths))


@cache
def _grid(most_rows: int, most_depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows and depths of all trees up to these, with at least as many rows as levels, by depth."""
    pairs = [(rows, depth) for depth in range(1, most_depth + 1) for rows in _sizes(most_rows) if rows >= depth]
    return tuple(rows for rows, _ in pairs), tuple(depth for _, depth in pairs)


@cache
def _sizes(most: int) -> tuple[int, ...]:
    """Of ROWS, and `most` itself."""
    most = min(most, MOST_TREE_ROWS)
    return (*(size for size in ROWS if size < most), most)
