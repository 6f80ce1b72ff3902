"""How much to verify next: what emits most tokens a second by what was measured, and nothing where nothing pays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge.speculation.acceptance import Acceptance, Shapes
from edge.speculation.costs import Costs
from edge.speculation.speculator import PLAIN, Choice
from edge.speculation.tree import TokenTree

WORTH = 1.03  # expected tokens a second, relative to plain decoding, from which on trees are verified
TAX = 0.02  # of the time, which looking for a better choice may cost
_START = 3.0  # plain steps' time that may be lost before anything was gained
_SAVINGS = 16.0  # plain steps' time, gained before, that may be lost again
_FIRST = 4  # trees verified at once to learn what they cost, each as large as the ledger bears
_BACKOFF = 3  # the share of the tax that goes to probes is the promised gain to this power
_EXPLORE = 16  # verified trees between two of another size than the best
_STALE = 512  # verified trees after which a size counts as unknown
_PLAIN_EVERY = 128  # verified trees after which a plain step is measured again


class Pace:
    """Chooses how many tree rows and levels to verify next, from the seconds and acceptances it is told.

    A tree of `rows` rows and `depth` levels emits 1 + accepted tokens in the time of drafting it and of a step of
    1 + rows rows; a plain step emits 1. The tree with the most tokens a second is taken if it promises WORTH times
    plain decoding. A ledger, in plain steps' time, holds what was gained over plain decoding so far (within limits)
    plus TAX of the time: no tree is verified whose loss, if nothing of it were accepted, the ledger could not bear. So
    decoding is not slower than plain by more than the tax and the start, however acceptance is estimated; what a size
    costs before it was measured, and stalls, come on top.

    While nothing pays, a tree is verified as often as the tax allows, and the less it promises the more rarely. One
    that pays is followed by the next at once. There is no clock: equal calls give equal choices.
    """

    def __init__(self, acceptance: Acceptance, costs: Costs | None = None) -> None:
        self._acceptance = acceptance
        self._beside: dict[int, Pace] = {}
        self.costs = Costs() if costs is None else costs
        self._ledger = _START
        self._since_probe = np.inf  # steps since the last verified tree
        self._since_plain = 0  # trees since the last plain step
        self._verified = 0

    def beside(self, sequences: int) -> Pace:
        """The pace of steps of so many sequences, each with a tree: for 2, for up to 4, 8 and so on there is one.

        What is accepted does not depend on how many there are; what rows cost does.
        """
        if sequences == 1:
            return self
        return self._beside.setdefault((sequences - 1).bit_length(), Pace(self._acceptance))

    def plain(self, seconds: float) -> None:
        """A plain step took this long."""
        self.costs.observe_step(1, seconds)
        self._ledger = min(self._ledger + TAX, _SAVINGS)
        self._since_probe += 1
        self._since_plain = 0

    def verified(self, tree: TokenTree, path: Sequence[int], seconds: float, draft_seconds: float = 0.0) -> None:
        """Of a tree the nodes `path` were accepted; the step took `seconds`, proposing the tree `draft_seconds`.

        The tree has at least one node below its root, and there was a plain step before.
        """
        depth = int(tree.depths.max())
        charged = self.costs.observe_step(len(tree), seconds) + self.costs.observe_draft(depth, draft_seconds)
        self._acceptance.observe(tree, path)
        gained = 1 + len(path) - charged / self.costs.plain
        self._ledger = min(self._ledger + gained + TAX, _SAVINGS)
        self._since_probe = np.inf if gained > 0 else 0
        self._since_plain += 1
        self._verified += 1

    def unverified(self, tree: TokenTree, path: Sequence[int]) -> None:
        """Of a tree that was not verified the nodes `path` would have been accepted, as later tokens showed."""
        self._acceptance.observe(tree, path)

    def choose(self, most_rows: int, most_depth: int) -> Choice:
        """What to verify next, of at most so many rows and levels."""
        if min(most_rows, most_depth) < 1 or self.costs.plain_steps < 2 or self._since_plain >= _PLAIN_EVERY:
            return PLAIN
        shapes = self._acceptance.shapes(min(most_rows, self.costs.trusted_rows), most_depth)
        cost = self.costs.relative([rows + 1 for rows in shapes.rows], shapes.depths)
        gain = np.where(cost - 1 <= self._ledger, (1 + shapes.expected) / cost, 0)
        best = int(gain.argmax())
        if gain[best] == 0:
            return PLAIN
        if self._verified < _FIRST:
            # Sizes that differ: from one alone nobody can tell what is rows and what is another kernel.
            best = max(range(gain.size), key=lambda i: (gain[i] > 0, shapes.rows[i], gain[i]))
        elif gain[best] >= WORTH:
            if self._verified % _EXPLORE == _EXPLORE - 1:
                best = self._unknown(shapes, gain, best)
        elif self._since_probe * TAX * gain[best] ** _BACKOFF < cost[best] - 1:
            return PLAIN
        return Choice(shapes.rows[best], shapes.depths[best], float(gain[best]))

    def _unknown(self, shapes: Shapes, gain: np.ndarray, best: int) -> int:
        """The most promising tree of a size not measured lately, if there is one not much worse than the best."""
        age = np.asarray([self.costs.age(rows + 1) for rows in shapes.rows])
        other = int(np.where(age > _STALE, gain, 0).argmax())
        return other if gain[other] > 0.8 * gain[best] and age[other] > _STALE else best
