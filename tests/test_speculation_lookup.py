"""Prompt lookup against a search through the whole text, over random edits."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge.speculation.lookup import NgramLookup


def reference(text: Sequence[int], most: int, longest: int = 4, shortest: int = 2) -> list[int]:
    """By trying every length and every place."""
    text = list(text)
    for n in range(longest, shortest - 1, -1):
        places = [end for end in range(n, len(text)) if text[end - n : end] == text[len(text) - n :]]
        if not places or most < 1:
            continue
        full = [end for end in places if len(text) - end >= most]
        start = full[-1] if full else places[-1]
        for i in range(most):
            text.append(text[start + i])
        return text[len(text) - most :]
    return []


class Edits(RuleBasedStateMachine):
    """Appending in pieces and taking back, as replies, rollbacks and new turns do."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = NgramLookup()
        self.text: list[int] = []

    @rule(tokens=st.lists(st.integers(0, 2), max_size=40))
    def extend(self, tokens: list[int]) -> None:
        self.lookup.extend(tokens)
        self.text += tokens

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=3), times=st.integers(2, 100))
    def repeat(self, tokens: list[int], times: int) -> None:
        self.lookup.extend(tokens * times)
        self.text += tokens * times

    @rule(share=st.floats(0, 1))
    def truncate(self, share: float) -> None:
        length = int(share * len(self.text))
        self.lookup.truncate(length)
        del self.text[length:]

    @invariant()
    def agrees(self) -> None:
        assert len(self.lookup) == len(self.text)
        for most in (1, 3, 10):
            assert self.lookup.propose(most) == reference(self.text, most)


TestEdits = Edits.TestCase
TestEdits.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)


@settings(max_examples=200)
@given(
    text=st.lists(st.integers(0, 3), max_size=80),
    most=st.integers(-1, 70),
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted),
)
def test_equals_a_search_through_the_text(text: list[int], most: int, lengths: list[int]) -> None:
    lookup = NgramLookup(longest=lengths[1], shortest=lengths[0])
    lookup.extend(text)
    assert lookup.propose(most) == reference(text, most, lengths[1], lengths[0])


@pytest.mark.parametrize("n", [2, 4, 20])
def test_a_prompt_at_once_is_indexed_as_token_by_token(n: int) -> None:
    text = np.random.default_rng(n).zipf(1.2, 3000) % 70_000
    text[1500:] = text[:1500]
    whole, single = NgramLookup(n, n), NgramLookup(n, n)
    for begin, end in ((0, 18), (18, 300), (300, 3000)):
        whole.extend(text[begin:end].tolist())
        for token in text[begin:end].tolist():
            single.extend([token])
        assert len(whole._indexes[0]._links) == end
        assert whole._indexes[0]._heads == single._indexes[0]._heads
        assert whole._indexes[0]._links == single._indexes[0]._links
        assert whole.propose(7) == single.propose(7) == reference(text[:end], 7, n, n)


def test_what_is_preferred() -> None:
    lookup = NgramLookup()
    lookup.extend([1, 2, 3, 4, 10, 11, 12, 13, 9, 2, 3, 4, 20, 9, 1, 2, 3, 4])
    assert lookup.propose(3) == [10, 11, 12], "four tokens match at the beginning, three nearer"
    lookup.truncate(14)
    lookup.extend([5, 2, 3, 4])
    assert lookup.propose(3) == [20, 9, 5], "the nearer of two equal matches"
    assert lookup.propose(12)[:4] == [10, 11, 12, 13], "the nearer is too short"


def test_text_of_a_short_period_goes_on() -> None:
    lookup = NgramLookup()
    lookup.extend([7, 8, 1, 2, 3, 1, 2, 3])
    assert lookup.propose(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    lookup.truncate(6)
    assert lookup.propose(8) == [], "one token alone is no n-gram"


def test_a_length_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be truncated"):
        NgramLookup().truncate(1)
    with pytest.raises(ValueError, match="shortest first"):
        NgramLookup(longest=2, shortest=3)


@pytest.mark.parametrize("text", [[5] * 60_000, list(range(60_000))], ids=["one token", "no repetition"])
def test_memory_is_linear_and_nothing_is_searched(text: list[int]) -> None:
    lookup = NgramLookup()
    lookup.extend(text)
    for index in lookup._indexes:
        assert sum(len(a) * a.itemsize for a in (index._heads, index._links)) <= 12 * len(text)
    begin = time.perf_counter()
    for _ in range(100):
        assert len(lookup.propose(64)) == (64 if text[1] == 5 else 0)
    assert time.perf_counter() - begin < 0.5, "some 60 steps of a chain each, not 60000"
