"""Which KV pages of one layer are in its few slots on the device. Knows nothing of memory, streams or devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import astuple, dataclass
from itertools import islice

import numpy as np

from edge.errors import EdgeError

NO_SLOT = -1


@dataclass(frozen=True)
class Move:
    """What a page's way into a slot takes: first save `evicted`, whose newest values only the slot has, then load.

    load: False if the page is about to be written from its first token on, so that nothing of it is needed.
    """

    page: int
    slot: int
    load: bool = True
    evicted: int | None = None


@dataclass(frozen=True)
class PageCounts:
    """Pages that were wanted and there (hits), or had to be loaded first (misses); loaded ahead of need (prefetched),
    and how many of those were wanted before they had to go (useful); written back to the host (saved).
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    useful: int = 0
    saved: int = 0

    def __add__(self, other: PageCounts) -> PageCounts:
        return PageCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class PageCache:
    """`slots` slots for some of `pages` pages: pinned ones stay, of the others those used least recently leave.

    slot_of [pages] int32 has each page's slot, or NO_SLOT.
    """

    def __init__(self, pages: int, slots: int) -> None:
        self.slots = slots
        self.slot_of = np.full(pages, NO_SLOT, np.int32)
        self._pinned: frozenset[int] = frozenset()
        self._used: dict[int, None] = {}  # pages in slots, least recently used first
        self._free = list(range(slots - 1, -1, -1))
        self._dirty: set[int] = set()
        self._ahead: set[int] = set()  # prefetched and not wanted yet
        self._counts = dict.fromkeys(("hits", "misses", "prefetched", "useful", "saved"), 0)

    @property
    def counts(self) -> PageCounts:
        """Since the start."""
        return PageCounts(**self._counts)

    def pin(self, pages: Collection[int]) -> None:
        """From now on these pages, and only these, stay once they are in a slot."""
        self._pinned = frozenset(pages)

    def place(self, pages: Iterable[int], fresh: Collection[int] = ()) -> list[Move]:
        """Give each of `pages` a slot, all at the same time; EdgeError if they and the pinned ones are too many.

        fresh: those that will be written from their first token on.
        """
        wanted = dict.fromkeys(pages)
        missing = []
        for page in wanted:
            if page not in self._used:
                missing.append(page)
                continue
            self._used[page] = self._used.pop(page)
            self._counts["hits"] += 1
            self._counts["useful"] += page in self._ahead
            self._ahead.discard(page)
        leaving = self._evictable(wanted, len(missing))
        if len(missing) > len(self._free) + len(leaving):
            raise EdgeError(
                f"{len(wanted)} KV pages are needed at once beside {len(self._pinned)} pinned ones, and the device has "
                f"{self.slots} slots; give more --memory"
            )
        moves = self._bring(missing, leaving, fresh)
        self._counts["misses"] += sum(move.load for move in moves)
        return moves

    def prefetch(self, pages: Iterable[int]) -> list[Move]:
        """Load as many of `pages` as can be without a pinned one or one of `pages` leaving, in their order."""
        wanted = dict.fromkeys(pages)
        missing = [page for page in wanted if page not in self._used]
        leaving = self._evictable(wanted, len(missing))
        moves = self._bring(missing[: len(self._free) + len(leaving)], leaving)
        self._counts["prefetched"] += len(moves)
        self._ahead.update(move.page for move in moves)
        return moves

    def wrote(self, pages: Iterable[int]) -> None:
        """Pages in slots whose values differ from the host's from now on."""
        self._dirty.update(pages)

    def flush(self, pages: Iterable[int]) -> list[tuple[int, int]]:
        """(page, slot) of those of `pages` that are to be saved now; each stays in its slot."""
        dirty = [page for page in dict.fromkeys(pages) if page in self._dirty]
        self._dirty.difference_update(dirty)
        self._counts["saved"] += len(dirty)
        return [(page, int(self.slot_of[page])) for page in dirty]

    def drop(self, pages: Iterable[int]) -> None:
        """Free these pages' slots without saving: the host gives them other values."""
        for page in dict.fromkeys(pages):
            if page in self._used:
                self._free_slot(page)
                self._dirty.discard(page)

    def _bring(self, missing: list[int], leaving: deque[int], fresh: Collection[int] = ()) -> list[Move]:
        """Give `missing` the free slots, then those of `leaving`."""
        moves = []
        for page in missing:
            evicted = None if self._free else self._evict(leaving.popleft())
            slot = self._free.pop()
            self.slot_of[page] = slot
            self._used[page] = None
            moves.append(Move(page, slot, page not in fresh, evicted))
        return moves

    def _evictable(self, wanted: Collection[int], missing: int) -> deque[int]:
        """The pages that may leave, as many as `missing` ones need, those first that should."""
        may_leave = (page for page in self._used if page not in self._pinned and page not in wanted)
        return deque(islice(may_leave, max(missing - len(self._free), 0)))

    def _evict(self, page: int) -> int | None:
        """Free a page's slot. -> the page, if it is to be saved."""
        self._free_slot(page)
        if page not in self._dirty:
            return None
        self._dirty.remove(page)
        self._counts["saved"] += 1
        return page

    def _free_slot(self, page: int) -> None:
        del self._used[page]
        self._ahead.discard(page)
        self._free.append(int(self.slot_of[page]))
        self.slot_of[page] = NO_SLOT


def split_rows(needs: np.ndarray, room: int) -> Iterator[range]:
    """Cut rows into as few runs as possible, each of which needs at most `room` pages.

    needs [rows, pages] bool: which pages a row needs. EdgeError if a row alone needs more.
    """
    first = 0
    while first < len(needs):
        left = needs[first:]
        new = left.argmax(axis=0)[left.any(axis=0)]  # the row from which on a page is needed, counted from `first`
        total = np.bincount(new, minlength=len(left)).cumsum()
        count = int(np.searchsorted(total, room, side="right"))
        if count == 0:
            raise EdgeError(f"a token needs {total[0]} KV pages at once and the device has room for {room}")
        yield range(first, first + count)
        first += count
