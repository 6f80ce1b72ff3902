"""Which way of guessing a step takes, and who hears of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from edge.speculation.accept import Accepted
from edge.speculation.speculator import PLAIN, Choice, Limits, Speculation, Speculator, Way
from edge.speculation.tree import TokenTree

TOKENS = (5, 6, 7)
LIMITS = Limits(8, 4)


@dataclass
class Guesser:
    """Proposes a chain of its own token; notes what it is told."""

    token: int
    is_ready: bool = True
    heard: list[str] = field(default_factory=list)

    def follow(self, first: int, hidden: np.ndarray) -> None:
        self.heard.append(f"follow {first}")

    def ready(self, tokens: Sequence[int]) -> bool:
        return self.is_ready

    def propose(self, tokens: Sequence[int], pages: Sequence[int], length: int, limits: Limits) -> TokenTree:
        return TokenTree.chain([tokens[-1], *[self.token] * limits.rows])

    def skip(self) -> None:
        self.heard.append("skip")


@dataclass
class Promise:
    """A pace that always chooses the same."""

    choice: Choice
    heard: list[str] = field(default_factory=list)

    def beside(self, sequences: int) -> Promise:
        return self

    def choose(self, most_rows: int, most_depth: int) -> Choice:
        return self.choice

    def plain(self, seconds: float) -> None:
        self.heard.append("plain")

    def verified(self, tree: TokenTree, path: Sequence[int], seconds: float, draft_seconds: float = 0.0) -> None:
        self.heard.append(f"verified {len(tree) - 1}")


def make(*ways: tuple[Guesser, Promise]) -> Speculator:
    return Speculation("two", [Way(lambda g=guesser: g, pace) for guesser, pace in ways]).begin()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("gains", "ready", "chosen"),
    [
        ((1.4, 1.2), (True, True), 0),
        ((1.2, 1.4), (True, True), 1),
        ((1.2, 1.4), (True, False), 0),
        ((0.9, 0.95), (True, True), 1),
        ((None, 0.8), (True, True), 1),  # a probe, which promises less than a plain step
        ((0.8, None), (True, True), 0),
        ((None, None), (True, True), None),
        ((1.4, 1.2), (False, False), None),
    ],
)
def test_the_way_that_promises_most_is_taken(
    gains: tuple[float | None, ...], ready: tuple[bool, ...], chosen: int | None
) -> None:
    guessers = [Guesser(10 + i, is_ready) for i, is_ready in enumerate(ready)]
    paces = [Promise(PLAIN if gain is None else Choice(2 + i, 2 + i, gain)) for i, gain in enumerate(gains)]
    speculator = make(*zip(guessers, paces, strict=True))
    limits = speculator.choose(TOKENS, LIMITS)
    assert [guesser.heard for guesser in guessers] == [[] if i == chosen else ["skip"] for i in range(2)]
    if chosen is None:
        assert limits.rows == 0
        speculator.observe(TokenTree.chain(TOKENS[-1:]), Accepted((), (9,)), 1.0)
        assert [pace.heard for pace in paces] == [["plain"], ["plain"]]
        return
    assert limits == Limits(2 + chosen, 2 + chosen)
    tree = speculator.propose(TOKENS, [0], 3, limits)
    assert tree.tokens == (7, *[10 + chosen] * limits.rows)
    speculator.observe(tree, Accepted((1,), (10 + chosen, 9)), 1.0)
    assert [pace.heard for pace in paces] == [[f"verified {limits.rows}"] if i == chosen else [] for i in range(2)]
    assert speculator.statistics.steps == 1 and speculator.statistics.emitted == 2


@pytest.mark.parametrize("limits", [Limits(0, 3), Limits(3, 0)])
def test_where_nothing_fits_nothing_is_guessed(limits: Limits) -> None:
    guesser, pace = Guesser(1), Promise(Choice(2, 2, 2.0))
    assert make((guesser, pace)).choose(TOKENS, limits).rows == 0
    assert guesser.heard == ["skip"]


def test_all_follow_what_the_model_computes() -> None:
    guessers = [Guesser(1), Guesser(2)]
    speculator = make(*((guesser, Promise(PLAIN)) for guesser in guessers))
    speculator.follow(3, np.zeros((2, 4), np.float32))
    speculator.follow(5, None)
    assert [guesser.heard for guesser in guessers] == [["follow 3"], ["follow 3"]]
