"""The CPU executor: ONNX Runtime, with the KV pools bound once and updated in place."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from edge.bundle import GRAPH, Bundle
from edge.errors import EdgeError, UsageError
from edge.executor import StepBatch, StepResult
from plugins import PAGE_TOKENS
from plugins.ort.library import register


class OnnxRuntimeExecutor:
    """One session and one pool a layer, [num_pages, 2, Hkv, 64, d]; see edge/executor.py for the step.

    Each pool is bound as input and output at once, so the attention operator appends to it and nothing is copied.
    """

    def __init__(self, bundle: Bundle, num_pages: int, threads: int) -> None:
        if bundle.manifest.target != "onnxruntime":
            raise UsageError(
                f"{bundle.path} was exported for {bundle.manifest.target}; export it with --target onnxruntime to run "
                "it on the CPU"
            )
        self.num_pages = num_pages
        self._threads = threads
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # every step has its own shapes
        self._library = register(options)
        try:
            self._session = ort.InferenceSession(str(bundle.file(GRAPH)), options, providers=["CPUExecutionProvider"])
            self._binding = self._session.io_binding()
            self._pools = self._bind_pools(bundle)
        except MemoryError as error:
            raise EdgeError(f"the KV pool cannot be had ({error}); ask for a smaller --context or --memory") from error
        except Exception as error:  # the library has no narrower base
            raise EdgeError(
                f"ONNX Runtime cannot load {bundle.file(GRAPH)} ({error}); export the bundle again"
            ) from error
        self._input_names = {node.name for node in self._session.get_inputs()}
        self._kv_type = bundle.manifest.types["kv"]

    def _bind_pools(self, bundle: Bundle) -> list[ort.OrtValue]:
        c = bundle.config
        shape = (self.num_pages, 2, c.num_key_value_heads, PAGE_TOKENS, c.head_dim)
        pools = []
        for layer in range(c.num_hidden_layers):
            # Zeroed memory is mapped lazily: pages that are never used cost nothing.
            pool = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, bundle.manifest.types["kv"]))
            self._binding.bind_ortvalue_input(f"kv_pool.{layer}", pool)
            self._binding.bind_ortvalue_output(f"kv_pool_out.{layer}", pool)
            pools.append(pool)
        return pools

    def step(self, batch: StepBatch) -> StepResult:
        """Run one ragged step; see edge/executor.py."""
        for name in ("input_ids", "positions", "query_start", "page_table", "logits_rows", "rope_length"):
            if name in self._input_names:
                self._binding.bind_cpu_input(name, np.ascontiguousarray(getattr(batch, name), np.int32))
        self._binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # the library has no narrower base
            tokens = len(batch.input_ids)
            raise EdgeError(
                f"ONNX Runtime failed in a step of {tokens} tokens ({error}); try a smaller --chunk"
            ) from error
        return StepResult(self._binding.get_outputs()[-1].numpy())

    def describe(self) -> dict[str, str]:
        """Provider, kernels, threads and KV type, for reports."""
        kernels = "ONNX functions (no compiled operators)" if self._library is None else self._library.stem
        return {
            "executor": f"ONNX Runtime {ort.__version__} CPU",
            "kernels": kernels,
            "threads": str(self._threads),
            "kv": self._kv_type,
        }
