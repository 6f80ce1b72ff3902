"""What prompt lookup would have achieved while it is off: proposals cost nothing, and the text tells if they held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edge.speculation.lookup import NgramLookup
from edge.speculation.tree import TokenTree

_LENGTH = 8  # tokens of a proposal: enough to tell copying from prose


class Unverified(Protocol):
    """Whom a shadow tells (edge/speculation/adaptive.py: Pace)."""

    def unverified(self, tree: TokenTree, path: Sequence[int]) -> None:
        """Of a tree that was not verified the nodes `path` would have been accepted."""
        ...


class Shadow:
    """Proposals of a lookup that are not verified but compared with the tokens that come, for a pace that is off.

    Copying is noticed some tokens after it begins, where trying it out would have to wait for what the tax allows.
    """

    def __init__(self, lookup: NgramLookup, pace: Unverified) -> None:
        self._lookup = lookup
        self._pace = pace
        self._proposal: list[int] = []
        self._length = 0  # tokens in the lookup when the proposal was made

    def follow(self) -> None:
        """The lookup has taken in the tokens of another step: judge the proposal if they decide it, make the next."""
        if self._proposal:
            came = self._lookup.since(self._length)[: len(self._proposal)] if self._length < len(self._lookup) else []
            right = next((i for i, (a, b) in enumerate(zip(self._proposal, came, strict=False)) if a != b), len(came))
            if right == len(came) < len(self._proposal):
                return
            self._pace.unverified(TokenTree.chain([0, *self._proposal]), range(1, right + 1))
        self._proposal = self._lookup.propose(_LENGTH)
        self._length = len(self._lookup)

    def reset(self) -> None:
        """Forget the proposal: the sequence was truncated, or a tree was verified instead."""
        self._proposal = []
