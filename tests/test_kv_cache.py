"""Pages never leak and never mix sequences, whoever shares, publishes, adopts, evicts, saves and restores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from edge import published
from edge.errors import EdgeError
from edge.kv_cache import KVCache, NoPagesError, pages_for
from plugins import PAGE_TOKENS
from plugins.infllmv2.meaning import COARSE, FINE, compress, stored_windows, window_count
from plugins.paged_attention.meaning import append, gather

NUM_PAGES = 10
MOST = 6 * PAGE_TOKENS  # tokens of a sequence


class Pools:
    """An executor's pools with the real windows of InfLLM-V2: what is never written stays a number nobody expects."""

    def __init__(self, pages: int) -> None:
        self.kv = np.full((pages, 2, 1, PAGE_TOKENS, 2), -7, np.float32)
        self.c1 = np.full((pages, 1, 4, 2), -7, np.float32)
        self.c2 = np.full((pages, 1, 1, 2), -7, np.float32)

    def write(self, pages: Sequence[int], keys: np.ndarray, first: int) -> None:
        """Append `keys` [n, 2] at positions first.. of a sequence."""
        table, at = np.array(pages, int), np.arange(first, first + len(keys))
        append(self.kv, (keys[:, None], -keys[:, None]), table, at, None)
        compress(self.c1, self.kv, table, at, *FINE)
        compress(self.c2, self.kv, table, at, *COARSE)

    def read(self, pages: Sequence[int], length: int) -> tuple[np.ndarray, ...]:
        """Keys, values and both kinds of windows of a sequence of this length."""
        table = np.array(pages, int)
        windows = (
            stored_windows(pool, table, window_count(length, *kind))
            for pool, kind in ((self.c1, FINE), (self.c2, COARSE))
        )
        return (*gather(self.kv, table, length), *windows)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            for pool in (self.kv, self.c1, self.c2):
                pool[target] = pool[source]

    def save(self, pages: Sequence[int]) -> list[np.ndarray]:
        return [pool[list(pages)] for pool in (self.kv, self.c1, self.c2)]

    def load(self, pages: Sequence[int], data: list[np.ndarray]) -> None:
        for pool, values in zip((self.kv, self.c1, self.c2), data, strict=True):
            pool[list(pages)] = values


@dataclass(frozen=True)
class Token:
    """A token and how it is computed."""

    id: int
    mode: int


@dataclass
class Model:
    """What a sequence is: its tokens, all computed."""

    tokens: list[Token] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def keys(self) -> np.ndarray:
        """[tokens, 2]: like a model's, each depends on all tokens up to it, and on how they were computed."""
        state, keys = 1, np.empty((len(self.tokens), 2), np.float32)
        for row, token in zip(keys, self.tokens, strict=True):
            state = (state * 48271 + 17 * token.id + token.mode) % 2147483647
            row[:] = state % 251, state % 241  # small: sums of 128 are exact
        return keys

    def salt(self, index: int) -> bytes | None:
        """Of a page, None if it or an earlier one was computed in two ways."""
        modes = {token.mode for token in self.tokens[: (index + 1) * PAGE_TOKENS]}
        return bytes(modes) if len(modes) == 1 else None


runs_of_tokens = st.lists(st.tuples(st.integers(1, 2), st.sampled_from([1, 30, 64, 64, 100])), min_size=1, max_size=3)
modes = st.sampled_from([0, 0, 0, 1])
lengths = st.integers(0, MOST) | st.sampled_from([0, 64, 128, 192])


