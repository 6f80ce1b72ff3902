"""The CPU executor: ONNX Runtime, with the KV pools bound once and updated in place."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from edge.bundle import GRAPH, Bundle
from edge.bundle import WEIGHTS as WEIGHTS_FILE
from edge.config import SparseConfig
from edge.errors import EdgeError, UsageError
from edge.executor import StepBatch, StepResult
from edge.executors.ort_session import POOL_TYPES, GraphSession, Reserved, load_errors
from edge.executors.pools import MemoryPages, StoredPages, disk_error, keep_in_pools
from edge.kv_cache import COMPRESSED_POOLS, pool_layout
from edge.memory.measured import anonymous_bytes, mapped_bytes, resident_bytes
from edge.offload import Offload, open_page_file
from plugins.offload.store import Counters, PageFile, PageStore, PoolPart, unit_bytes
from plugins.ort.keep import Kept, keep_tokens
from plugins.ort.library import attention_peak

_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 20  # mallopt: what is larger goes back to the system once it is freed


class OnnxRuntimeExecutor:
    """One session and the pools of each layer (edge/kv_cache.py); see edge/executor.py for the step.

    Each pool is bound as input and output at once, so the attention operator updates it and nothing is copied.
    `sparse`: the settings of sparse attention for every step, if the model has it. `reserved`: what the session may
    allocate, to the byte; None leaves that to ONNX Runtime. `offload`: the pools of keys and values have room for some
    of the pages, and a file for all. `takes_turns`: with a draft's session, see GraphSession.
    """

    def __init__(
        self,
        bundle: Bundle,
        num_pages: int,
        threads: int,
        sparse: SparseConfig | None = None,
        reserved: Reserved | None = None,
        offload: Offload | None = None,
        *,
        takes_turns: bool = False,
    ) -> None:
        if bundle.manifest.target != "onnxruntime":
            raise UsageError(
                f"{bundle.path} was exported for {bundle.manifest.target}; export it with --target onnxruntime to run "
                "it on the CPU"
            )
        self.num_pages = num_pages
        self._values: list[np.ndarray] = []  # the pools' own memory, [pages, ...] each
        self._names: list[str] = []  # and their names
        self._weights_file = bundle.file(WEIGHTS_FILE)
        self._most_rows = 0  # of logits that a step gave
        self._threads = threads
        self._offload = offload
        self._page_file: PageFile | None = None
        self._offloaded = 0  # bytes of that file
        self.stores: list[PageStore] = []  # of the layers, if there is an offload
        self._logits = np.zeros((0, bundle.config.vocab_size), np.float32)
        if reserved is not None:
            _give_freed_memory_back()
            self._logits = np.zeros((reserved.rows, bundle.config.vocab_size), np.float32)
        with load_errors(
            bundle.file(GRAPH),
            "the KV pool cannot be had ({error}); ask for a smaller --context or --memory",
            f"the weights of {bundle.path} do not fit in their part of the plan",
        ):
            self._graph = GraphSession(bundle.file(GRAPH), threads, reserved, takes_turns=takes_turns)
            self._pools = self._bind_pools(bundle)
            if offload is not None:
                self._open_stores(bundle, offload)
            if (sparse := sparse or bundle.config.sparse) is not None:
                names = ("dense_len", "init_blocks", "local_blocks", "selected_blocks")
                self._settings = np.array([getattr(sparse, name) for name in names], np.int32)
                self._graph.bind_inputs({"sparse_settings": self._settings})
        self._library = self._graph.library
        self._gives_hidden = self._graph.has_output("hidden")
        self._hidden_size = bundle.config.hidden_size
        self._kv_type = bundle.manifest.types["kv"]

    def _bind_pools(self, bundle: Bundle) -> list[ort.OrtValue]:
        pools = []
        for layer in range(bundle.config.num_hidden_layers):
            for name, page in pool_layout(bundle.config, bundle.manifest.types).items():
                pages = self._offload.resident_pages if self._offload and name == "kv_pool" else self.num_pages
                pool = self._graph.bind_pool(name, layer, pages, page)
                pools.append(pool.bound)
                self._values.append(pool.values)
                self._names.append(name)
        return pools

    def _open_stores(self, bundle: Bundle, offload: Offload) -> None:
        """Give each layer's pool of keys and values its part of one file."""
        page = pool_layout(bundle.config, bundle.manifest.types)["kv_pool"]
        planes, heads = page.shape[:2]
        slice_bytes = page.nbytes // (planes * heads)
        pools = [pool for pool, name in zip(self._pools, self._names, strict=True) if name == "kv_pool"]
        parts = [[PoolPart(pool.data_ptr(), planes, slice_bytes)] for pool in pools]
        layer_bytes = self.num_pages * heads * unit_bytes(parts[0])
        self._offloaded = len(parts) * layer_bytes
        file = open_page_file(offload.folder, self._offloaded, slice_bytes)
        self._page_file = file
        # Before the pools are gone, at the latest when the process ends.
        weakref.finalize(self, file.close)
        for layer, part in enumerate(parts):
            offset = layer * layer_bytes
            self.stores.append(file.add_store(layer, heads, self.num_pages, offload.resident_pages, offset, part))

    def take_offload_counters(self) -> Counters | None:
        """What reading pages from disk took since the last call; None if all are in memory."""
        return None if self._page_file is None else self._page_file.take_counters()

    def step(self, batch: StepBatch) -> StepResult:
        """Run one ragged step; see edge/executor.py."""
        self._graph.bind_inputs(batch.inputs())
        tokens, rows = len(batch.input_ids), len(batch.logits_rows)
        self._most_rows = max(self._most_rows, rows)
        buffer = self._logits[:rows] if rows <= len(self._logits) else None
        self._graph.bind_output("logits", buffer)
        hidden = None
        if self._gives_hidden:
            hidden = np.empty((tokens, self._hidden_size), np.float32)
            self._graph.bind_output("hidden", hidden)
        try:
            self._graph.run(f"a step of {tokens} tokens", "try a smaller --chunk")
        except EdgeError as error:
            if self._page_file is not None and (failure := self._page_file.take_failure()):
                raise disk_error(failure) from error
            raise
        # The next step overwrites the buffer.
        return StepResult(self._graph.output("logits") if buffer is None else buffer.copy(), hidden)

    def memory(self) -> dict[str, int]:
        """See edge/executor.py. Of regions and attention it is the most there were, of all else what there is."""
        pools = dict.fromkeys(("kv cache", "compressed keys", "scales"), 0)
        slots = None if self._offload is None else self._offload.resident_pages
        for name, values in zip(self._names, self._values, strict=True):
            here = (values[:slots] if name == "kv_scales" else values).nbytes
            pools["compressed keys" if name in COMPRESSED_POOLS else "kv cache"] += here
            pools["scales"] += values.nbytes - here
        regions = self._graph.taken("weights", "activations")
        copied = self._most_rows * self._logits.itemsize * self._logits.shape[1]
        own = {"logits": self._logits.nbytes + copied} | regions
        if (attention := attention_peak()) is not None:
            own["attention"] = attention
        measured = {name: size for name, size in pools.items() if size} | own
        if self._offloaded:
            measured["offloaded kv"] = self._offloaded
        if (mapped := mapped_bytes(self._weights_file)) is not None:
            measured["weights, mapped"] = mapped
        if (anonymous := anonymous_bytes()) is not None and regions:
            resident = sum(resident_bytes(values) for values in self._values)
            measured["process"] = max(0, anonymous - resident - sum(own.values()))
        return measured

    def keep_tokens(self, pages: Sequence[int], first: int, slots: Sequence[int]) -> None:
        """Move tokens in every pool; see edge/executor.py."""
        kept = Kept(np.asarray(pages, np.int32), first, np.asarray(slots, np.int32))
        for pools in self._layers():
            if self._library is None:
                keep_in_pools(pools, self._kv_type, kept)
            elif not keep_tokens(self._library, pools, POOL_TYPES[self._kv_type][1], kept):
                assert self._page_file is not None
                raise disk_error(self._page_file.take_failure())

    def _layers(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Each layer's pools by name."""
        names = dict.fromkeys(self._names)
        for first in range(0, len(self._values), len(names)):
            yield dict(zip(names, self._values[first : first + len(names)], strict=True))

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages in every pool; see edge/executor.py."""
        sources, targets = map(list, zip(*pairs, strict=True))
        for pool in self._page_pools():
            pool.write(targets, pool.read(sources))

    def save_pages(self, pages: Sequence[int]) -> np.ndarray:
        """The pages' bytes, pool after pool; see edge/executor.py."""
        return np.concatenate([pool.read(pages) for pool in self._page_pools()], axis=1)

    def load_pages(self, pages: Sequence[int], data: np.ndarray) -> None:
        """Fill pages with saved bytes; see edge/executor.py."""
        start = 0
        for pool in self._page_pools():
            end = start + pool.page_bytes
            pool.write(pages, data[:, start:end])
            start = end

    @property
    def page_bytes(self) -> int:
        """Of one page; see edge/executor.py."""
        return sum(pool.page_bytes for pool in self._page_pools())

    def _page_pools(self) -> Iterator[MemoryPages | StoredPages]:
        """Each pool, wherever its pages are."""
        stores = iter(self.stores)
        for name, values in zip(self._names, self._values, strict=True):
            yield StoredPages(next(stores)) if self.stores and name == "kv_pool" else MemoryPages(values)

    @property
    def page_format(self) -> str:
        """KV type and kernels; see edge/executor.py."""
        return f"{self._kv_type}, {self._kernels}"

    @property
    def _kernels(self) -> str:
        return "ONNX functions (no compiled operators)" if self._library is None else self._library.stem

    def describe(self) -> dict[str, str]:
        """Provider, kernels, threads and KV type, for reports."""
        facts = {
            "executor": f"ONNX Runtime {ort.__version__} CPU",
            "kernels": self._kernels,
            "threads": str(self._threads),
            "kv": self._kv_type,
        }
        if self._offload is not None:
            facts["offload"] = f"{self._offload.resident_pages} of {self.num_pages} KV pages in memory, all on disk"
        return facts


def _give_freed_memory_back() -> None:
    """Let malloc keep nothing large that was freed: a plan has no line for it."""
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
