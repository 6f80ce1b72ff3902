"""The CPU executor: ONNX Runtime, with the KV pools bound once and updated in place."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref

import numpy as np
import onnxruntime as ort

from edge.bundle import GRAPH, Bundle
from edge.config import SparseConfig
from edge.errors import EdgeError, UsageError
from edge.executor import StepBatch, StepResult
from edge.kv_cache import pool_shapes
from edge.offload import Offload, open_page_file
from plugins.offload.store import Counters, PageFile, PageStore, PoolPart, unit_bytes
from plugins.ort.library import register

# How numpy holds a pool, and ONNX's number of its type.
_POOL_TYPES = {"float32": (np.float32, 1), "float16": (np.float16, 10), "bfloat16": (np.uint16, 16)}


class OnnxRuntimeExecutor:
    """One session and the pools of each layer (edge/kv_cache.py); see edge/executor.py for the step.

    Each pool is bound as input and output at once, so the attention operator updates it and nothing is copied.
    `sparse`: the settings of sparse attention for every step, if the model has it. `offload`: the pools of keys and
    values have room for some of the pages, and a file for all.
    """

    def __init__(
        self,
        bundle: Bundle,
        num_pages: int,
        threads: int,
        sparse: SparseConfig | None = None,
        offload: Offload | None = None,
    ) -> None:
        if bundle.manifest.target != "onnxruntime":
            raise UsageError(
                f"{bundle.path} was exported for {bundle.manifest.target}; export it with --target onnxruntime to run "
                "it on the CPU"
            )
        self.num_pages = num_pages
        self._threads = threads
        self._offload = offload
        self._page_file: PageFile | None = None
        self.stores: list[PageStore] = []  # of the layers, if there is an offload
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised; printing them too would be a second message
        options.enable_mem_pattern = False  # every step has its own shapes
        self._library = register(options)
        try:
            self._session = ort.InferenceSession(str(bundle.file(GRAPH)), options, providers=["CPUExecutionProvider"])
            self._binding = self._session.io_binding()
            self._pools = self._bind_pools(bundle)
            if offload is not None:
                self._open_stores(bundle, offload)
            if (sparse := sparse or bundle.config.sparse) is not None:
                names = ("dense_len", "init_blocks", "local_blocks", "selected_blocks")
                self._settings = np.array([getattr(sparse, name) for name in names], np.int32)
                self._binding.bind_cpu_input("sparse_settings", self._settings)
        except EdgeError:
            raise
        except MemoryError as error:
            raise EdgeError(f"the KV pool cannot be had ({error}); ask for a smaller --context or --memory") from error
        except Exception as error:  # the library has no narrower base
            raise EdgeError(
                f"ONNX Runtime cannot load {bundle.file(GRAPH)} ({error}); export the bundle again"
            ) from error
        self._input_names = {node.name for node in self._session.get_inputs()}
        self._kv_type = bundle.manifest.types["kv"]

    def _bind_pools(self, bundle: Bundle) -> list[ort.OrtValue]:
        dtype, onnx_type = _POOL_TYPES[bundle.manifest.types["kv"]]
        pools = []
        for layer in range(bundle.config.num_hidden_layers):
            for name, page in pool_shapes(bundle.config).items():
                pages = self._offload.resident_pages if self._offload and name == "kv_pool" else self.num_pages
                values = _lazy_zeros((pages, *page), dtype)
                pool = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values, onnx_type)
                self._binding.bind_ortvalue_input(f"{name}.{layer}", pool)
                self._binding.bind_ortvalue_output(f"{name}_out.{layer}", pool)
                pools.append(pool)
        return pools

    def _open_stores(self, bundle: Bundle, offload: Offload) -> None:
        """Give each layer's pool of keys and values its part of one file."""
        planes, heads, tokens, dim = pool_shapes(bundle.config)["kv_pool"]
        item = np.dtype(_POOL_TYPES[bundle.manifest.types["kv"]][0]).itemsize
        pools = [pool for pool in self._pools if len(pool.shape()) == 5]
        parts = [[PoolPart(pool.data_ptr(), planes, tokens * dim * item)] for pool in pools]
        layer_bytes = self.num_pages * heads * unit_bytes(parts[0])
        file = open_page_file(offload.folder, len(parts) * layer_bytes, tokens * dim * item)
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
        for name in ("input_ids", "positions", "query_start", "page_table", "logits_rows", "switch_length"):
            if name in self._input_names:
                self._binding.bind_cpu_input(name, np.ascontiguousarray(getattr(batch, name), np.int32))
        self._binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # the library has no narrower base
            if self._page_file is not None and (failure := self._page_file.take_failure()):
                raise EdgeError(f"{failure}; check the disk, or give more --memory to use less of it") from error
            tokens = len(batch.input_ids)
            raise EdgeError(
                f"ONNX Runtime failed in a step of {tokens} tokens ({error}); try a smaller --chunk"
            ) from error
        return StepResult(self._binding.get_outputs()[-1].numpy())

    def describe(self) -> dict[str, str]:
        """Provider, kernels, threads and KV type, for reports."""
        kernels = "ONNX functions (no compiled operators)" if self._library is None else self._library.stem
        facts = {
            "executor": f"ONNX Runtime {ort.__version__} CPU",
            "kernels": kernels,
            "threads": str(self._threads),
            "kv": self._kv_type,
        }
        if self._offload is not None:
            facts["offload"] = f"{self._offload.resident_pages} of {self.num_pages} KV pages in memory, all on disk"
        return facts


def _lazy_zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros that take memory when they are first written, in huge pages where the system has them.

    Attention jumps between KV pages all over the pool: with small pages every jump costs a walk of the page table.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(error.strerror) from None
    with contextlib.suppress(OSError, AttributeError):  # not every kernel offers it
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
