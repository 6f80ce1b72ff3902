"""KV pages beyond the device's budget: their home is pinned host memory, a page cache a layer brings those in use.

Compressed keys are all on the device, so blocks are scored and chosen as ever. Then the host reads the choice, decides
slots (edge/page_cache.py) and queues copies on a stream of its own, for which the compute stream waits before it
attends. While a layer attends, the copies for the next one begin: what its sequences chose for their last token.

Two events a layer order the streams. `released`: the last kernel that used the layer's slots, for which copies wait.
`copied`: the last copy for the layer, for which kernels wait.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from edge.config import SparseConfig
from edge.cuda import DeviceArray, Event, Pool, Stream, pinned
from edge.page_cache import Move, PageCache, PageCounts, split_rows
from plugins import PAGE_TOKENS
from plugins.infllmv2 import STRIDE
from plugins.paged_attention.launch import TREE_BLOCKS

_TABLES = 4  # slot tables on their way to the device before the host waits for one
_INT32 = np.dtype(np.int32)


@dataclass(frozen=True)
class OffloadSizes:
    """Most tokens and sequences of a step, columns of page tables, and the pages that one token may need at once."""

    tokens: int
    sequences: int
    table_width: int
    token_pages: int


@dataclass(frozen=True)
class OffloadCounts:
    """Pages over all layers, and bytes copied to the device and back, since the start."""

    pages: PageCounts
    bytes_in: int
    bytes_out: int


@dataclass
class _Layer:
    """One layer's pools: slots [slots, ...] on the device, homes [pages, ...] in pinned memory, in the same order."""

    slots: tuple[DeviceArray, ...]
    homes: tuple[np.ndarray, ...]
    cache: PageCache
    released: Event = field(default_factory=Event)
    copied: Event = field(default_factory=Event)
    # By a sequence's first page, what its last token chose. Pages are handed on; a wrong guess costs time only.
    chosen: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Step:
    """A step's tokens as the host knows them. sequence, place [T]; query_start [B + 1]; table [B, P]."""

    sequence: np.ndarray
    place: np.ndarray  # in its sequence's pages
    query_start: np.ndarray
    table: np.ndarray

    @property
    def written(self) -> np.ndarray:
        """[T]: the page that each token goes to."""
        return self.table[self.sequence, self.place // PAGE_TOKENS]

    @property
    def begun(self) -> np.ndarray:
        """Pages of which the step writes the first token, so that nothing in them is needed."""
        return self.written[self.place % PAGE_TOKENS == 0]


def staging_bytes(sizes: OffloadSizes, kv_heads: int, selected: int) -> int:
    """Pinned memory of a `DeviceOffload` beside the pages: slot tables on their way, chosen blocks and their counts."""
    lists = sizes.tokens * kv_heads * (selected + TREE_BLOCKS + 1)
    return 4 * (_TABLES * table_values(sizes.sequences, sizes.table_width) + lists)


def table_values(sequences: int, table_width: int) -> int:
    """Values of what a run needs on the device: a slot table, and where each sequence's tokens begin."""
    return sequences * table_width + sequences + 1


class DeviceOffload:
    """See plugins/plugin.py: PageOffload. `pools` are, layer by layer, the pools with slots; one step at a time."""

    def __init__(
        self,
        pool: Pool,
        pools: Sequence[Sequence[DeviceArray]],
        pages: int,
        sparse: SparseConfig,
        kv_heads: int,
        sizes: OffloadSizes,
    ) -> None:
        self._pages, self._sparse, self._sizes = pages, sparse, sizes
        self._copies = Stream()
        homes = [pinned((len(pools), pages, *one.shape[1:]), one.dtype) for one in pools[0]]
        self._layers = [
            _Layer(tuple(slots), tuple(home[layer] for home in homes), PageCache(pages, slots[0].shape[0]))
            for layer, slots in enumerate(pools)
        ]
        self._by_address = {slots[0].address: layer for layer, slots in enumerate(pools)}
        # By a pool's address: the place of all its pages, [pages, ...], which `save` and `drop` make fit to touch.
        self.homes = {
            slots.address: home for layer in self._layers for slots, home in zip(layer.slots, layer.homes, strict=True)
        }
        self._tables = pool.take((table_values(sizes.sequences, sizes.table_width),), _INT32)
        self._staged = [(pinned(self._tables.shape, _INT32), Event()) for _ in range(_TABLES)]
        self._blocks = pinned((sizes.tokens * kv_heads * (sparse.selected_blocks + TREE_BLOCKS),), _INT32)
        self._counts = pinned((sizes.tokens * kv_heads,), _INT32)
        self._kv_heads = kv_heads
        self._pinned = np.zeros(pages, bool)
        self.slot_table = self._tables.address
        self.run_start = self.slot_table + 4 * sizes.sequences * sizes.table_width

    @property
    def home_bytes(self) -> int:
        """Pinned memory of the pages."""
        return sum(home.nbytes for layer in self._layers for home in layer.homes)

    @property
    def staging_bytes(self) -> int:
        """Pinned memory of all else."""
        return sum(table.nbytes for table, _ in self._staged) + self._blocks.nbytes + self._counts.nbytes

    def begin(self, places: np.ndarray, query_start: np.ndarray, page_table: np.ndarray, *, trees: bool) -> None:
        """The step that will be queued next; arrays as in StepBatch. places [T]: where in their pages tokens are.

        trees: rows may need a page more than those they choose, as may closing up what was accepted.
        """
        sequence = np.repeat(np.arange(len(page_table)), np.diff(query_start))
        self._step = _Step(sequence, places.copy(), query_start.copy(), page_table.copy())
        always = frozenset(self._always_needed(TREE_BLOCKS - 1 if trees else 0))
        self._pinned[:] = False
        self._pinned[list(always)] = True
        for layer in self._layers:
            layer.cache.pin(always)
        self._prefetch(self._layers[0])

    def _always_needed(self, more: int) -> list[int]:
        """Initial and local pages, sequence by sequence as long as any token's and `more` have room beside them."""
        step, sparse, found = self._step, self._sparse, list[int]()
        room = self._layers[0].cache.slots - self._sizes.token_pages - more
        for b, end in enumerate(step.query_start[1:]):
            own = int(step.place[end - 1]) // PAGE_TOKENS
            local = max(own - sparse.local_blocks, min(sparse.init_blocks, own))
            blocks = [*range(min(sparse.init_blocks, local)), *range(local, own + 1)]
            if len(found) + len(blocks) > room:
                break
            found += step.table[b, blocks].tolist()
        return found

    def writing(self, pool: int, stream: int) -> Iterator[range]:
        """See PageOffload."""
        layer, compute, step = self._layer(pool), Stream.of(stream), self._step
        written, block = step.written, step.place // PAGE_TOKENS
        # A window that ends with a token may begin on the page before.
        averages = ((step.place + 1) % STRIDE == 0) & (block > 0)
        needs = np.zeros((len(block), self._pages), bool)
        rows = np.arange(len(block))
        needs[rows, written] = True
        needs[rows[averages], step.table[step.sequence, block - 1][averages]] = True
        for run in self._runs(needs):
            fresh = written[run.start : run.stop][step.place[run.start : run.stop] % PAGE_TOKENS == 0]
            self._place(layer, needs, run, compute, fresh.tolist())
            yield run
            compute.record(layer.released)
            layer.cache.wrote(np.unique(written[run.start : run.stop]).tolist())

    def reading(self, pool: int, blocks: int, counts: int, columns: int, stream: int) -> Iterator[range]:
        """See PageOffload; waits for the stream."""
        layer, compute = self._layer(pool), Stream.of(stream)
        needs = self._chosen_pages(blocks, counts, columns, compute)
        for run in self._runs(needs):
            self._place(layer, needs, run, compute)
            yield run
            compute.record(layer.released)
        for b, end in enumerate(self._step.query_start[1:]):
            layer.chosen[int(self._step.table[b, 0])] = np.flatnonzero(needs[end - 1]).tolist()
        index = self._by_address[pool] + 1
        if index < len(self._layers):
            self._prefetch(self._layers[index])

    @contextmanager
    def changing(self, pool: int, pages: Sequence[int], stream: int) -> Generator[None, None, None]:
        """Have these pages of one layer in slots, as slot_table says, for what the caller queues meanwhile."""
        layer, compute = self._layer(pool), Stream.of(stream)
        self._copy(layer, layer.cache.place(pages))
        compute.wait(layer.copied)
        self._upload_tables(layer, range(len(self._step.place)), compute)
        yield
        compute.record(layer.released)
        layer.cache.wrote(pages)

    def save(self, pages: Sequence[int]) -> None:
        """Have the newest values of these pages in their homes; waits."""
        for layer in self._layers:
            if dirty := layer.cache.flush(pages):
                self._copies.wait(layer.released)
            for page, slot in dirty:
                for slots, home in zip(layer.slots, layer.homes, strict=True):
                    self._copies.download(home[page], slots.row(slot))
        self._copies.synchronize()

    def drop(self, pages: Sequence[int]) -> None:
        """Forget what the slots have of these pages, and let their homes be written; waits for copies under way."""
        for layer in self._layers:
            layer.cache.drop(pages)
        self._copies.synchronize()

    def _layer(self, pool: int) -> _Layer:
        return self._layers[self._by_address[pool]]

    def _chosen_pages(self, blocks: int, counts: int, columns: int, compute: Stream) -> np.ndarray:
        """[T, pages] bool: the pages that each token attends to, over all KV heads."""
        step, heads = self._step, self._kv_heads
        tokens = len(step.place)
        chosen, count = self._blocks[: tokens * heads * columns], self._counts[: tokens * heads]
        compute.download(chosen, DeviceArray(blocks, chosen.shape, _INT32))
        compute.download(count, DeviceArray(counts, count.shape, _INT32))
        compute.synchronize()
        chosen, count = chosen.reshape(tokens, heads, columns), count.reshape(tokens, heads)
        needs = np.zeros((tokens, self._pages), bool)
        rows, head, column = np.nonzero(np.arange(columns) < count[:, :, None])
        needs[rows, step.table[step.sequence[rows], chosen[rows, head, column]]] = True
        for row in np.flatnonzero(count[:, 0] == 0):
            needs[row, step.table[step.sequence[row], : step.place[row] // PAGE_TOKENS + 1]] = True
        return needs

    def _runs(self, needs: np.ndarray) -> Iterator[range]:
        room = self._layers[0].cache.slots - int(self._pinned.sum())
        return split_rows(needs & ~self._pinned, room)

    def _place(self, layer: _Layer, needs: np.ndarray, run: range, compute: Stream, fresh: Sequence[int] = ()) -> None:
        """Have the run's pages in slots, and its tables on the device, before whatever `compute` does next."""
        wanted = np.flatnonzero(needs[run.start : run.stop].any(axis=0)).tolist()
        self._copy(layer, layer.cache.place(wanted, fresh))
        compute.wait(layer.copied)
        self._upload_tables(layer, run, compute)

    def _copy(self, layer: _Layer, moves: Sequence[Move]) -> None:
        if not moves:
            return
        self._copies.wait(layer.released)
        for move in moves:
            for slots, home in zip(layer.slots, layer.homes, strict=True):
                if move.evicted is not None:
                    self._copies.download(home[move.evicted], slots.row(move.slot))
                if move.load:
                    self._copies.upload(slots.row(move.slot), home[move.page])
        self._copies.record(layer.copied)

    def _upload_tables(self, layer: _Layer, run: range, compute: Stream) -> None:
        self._staged.append(self._staged.pop(0))
        staged, uploaded = self._staged[-1]
        uploaded.synchronize()  # before it is written again
        table = self._step.table
        # Pages that are in no slot are not read; any slot does for them.
        staged[: table.size] = np.maximum(layer.cache.slot_of[table], 0).reshape(-1)
        starts = np.clip(self._step.query_start - run.start, 0, len(run))
        staged[-self._sizes.sequences - 1 :][: len(starts)] = starts
        compute.upload(self._tables, staged)
        compute.record(uploaded)

    def _prefetch(self, layer: _Layer) -> None:
        step = self._step
        pages = np.flatnonzero(self._pinned).tolist()
        for first, start in zip(step.table[:, 0], step.query_start[:-1], strict=True):
            if step.place[start] > 0:
                pages += layer.chosen.get(int(first), [])
        begun = set(step.begun.tolist())
        self._copy(layer, layer.cache.prefetch(page for page in pages if page not in begun))

    @property
    def counts(self) -> OffloadCounts:
        """What has been copied so far."""
        pages = sum((layer.cache.counts for layer in self._layers), PageCounts())
        size = sum(home[0].nbytes for home in self._layers[0].homes)
        return OffloadCounts(pages, (pages.misses + pages.prefetched) * size, pages.saved * size)
