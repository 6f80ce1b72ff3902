"""The CPU executor of a draft model: a session of its own over draft.onnx, its KV pool bound once like the base's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import onnxruntime as ort

from edge.bundle import DRAFT_GRAPH, DRAFT_VOCAB, Bundle
from edge.errors import EdgeError, UsageError
from edge.executors.onnxruntime import POOL_TYPES, Reserved
from edge.executors.pools import MemoryPages, lazy_zeros
from edge.kv_cache import pool_layout
from edge.speculation.draft import DraftBatch, DraftResult
from plugins.ort.library import register
from plugins.ort.memory import STEP, WEIGHTS, MemoryPool, is_exhausted


class OnnxRuntimeDraft:
    """See edge/speculation/draft.py. num_pages: of the base's pool. reserved: what the session may allocate, to the
    byte, and the rows whose results have a buffer; None leaves that to ONNX Runtime.
    """

    def __init__(self, bundle: Bundle, num_pages: int, threads: int, reserved: Reserved | None = None) -> None:
        section = bundle.manifest.draft
        if section is None:
            raise UsageError(f"{bundle.path} has no draft model; export it again with --draft FOLDER")
        layer = section.model.layer_config(bundle.config)
        self.vocab: np.ndarray | None = None
        if section.model.vocab_size is not None:
            self.vocab = _read_vocab(bundle)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised; printing them too would be a second message
        options.enable_mem_pattern = False  # every step has its own shapes
        # Base and draft take turns: the threads of one must not spin while the other's work.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        library = register(options)
        rows = 0 if reserved is None else reserved.rows
        self._logits = np.zeros((rows, layer.vocab_size), np.float32)
        self._hidden = np.zeros((rows, layer.hidden_size), np.float32)
        self._most_rows = 0  # that a step gave
        self._memory: MemoryPool | None = None
        page = pool_layout(layer, section.types)["kv_pool"]
        dtype, onnx_type = POOL_TYPES[page.dtype]
        try:
            if reserved is not None and library is not None:
                self._memory = MemoryPool(reserved.weights, reserved.step)
                self._memory.session_options(options)
            with self._use(WEIGHTS):
                model = str(bundle.file(DRAFT_GRAPH))
                self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            self._values = lazy_zeros((num_pages, *page.shape), dtype)
            self._pool = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(self._values, onnx_type)
        except MemoryError as error:
            raise EdgeError(f"the draft's memory cannot be had ({error}); ask for a smaller --context") from error
        except Exception as error:  # the library has no narrower base
            if is_exhausted(error):
                raise EdgeError(f"the draft of {bundle.path} does not fit in its part of the plan") from error
            raise EdgeError(
                f"ONNX Runtime cannot load {bundle.file(DRAFT_GRAPH)} ({error}); export the bundle again"
            ) from error
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input("kv_pool.0", self._pool)
        self._binding.bind_ortvalue_output("kv_pool_out.0", self._pool)
        self._input_names = {node.name for node in self._session.get_inputs()}

    @contextlib.contextmanager
    def _use(self, region: int) -> Iterator[None]:
        with contextlib.nullcontext() if self._memory is None else self._memory.use(region):
            yield

    def step(self, batch: DraftBatch) -> DraftResult:
        """Run one ragged step; see edge/speculation/draft.py."""
        for name, values in batch.inputs().items():
            if name in self._input_names:
                dtype = np.float32 if name == "hidden" else np.int32
                self._binding.bind_cpu_input(name, np.ascontiguousarray(values, dtype))
        rows, has_buffers = len(batch.rows), len(batch.rows) <= len(self._logits)
        self._most_rows = max(self._most_rows, rows)
        for name, buffer in (("logits", self._logits), ("hidden_out", self._hidden)):
            if has_buffers:
                shape = (rows, buffer.shape[1])
                self._binding.bind_output(name, "cpu", 0, np.float32, shape, buffer.ctypes.data)
            else:
                self._binding.bind_output(name, "cpu")
        try:
            with self._use(STEP):
                self._session.run_with_iobinding(self._binding)
        except Exception as error:  # the library has no narrower base
            tokens = len(batch.input_ids)
            if is_exhausted(error):
                raise EdgeError(f"a draft's step of {tokens} tokens needs more than the plan has for it") from error
            raise EdgeError(
                f"ONNX Runtime failed in a draft's step of {tokens} tokens ({error}); run without the draft"
            ) from error
        if has_buffers:  # the next step overwrites them
            return DraftResult(self._logits[:rows].copy(), self._hidden[:rows].copy())
        logits, hidden = self._binding.get_outputs()[-2:]
        return DraftResult(logits.numpy(), hidden.numpy())

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages; see edge/speculation/draft.py."""
        sources, targets = map(list, zip(*pairs, strict=True))
        pages = MemoryPages(self._values)
        pages.write(targets, pages.read(sources))

    def memory(self) -> dict[str, int]:
        """See edge/speculation/draft.py. Of regions it is the most there were."""
        results = (self._logits, self._hidden)
        copied = sum(self._most_rows * values.itemsize * values.shape[1] for values in results)
        measured = {"draft kv": self._values.nbytes, "draft logits": copied + sum(values.nbytes for values in results)}
        if self._memory is not None:
            measured["draft weights"] = self._memory.taken(WEIGHTS).peak
            measured["draft activations"] = self._memory.taken(STEP).peak
        return measured


def _read_vocab(bundle: Bundle) -> np.ndarray:
    path = bundle.file(DRAFT_VOCAB)
    try:
        vocab: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise EdgeError(f"{path} cannot be read ({error}); export the bundle again") from None
    return vocab