class CacheMachine(RuleBasedStateMachine):
    """Random use of one cache beside the tokens that each sequence must have."""

    sequences = Bundle("sequences")
    key = staticmethod(published.page_key)

    def __init__(self) -> None:
        super().__init__()
        published.page_key = self.key
        self.pools = Pools(NUM_PAGES)
        self.cache = KVCache(NUM_PAGES, self.pools.copy)
        self.models: dict[int, Model] = {}

    def teardown(self) -> None:
        for sequence in self.models:
            self.cache.close(sequence)
        assert self.cache.free_pages == NUM_PAGES
        published.page_key = CacheMachine.key

    def held(self) -> set[int]:
        return {page for sequence in self.models for page in self.cache.pages(sequence)}

    def reserve(self, sequence: int, tokens: int, written_from: int) -> bool:
        """Reserve if the pages for it are there, and make sure of a refusal that changes nothing if not."""
        pages = self.cache.pages(sequence)
        others = [set(self.cache.pages(other)) for other in self.models if other != sequence]
        shared = [page for page in pages[written_from // PAGE_TOKENS :] if any(page in other for other in others)]
        needed = max(0, pages_for(tokens) - len(pages)) + len(shared)
        free = NUM_PAGES - len(self.held())
        assert self.cache.free_pages == free
        if needed <= free:
            self.cache.reserve(sequence, tokens, written_from)
            return True
        with pytest.raises(EdgeError, match=f"{tokens} tokens need {needed} more KV pages .* and {free} are free"):
            self.cache.reserve(sequence, tokens, written_from)
        assert self.cache.pages(sequence) == pages
        return False

    @rule(target=sequences)
    def open(self) -> int:
        sequence = self.cache.open()
        assert sequence not in self.models
        self.models[sequence] = Model()
        return sequence

    def grow(self, sequence: int, tokens: list[Token]) -> None:
        """Compute tokens at the end of a sequence."""
        model = self.models[sequence]
        before = len(model.tokens)
        if before + len(tokens) > MOST or not self.reserve(sequence, before + len(tokens), before):
            return
        model.tokens += tokens
        self.pools.write(self.cache.pages(sequence), model.keys()[before:], before)

    @rule(sequence=sequences, runs=runs_of_tokens, mode=modes)
    def append(self, sequence: int, runs: list[tuple[int, int]], mode: int) -> None:
        self.grow(sequence, [Token(token, mode) for token, count in runs for _ in range(count)])

    @rule(sequence=sequences, tokens=lengths)
    def make_room(self, sequence: int, tokens: int) -> None:
        """More pages than are used, as for a burst on the device."""
        self.reserve(sequence, tokens, len(self.models[sequence].tokens))

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: int) -> int:
        fork = self.cache.fork(sequence)
        assert self.cache.pages(fork) == self.cache.pages(sequence)
        self.models[fork] = Model(list(self.models[sequence].tokens))
        return fork

    @rule(sequence=sequences, tokens=lengths)
    def truncate(self, sequence: int, tokens: int) -> None:
        before = self.cache.pages(sequence)
        self.cache.truncate(sequence, tokens)
        assert self.cache.pages(sequence) == before[: pages_for(tokens)]
        del self.models[sequence].tokens[tokens:]

    @rule(sequence=consumes(sequences))
    def close(self, sequence: int) -> None:
        self.cache.close(sequence)
        del self.models[sequence]
        with pytest.raises(KeyError):
            self.cache.pages(sequence)

    @rule(sequence=sequences)
    def publish(self, sequence: int) -> None:
        model = self.models[sequence]
        self.cache.publish(sequence, model.ids, len(model.tokens), model.salt)

    @rule(sequence=sequences, source=sequences, length=lengths, mode=modes, kept=lengths)
    def begin_anew(self, sequence: int, source: int, length: int, mode: int, kept: int) -> None:
        """A prompt like another sequence's, of which the first `kept` tokens are there already."""
        model, wanted = self.models[sequence], [Token(token.id, mode) for token in self.models[source].tokens[:length]]
        common = 0
        while common < min(kept, len(wanted), len(model.tokens)) and wanted[common] == model.tokens[common]:
            common += 1
        self.cache.truncate(sequence, common)
        del model.tokens[common:]
        ids = [token.id for token in wanted]
        found = self.cache.adopt(sequence, ids, lambda index: bytes([mode]), common)
        assert found == common or (found > common and found % PAGE_TOKENS == 0 and found <= len(ids))
        model.tokens = wanted[:found]
        self.grow(sequence, wanted[found:])

    @rule(sequence=sequences)
    def find_again(self, sequence: int) -> None:
        """What is published and held is found by the next one with the same tokens, and costs no page."""
        model = self.models[sequence]
        if not model.tokens or len({token.mode for token in model.tokens}) > 1 or type(self) is not CacheMachine:
            return
        self.publish(sequence)
        free, other = self.cache.free_pages, self.cache.open()
        found = self.cache.adopt(other, model.ids, lambda index: bytes([model.tokens[0].mode]))
        assert found == len(model.tokens) // PAGE_TOKENS * PAGE_TOKENS
        assert self.cache.pages(other) == self.cache.pages(sequence)[: found // PAGE_TOKENS]
        assert self.cache.free_pages == free
        self.cache.close(other)

    @rule(target=sequences, sequence=sequences)
    def save_and_restore(self, sequence: int) -> int:
        model, restored = self.models[sequence], self.open()
        count = pages_for(len(model.tokens))
        data = self.pools.save(self.cache.pages(sequence)[:count])
        if self.reserve(restored, len(model.tokens), 0):
            self.pools.load(self.cache.pages(restored), data)
            self.models[restored] = Model(list(model.tokens))
        return restored

    @invariant()
    def every_page_is_somewhere_once(self) -> None:
        cache, held = self.cache, self.held()
        assert cache.free_pages == NUM_PAGES - len(held)
        assert sorted([*cache._free, *cache._cached, *held]) == list(range(NUM_PAGES))
        counted = [sum(page in cache.pages(s) for s in self.models) for page in range(NUM_PAGES)]
        assert cache._holders == counted

    @invariant()
    def every_sequence_reads_what_it_computed(self) -> None:
        """Keys, values and averages are those of a cache of its own that never shared anything."""
        for sequence, model in self.models.items():
            length, own = len(model.tokens), Pools(MOST // PAGE_TOKENS)
            own.write(range(MOST // PAGE_TOKENS), model.keys(), 0)
            truth = own.read(range(MOST // PAGE_TOKENS), length)
            for got, wanted in zip(self.pools.read(self.cache.pages(sequence), length), truth, strict=True):
                np.testing.assert_array_equal(got, wanted)


class SmallHashMachine(CacheMachine):
    """With a hash of eight values: some pages are published, and many are not."""

    key = staticmethod(lambda parent, ids, salt: bytes([sum(parent + ids + salt) % 8]))


STEPS = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestCache, TestSmallHash = CacheMachine.TestCase, SmallHashMachine.TestCase
TestCache.settings = TestSmallHash.settings = STEPS


def salted(salt: bytes) -> Callable[[int], bytes]:
    return lambda index: salt


def test_pages_are_evicted_leaves_first_and_least_recently_used_first() -> None:
    cache = KVCache(6)
    prompts = {name: [token] * 192 for token, name in enumerate("ab")}
    for ids in prompts.values():
        sequence = cache.open()
        cache.reserve(sequence, 192)
        cache.publish(sequence, ids, 192, salted(b""))
        cache.close(sequence)
    assert (cache.free_pages, cache.cached_pages) == (6, 6)
    again = cache.open()
    assert cache.adopt(again, prompts["a"], salted(b"")) == 192  # a is now the last one used
    cache.close(again)

    def left(ids: list[int]) -> int:
        sequence = cache.open()
        found = cache.adopt(sequence, ids, salted(b""))
        cache.close(sequence)
        return found

    for pages, of_b, of_a in [(1, 128, 192), (2, 64, 192), (4, 0, 128), (6, 0, 0)]:
        sequence = cache.open()
        cache.reserve(sequence, pages * PAGE_TOKENS)
        cache.close(sequence)
        assert (left(prompts["b"]), left(prompts["a"])) == (of_b, of_a)


def test_a_hash_alone_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "page_key", lambda parent, ids, salt: b"the same for all")
    cache = KVCache(4)
    sequence = cache.open()
    cache.reserve(sequence, 128)
    cache.publish(sequence, [1] * 128, 128, salted(b"a"))
    assert cache.adopt(cache.open(), [2] * 64, salted(b"a")) == 0
    assert cache.adopt(cache.open(), [1] * 64, salted(b"b")) == 0
    assert cache.adopt(cache.open(), [1] * 128, salted(b"a")) == 64  # the second page's key was taken


def test_a_copy_that_fails_changes_nothing() -> None:
    def fail(pairs: Sequence[tuple[int, int]]) -> None:
        raise KeyboardInterrupt

    cache = KVCache(4, fail)
    sequence = cache.open()
    cache.reserve(sequence, 100)
    fork = cache.fork(sequence)
    with pytest.raises(KeyboardInterrupt):
        cache.reserve(fork, 101, 100)
    assert cache.pages(fork) == cache.pages(sequence) and cache.free_pages == 2
    with pytest.raises(NoPagesError, match="256 tokens need 3 more KV pages of 64 tokens and 2 are free"):
        cache.reserve(fork, 256, 100)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages
