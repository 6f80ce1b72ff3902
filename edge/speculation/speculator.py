"""What an engine asks: propose a tree, now that these tokens are known, and learn what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np

from edge.speculation.accept import Accepted
from edge.speculation.draft import Draft
from edge.speculation.lookup import NgramLookup
from edge.speculation.shadow import Shadow, Unverified
from edge.speculation.statistics import Speculated
from edge.speculation.tree import TokenTree


@dataclass(frozen=True)
class Limits:
    """Of a tree: rows of a step, which are its nodes without the root, and tokens of a path below the root."""

    rows: int
    depth: int


class Drafter(Protocol):
    """Guesses how one reply goes on."""

    def follow(self, first: int, hidden: np.ndarray) -> None:
        """The model has computed the tokens from `first` on; hidden [n, H] is its final norm's output."""
        ...

    def propose(self, tokens: Sequence[int], pages: Sequence[int], length: int, limits: Limits) -> TokenTree | None:
        """A tree below the last of `tokens`, or nothing.

        pages: the sequence's, with room for limits.rows more tokens, and for more where there is. length: as a step's
        switch_length.
        """
        ...

    def skip(self, tokens: Sequence[int]) -> None:
        """No tree is wanted below the last of `tokens`."""
        ...


class Pace(Protocol):
    """Decides how much is worth verifying (edge/speculation/adaptive.py)."""

    def choose(self, most_rows: int, most_depth: int) -> tuple[int, int]:
        """Tree rows and levels to verify next, at most these; (0, 0) is a plain step."""
        ...

    def plain(self, seconds: float) -> None:
        """A plain step took this long."""
        ...

    def verified(self, tree: TokenTree, path: Sequence[int], seconds: float, draft_seconds: float = 0.0) -> None:
        """Of a tree the nodes `path` were accepted; the step took `seconds`, proposing the tree `draft_seconds`."""
        ...

    def beside(self, sequences: int) -> Pace:
        """The pace of steps of so many sequences, which knows what they cost."""
        ...


class LookupDrafter:
    """Proposes what followed the last time: needs no model. While it is not asked, `pace` hears what it would say."""

    def __init__(self, pace: Unverified) -> None:
        self._lookup = NgramLookup()
        self._shadow = Shadow(self._lookup, pace)

    def follow(self, first: int, hidden: np.ndarray) -> None:
        """Nothing: the tokens are enough."""

    def propose(self, tokens: Sequence[int], pages: Sequence[int], length: int, limits: Limits) -> TokenTree | None:
        """A chain; see `Drafter`."""
        self._lookup.extend(tokens[len(self._lookup) :])
        found = self._lookup.propose(min(limits.rows, limits.depth))
        if not found:
            self._shadow.follow()
            return None
        self._shadow.reset()
        return TokenTree.chain([tokens[-1], *found])

    def skip(self, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        self._lookup.extend(tokens[len(self._lookup) :])
        self._shadow.follow()


@dataclass(frozen=True)
class Speculation:
    """Of an engine: makes each reply its drafter; the pace is learnt across replies.

    draft: the draft model, if there is one. slots: how many after a sequence's last token its drafter works in.
    """

    name: str
    make_drafter: Callable[[], Drafter]
    pace: Pace
    draft: Draft | None = None
    slots: int = 0
    totals: Speculated = field(default_factory=Speculated)

    def describe(self) -> str:
        """For reports."""
        done = self.totals
        if not done.steps:
            return f"{self.name}, nothing verified yet"
        share = done.accepted / done.proposed
        return f"{self.name}, {done.mean_accept_length:.2f} tokens a verified step, {share:.0%} of proposals accepted"

    def begin(self) -> Speculator:
        """For one reply."""
        return Speculator(self.make_drafter(), self.pace, self.totals, self.slots)


class Speculator:
    """Proposals of one reply, as large as they pay. slots: see Speculation."""

    def __init__(self, drafter: Drafter, pace: Pace, totals: Speculated, slots: int) -> None:
        self.statistics = Speculated()
        self.slots = slots
        self._drafter, self._pace, self._totals = drafter, pace, totals
        self._alone = pace
        self._draft_seconds = 0.0

    def beside(self, sequences: int) -> None:
        """The next step has so many sequences, this one among them."""
        self._pace = self._alone.beside(sequences)

    def follow(self, first: int, hidden: np.ndarray | None) -> None:
        """See `Drafter.follow`; hidden is None where there is no draft model."""
        if hidden is not None:
            self._drafter.follow(first, hidden)

    def choose(self, tokens: Sequence[int], limits: Limits) -> Limits:
        """The tree below the last of `tokens` that is worth its cost; of no rows if none is."""
        chosen = Limits(*self._pace.choose(limits.rows, limits.depth))
        if not chosen.rows:
            self._drafter.skip(tokens)
        return chosen

    def propose(self, tokens: Sequence[int], pages: Sequence[int], length: int, limits: Limits) -> TokenTree | None:
        """A tree as `choose` said; see `Drafter.propose`."""
        started = perf_counter()
        tree = self._drafter.propose(tokens, pages, length, limits)
        self._draft_seconds = perf_counter() - started
        return tree

    def observe(self, tree: TokenTree, accepted: Accepted, step_seconds: float | None) -> None:
        """What the last proposal, or a plain step, came to. None: the step's time does not tell what this one cost."""
        if len(tree) == 1:
            if step_seconds is not None:
                self._pace.plain(step_seconds)
            return
        if step_seconds is not None:
            self._pace.verified(tree, accepted.path, step_seconds, self._draft_seconds)
        for statistics in (self.statistics, self._totals):
            statistics.add(len(tree) - 1, len(accepted.tokens), self._draft_seconds)
