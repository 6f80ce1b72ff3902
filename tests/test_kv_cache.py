"""Pages never leak, never belong to two sequences, and are taken all or none."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from edge.errors import EdgeError
from edge.kv_cache import KVCache, pages_for
from plugins import PAGE_TOKENS

NUM_PAGES = 12


class CacheMachine(RuleBasedStateMachine):
    """Random use of one cache beside a plain model of it: {sequence: number of pages}."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(NUM_PAGES)
        self.counts: dict[int, int] = {}

    @rule(target=sequences)
    def open(self) -> int:
        sequence = self.cache.open()
        assert sequence not in self.counts
        self.counts[sequence] = 0
        return sequence

    @rule(sequence=sequences, tokens=st.integers(0, 6 * PAGE_TOKENS))
    def reserve(self, sequence: int, tokens: int) -> None:
        before = self.cache.pages(sequence)
        wanted = max(pages_for(tokens), len(before))
        if wanted - len(before) > self.cache.free_pages:
            with pytest.raises(EdgeError, match=f"{tokens} tokens need {wanted - len(before)} more KV pages"):
                self.cache.reserve(sequence, tokens)
            wanted = len(before)
        else:
            self.cache.reserve(sequence, tokens)
        assert self.cache.pages(sequence)[: len(before)] == before
        self.counts[sequence] = wanted

    @rule(sequence=sequences, tokens=st.integers(0, 6 * PAGE_TOKENS))
    def truncate(self, sequence: int, tokens: int) -> None:
        before = self.cache.pages(sequence)
        self.cache.truncate(sequence, tokens)
        self.counts[sequence] = min(pages_for(tokens), len(before))
        assert self.cache.pages(sequence) == before[: self.counts[sequence]]

    @rule(sequence=consumes(sequences))
    def close(self, sequence: int) -> None:
        self.cache.close(sequence)
        del self.counts[sequence]
        with pytest.raises(KeyError):
            self.cache.pages(sequence)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        owned = [page for sequence in self.counts for page in self.cache.pages(sequence)]
        assert len(owned) == len(set(owned)) == sum(self.counts.values())
        assert set(owned) <= set(range(NUM_PAGES))
        assert self.cache.free_pages == NUM_PAGES - len(owned)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages
