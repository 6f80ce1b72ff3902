"""Which page holds which tokens of which sequence. Knows nothing of tensors or devices.

A page is free, held by sequences, or cached: published, held by none, and kept until its room is needed. Sequences
share pages; who writes into a shared page gets a copy of it first, and a published page is never written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edge.config import ModelConfig
from edge.errors import EdgeError
from edge.interrupts import deferred_interrupts
from edge.published import PublishedPage, PublishedPages, pack_ids
from plugins import PAGE_TOKENS

COMPRESSED_POOLS = ("c1_pool", "c2_pool")  # read for every token: their pages are never offloaded
KV_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # of a value, by the types that a cache may have


@dataclass(frozen=True)
class PoolSpec:
    """One page of a pool: its shape, and its elements' type as numpy calls it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Of the page."""
        return math.prod(self.shape) * KV_BYTES[self.dtype]


CopyPages = Callable[[Sequence[tuple[int, int]]], None]  # pairs of (source, target)


def pages_for(tokens: int) -> int:
    """Pages that `tokens` tokens occupy."""
    return -(-tokens // PAGE_TOKENS)


def pool_layout(config: ModelConfig, types: Mapping[str, str]) -> dict[str, PoolSpec]:
    """The pools of a layer, in the operators' order: keys and values, int8 ones' scales, a sparse model's compressed
    keys, which have 16 bits beside int8.

    types: 'activation' and 'kv', as in a bundle's manifest. See plugins/infllmv2 for what lies where.
    """
    heads, dim, kv = config.num_key_value_heads, config.head_dim, types["kv"]
    planes = 3 if config.sparse is not None and config.sparse.use_nope else 2
    pools = {"kv_pool": PoolSpec((planes, heads, PAGE_TOKENS, dim), kv)}
    if kv == "int8":
        pools["kv_scales"] = PoolSpec((planes, heads, PAGE_TOKENS), "float32")
    if config.sparse is not None:
        compressed = compressed_type(types)
        pools |= {"c1_pool": PoolSpec((heads, 4, dim), compressed), "c2_pool": PoolSpec((heads, 1, dim), compressed)}
    return pools


def compressed_type(types: Mapping[str, str]) -> str:
    """Of compressed keys: the cache's, or beside int8 the activations', or bfloat16 where those are float32."""
    if types["kv"] != "int8":
        return types["kv"]
    return "bfloat16" if types["activation"] == "float32" else types["activation"]


class NoPagesError(EdgeError):
    """Too few pages are free; what was asked for may succeed when others have given theirs back."""


@dataclass
class _Held:
    """A sequence's pages in token order, the first `published` of which are published, each the next one's parent."""

    pages: list[int] = field(default_factory=list)
    published: int = 0


def _cannot_copy(pairs: Sequence[tuple[int, int]]) -> None:
    raise RuntimeError(f"pages {pairs} must be copied and this cache was given no way to do so")


class KVCache:
    """Hands out the pages of one pool to sequences, and finds those that hold what a new sequence begins with.

    `copy_pages` copies the contents of pages at once: the executor's.
    """

    def __init__(self, num_pages: int, copy_pages: CopyPages = _cannot_copy) -> None:
        self.num_pages = num_pages
        self._copy_pages = copy_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._published = PublishedPages()
        # Published pages that no sequence holds, the one to evict first first. Pages are released last to first, and
        # who holds a page holds its parent, so every page is evicted before its parent.
        self._cached: dict[int, None] = {}
        self._sequences: dict[int, _Held] = {}
        self._next_id = 0

    @property
    def free_pages(self) -> int:
        """Pages that can be had: those nobody holds, cached ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def cached_pages(self) -> int:
        """Pages that nobody holds and that a new sequence may find."""
        return len(self._cached)

    @property
    def empty_pages(self) -> int:
        """Pages that nobody holds and that hold nothing."""
        return len(self._free)

    @property
    def held_pages(self) -> int:
        """Pages of sequences."""
        return self.num_pages - self.free_pages

    def open(self) -> int:
        """A new, empty sequence."""
        self._next_id += 1
        self._sequences[self._next_id] = _Held()
        return self._next_id

    @deferred_interrupts()
    def fork(self, sequence: int) -> int:
        """A new sequence with the same contents: it shares every page."""
        held, fork = self._sequences[sequence], self.open()
        for page in held.pages:
            self._holders[page] += 1
        self._sequences[fork] = _Held(list(held.pages), held.published)
        return fork

    def pages(self, sequence: int) -> tuple[int, ...]:
        """The sequence's pages in token order."""
        return tuple(self._sequences[sequence].pages)

    @deferred_interrupts()
    def reserve(self, sequence: int, tokens: int, written_from: int = 0) -> None:
        """Make room for the first `tokens` tokens of the sequence, and let those from `written_from` on be written.

        Pages from there on that others need are replaced by copies. Takes all the pages it needs, or raises
        NoPagesError and takes none.
        """
        held = self._sequences[sequence]
        missing = max(0, pages_for(tokens) - len(held.pages))
        written = range(written_from // PAGE_TOKENS, len(held.pages))
        shared = [index for index in written if self._holders[held.pages[index]] > 1]
        # Nobody holds these but this sequence; they are worth a copy while there is room, and then no more published.
        kept = [index for index in written if index not in shared and held.pages[index] in self._published]
        room = self.free_pages - missing - len(shared)
        if room < 0:
            raise NoPagesError(
                f"{tokens} tokens need {missing + len(shared)} more KV pages of {PAGE_TOKENS} tokens and "
                f"{self.free_pages} are free; shorten the prompt, or give more --memory or --context"
            )
        copied = [*shared, *kept[:room]]
        taken = [self._take() for _ in range(len(copied) + missing)]
        sources = [held.pages[index] for index in copied]
        try:
            if copied:
                self._copy_pages([*zip(sources, taken, strict=False)])
        except BaseException:
            self._release(taken)
            raise
        for index, page in zip(copied, taken, strict=False):
            held.pages[index] = page
        self._release(sources[::-1])
        for index in reversed(kept[room:]):  # all that was cached has been taken: no child is left behind
            self._published.remove(held.pages[index])
        held.published = min(held.published, written.start)
        held.pages.extend(taken[len(copied) :])

    @deferred_interrupts()
    def truncate(self, sequence: int, tokens: int) -> None:
        """Forget all but the first `tokens` tokens; whole pages past them are given back."""
        held = self._sequences[sequence]
        keep = pages_for(tokens)
        released = held.pages[keep:]
        del held.pages[keep:]
        held.published = min(held.published, keep)
        self._release(released[::-1])

    @deferred_interrupts()
    def close(self, sequence: int) -> None:
        """Give the sequence's pages back; the sequence is gone. Those that are published stay cached."""
        self.truncate(sequence, 0)
        del self._sequences[sequence]

    @deferred_interrupts()
    def publish(self, sequence: int, tokens: Sequence[int], computed: int, salt: Callable[[int], bytes | None]) -> None:
        """Let others find the complete pages of a sequence of these tokens, of which the first `computed` are there.

        salt(index) says how a page was computed; None ends what can be published. Where the same page is there
        already, the sequence goes on with that one and gives its own back.
        """
        held = self._sequences[sequence]
        for index in range(held.published, computed // PAGE_TOKENS):
            page, how = held.pages[index], salt(index)
            if page not in self._published:  # a fork may have been faster
                if how is None:
                    return
                parent = self._published[held.pages[index - 1]] if index else None
                ids = _page_ids(tokens, index)
                same = self._published.find(parent, ids, how)
                if same is not None:
                    self._replace(index, page, same.page)
                elif not self._published.add(page, parent, ids, how):
                    return
            held.published = index + 1

    @deferred_interrupts()
    def adopt(self, sequence: int, tokens: Sequence[int], salt: Callable[[int], bytes], kept: int = 0) -> int:
        """Begin the sequence with the longest published prefix of `tokens`, if it is longer than the `kept` first ones.

        -> how many tokens the sequence then has, computed as `salt` says. All that it held is given back for them.
        """
        found: list[int] = []
        parent: PublishedPage | None = None
        for index in range(len(tokens) // PAGE_TOKENS):
            parent = self._published.find(parent, _page_ids(tokens, index), salt(index))
            if parent is None:
                break
            found.append(parent.page)
        if len(found) * PAGE_TOKENS <= kept:
            return kept
        for page in found:
            self._hold(page)
        held = self._sequences[sequence]
        released = held.pages
        self._sequences[sequence] = _Held(found, len(found))
        self._release(released[::-1])
        return len(found) * PAGE_TOKENS

    def _replace(self, index: int, page: int, same: int) -> None:
        """Give all who hold a page another one of the same contents; forks have it at the same place."""
        for held in self._sequences.values():
            if index < len(held.pages) and held.pages[index] == page:
                held.pages[index] = same
                self._hold(same)
                self._release([page])

    def _take(self) -> int:
        """A page for one holder: a free one, else the cached one that was released first."""
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._cached))
            del self._cached[page]
            self._published.remove(page)
        self._holders[page] = 1
        return page

    def _hold(self, page: int) -> None:
        self._cached.pop(page, None)
        self._holders[page] += 1

    def _release(self, pages: Sequence[int]) -> None:
        """One holder less for each, in the order in which they are to be evicted."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._published:
                self._cached[page] = None
            else:
                self._free.append(page)


def _page_ids(tokens: Sequence[int], index: int) -> bytes:
    return pack_ids(tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS])
