"""What an engine asks: propose a tree, now that these tokens are known, and learn what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple, Protocol

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

    def ready(self, tokens: Sequence[int]) -> bool:
        """Whether it can guess what follows the last of `tokens`; they only grow."""
        ...

    def propose(self, tokens: Sequence[int], pages: Sequence[int], length: int, limits: Limits) -> TokenTree:
        """A tree below the last of `tokens`, for which it is ready.

        pages: the sequence's, with room for limits.rows more tokens, and for more where there is. length: as a step's
        switch_length.
        """
        ...

    def skip(self) -> None:
        """No tree of it is wanted below the last of those tokens."""
        ...


class Choice(NamedTuple):
    """Tree rows and levels to verify, and the tokens a second that this promises, relative to plain decoding.

    No rows are a plain step.
    """

    rows: int
    depth: int
    gain: float


PLAIN = Choice(0, 0, 1.0)


class Pace(Protocol):
    """Decides how much is worth verifying (edge/speculation/adaptive.py)."""

    def choose(self, most_rows: int, most_depth: int) -> Choice:
        """What to verify next, of at most so many rows and levels."""
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
    """Proposes what followed the last time: needs no model. While it is not asked, `pace` hears what it would say.

    shortest: tokens that must have occurred before.
    """

    def __init__(self, pace: Unverified, shortest: int = 2) -> None:
        self._lookup = NgramLookup(shortest=shortest)
        self._shadow = Shadow(self._lookup, pace)

    def follow(self, first: int, hidden: np.ndarray) -> None:
        """Nothing: the tokens are enough."""

    def ready(self, tokens: Sequence[int]) -> bool:
        """See `Drafter`."""
        self._lookup.extend(tokens[len(self._lookup) :])
        return bool(self._lookup.propose(1))

    def propose(self, tokens: Sequence[int], pages: Sequence[int], length: int, limits: Limits) -> TokenTree:
        """A chain; see `Drafter`."""
        self._shadow.reset()
        return TokenTree.chain([tokens[-1], *self._lookup.propose(min(limits.rows, limits.depth))])

    def skip(self) -> None:
        """See `Drafter`."""
        self._shadow.follow()


@dataclass(frozen=True)
class Way:
    """A way of guessing: makes each reply its drafter; the pace is learnt across replies."""

    make_drafter: Callable[[], Drafter]
    pace: Pace


@dataclass(frozen=True)
class Speculation:
    """Of an engine: its ways of guessing, of which each step takes the one that promises most.

    draft: the draft model, if there is one. slots: how many after a sequence's last token its drafters work in.
    """

    name: str
    ways: Sequence[Way]
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
        return Speculator(self)


class Speculator:
    """Proposals of one reply, each by the way that promises most, and as large as it pays."""

    def __init__(self, speculation: Speculation) -> None:
        self.statistics = Speculated()
        self.slots = speculation.slots
        self._totals = speculation.totals
        self._drafters = [way.make_drafter() for way in speculation.ways]
        self._alone = self._paces = [way.pace for way in speculation.ways]
        self._chosen = 0  # the way of the last tree
        self._draft_seconds = 0.0

    def beside(self, sequences: int) -> None:
        """The next step has so many sequences, this one among them."""
        self._paces = [pace.beside(sequences) for pace in self._alone]

    def follow(self, first: int, hidden: np.ndarray | None) -> None:
        """See `Drafter.follow`; hidden is None where there is no draft model."""
        if hidden is not None:
            for drafter in self._drafters:
                drafter.follow(first, hidden)

    def choose(self, tokens: Sequence[int], limits: Limits) -> Limits:
        """The tree below the last of `tokens` that is worth its cost; of no rows if none is."""
        choices = [
            pace.choose(limits.rows, limits.depth)
            if drafter.ready(tokens) and min(limits.rows, limits.depth) > 0
            else PLAIN
            for drafter, pace in zip(self._drafters, self._paces, strict=True)
        ]
        self._chosen = max(range(len(choices)), key=lambda way: (choices[way].rows > 0, choices[way].gain))
        best = choices[self._chosen]
        for way, drafter in enumerate(self._drafters):
            if not best.rows or way != self._chosen:
                drafter.skip()
        return Limits(best.rows, best.depth)

    def propose(self, tokens: Sequence[int], pages: Sequence[int], length: int, limits: Limits) -> TokenTree:
        """A tree as `choose` said, below the same tokens; see `Drafter.propose`."""
        started = perf_counter()
        tree = self._drafters[self._chosen].propose(tokens, pages, length, limits)
        self._draft_seconds = perf_counter() - started
        return tree

    def observe(self, tree: TokenTree, accepted: Accepted, step_seconds: float | None) -> None:
        """What the last proposal, or a plain step, came to. None: the step's time does not tell what this one cost."""
        if len(tree) == 1:
            if step_seconds is not None:
                for pace in self._paces:
                    pace.plain(step_seconds)
            return
        if step_seconds is not None:
            self._paces[self._chosen].verified(tree, accepted.path, step_seconds, self._draft_seconds)
        for statistics in (self.statistics, self._totals):
            statistics.add(len(tree) - 1, len(accepted.tokens), self._draft_seconds, int(tree.depths.max()))
