"""The page cache against a plain model of it: who is in a slot, who leaves, what must be saved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge.errors import EdgeError
from edge.page_cache import NO_SLOT, Move, PageCache, PageCounts, split_rows

PAGES, SLOTS = 12, 5
some_pages = st.lists(st.integers(0, PAGES - 1), max_size=SLOTS + 1, unique=True)


class PageCacheMachine(RuleBasedStateMachine):
    """A cache beside memory that moves as it says: a version for each page, on the host and in each slot.

    `recent`: pages in slots, the one used longest ago first; `ahead`: those that were prefetched and not wanted since.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache = PageCache(PAGES, SLOTS)
        self.newest = dict.fromkeys(range(PAGES), 0)
        self.host = dict(self.newest)
        self.slots: list[tuple[int, int] | None] = [None] * SLOTS  # (page, version)
        self.recent: list[int] = []
        self.pinned: set[int] = set()
        self.ahead: set[int] = set()
        self.counts = PageCounts()

    def follow(self, moves: list[Move], wanted: set[int]) -> None:
        """Do what the moves say; each takes the place that the plain rule gives it."""
        for move in moves:
            there = self.slots[move.slot]
            if there is not None:
                old, version = there
                assert len(self.recent) == SLOTS, "a page left though a slot was free"
                assert old == next(p for p in self.recent if p not in self.pinned | wanted), "not the least recent one"
                assert move.evicted == (old if version != self.host[old] else None)
                if move.evicted is not None:
                    self.host[old] = version
                    self.counts += PageCounts(saved=1)
                self.recent.remove(old)
                self.ahead.discard(old)
            else:
                assert move.evicted is None
            self.slots[move.slot] = (move.page, self.host[move.page] if move.load else -1)
            self.recent.append(move.page)

    @rule(pages=some_pages, data=st.data())
    def place(self, pages: list[int], data: st.DataObject) -> None:
        wanted = set(pages)
        fresh = data.draw(st.sets(st.sampled_from(pages))) if pages else set()
        missing = [page for page in pages if page not in self.recent]
        before = self.cache.slot_of.copy()
        staying = {page for page in self.recent if page in self.pinned | wanted}
        if len(missing) > SLOTS - len(staying):
            with pytest.raises(EdgeError, match=rf"{len(pages)} KV pages are needed at once beside"):
                self.cache.place(pages, fresh)
            assert np.array_equal(self.cache.slot_of, before)  # nothing has moved that was not said
            for page in pages:
                self.touch(page)
            return
        moves = self.cache.place(pages, fresh)
        assert [(move.page, move.load) for move in moves] == [(page, page not in fresh) for page in missing]
        for page in pages:
            self.touch(page)
        self.counts += PageCounts(misses=sum(page not in fresh for page in missing))
        self.follow(moves, wanted)
        for page in fresh & set(missing):  # it is written from its start, which is why it was not loaded
            self.write(page)

    def touch(self, page: int) -> None:
        if page in self.recent:
            self.recent.remove(page)
            self.recent.append(page)
            self.counts += PageCounts(hits=1, useful=int(page in self.ahead))
            self.ahead.discard(page)

    @rule(pages=some_pages)
    def prefetch(self, pages: list[int]) -> None:
        missing = [page for page in pages if page not in self.recent]
        staying = [page for page in self.recent if page in self.pinned | set(pages)]
        moves = self.cache.prefetch(pages)
        assert [move.page for move in moves] == missing[: SLOTS - len(staying)]
        assert all(move.load for move in moves)
        self.follow(moves, set(pages))
        self.ahead.update(move.page for move in moves)
        self.counts += PageCounts(prefetched=len(moves))

    @rule(pages=some_pages)
    def pin(self, pages: list[int]) -> None:
        self.pinned = set(pages)
        self.cache.pin(pages)

    @rule(pages=some_pages)
    def flush(self, pages: list[int]) -> None:
        dirty = [page for page in pages if self.newest[page] != self.host[page]]
        saved = self.cache.flush(pages)
        assert [page for page, _ in saved] == dirty
        for page, slot in saved:
            there = self.slots[slot]
            assert there is not None and there[0] == page
            self.host[page] = there[1]
        self.counts += PageCounts(saved=len(saved))

    @rule(pages=some_pages)
    def drop(self, pages: list[int]) -> None:
        """The host's values become the newest."""
        before = self.cache.slot_of.copy()
        self.cache.drop(pages)
        for page in pages:
            self.newest[page] += 1
            self.host[page] = self.newest[page]
            if page in self.recent:
                self.slots[before[page]] = None
                self.recent.remove(page)
                self.ahead.discard(page)

    @precondition(lambda self: self.recent)
    @rule(data=st.data())
    def write_one(self, data: st.DataObject) -> None:
        self.write(data.draw(st.sampled_from(self.recent)))

    def write(self, page: int) -> None:
        self.newest[page] += 1
        self.slots[self.cache.slot_of[page]] = (page, self.newest[page])
        self.cache.wrote([page])

    @invariant()
    def every_page_in_a_slot_has_its_newest_values(self) -> None:
        places = {page: slot for page, slot in enumerate(self.cache.slot_of.tolist()) if slot != NO_SLOT}
        assert sorted(places) == sorted(self.recent) and len(set(places.values())) == len(places)
        for page, slot in places.items():
            assert self.slots[slot] == (page, self.newest[page])

    @invariant()
    def a_page_in_no_slot_is_whole_on_the_host(self) -> None:
        for page in set(range(PAGES)) - set(self.recent):
            assert self.host[page] == self.newest[page]

    @invariant()
    def counted(self) -> None:
        assert self.cache.counts == self.counts


TestPageCache = PageCacheMachine.TestCase
TestPageCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_runs_are_as_long_as_the_room_allows(data: st.DataObject) -> None:
    rows, pages = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 10))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * pages, max_size=rows * pages))
    needs, room = np.array(bits).reshape(rows, pages), data.draw(st.integers(0, pages))
    widest = int(needs.sum(axis=1).max())
    if widest > room:
        with pytest.raises(EdgeError, match=rf"a token needs \d+ KV pages at once and the device has room for {room}"):
            list(split_rows(needs, room))
        return
    runs = list(split_rows(needs, room))
    assert [row for run in runs for row in run] == list(range(rows))
    for run in runs:
        assert needs[run.start : run.stop].any(axis=0).sum() <= room
        assert run.stop == rows or needs[run.start : run.stop + 1].any(axis=0).sum() > room
