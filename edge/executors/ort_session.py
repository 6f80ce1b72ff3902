"""An ONNX Runtime session over one graph of a bundle: its memory, what is bound to it, and how it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge.errors import EdgeError
from edge.executors.pools import lazy_zeros
from edge.kv_cache import PoolSpec
from plugins.ort.library import register
from plugins.ort.memory import STEP, WEIGHTS, MemoryPool, is_exhausted

# How numpy holds a pool, and ONNX's number of its type.
POOL_TYPES: dict[str, tuple[type, int]] = {
    "float32": (np.float32, 1),
    "int8": (np.int8, 3),
    "float16": (np.float16, 10),
    "bfloat16": (np.uint16, 16),
}


@dataclass(frozen=True)
class Reserved:
    """Bytes that the session's constants and the tensors of a step may take, and the rows of logits it has."""

    weights: int
    step: int
    rows: int


@dataclass(frozen=True)
class BoundPool:
    """A pool [pages, ...] as numpy has it and as ONNX Runtime has it: the same memory."""

    values: np.ndarray
    bound: ort.OrtValue


class GraphSession:
    """Runs a graph whose pools are bound once, each as input and output, so that they are updated in place.

    reserved: what it may allocate, to the byte; None, or no compiled operators, leaves that to ONNX Runtime.
    takes_turns: its threads do not spin between steps, in which those of another session work.
    """

    def __init__(self, graph: Path, threads: int, reserved: Reserved | None, *, takes_turns: bool = False) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised; printing them too would be a second message
        options.enable_mem_pattern = False  # every step has its own shapes
        if takes_turns:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        self.library = register(options)
        self._memory: MemoryPool | None = None
        if reserved is not None and self.library is not None:
            self._memory = MemoryPool(reserved.weights, reserved.step)
            self._memory.session_options(options)
        with self._use(WEIGHTS):
            self._session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._bound: dict[str, None] = {}  # outputs, in the order in which they come

    @contextlib.contextmanager
    def _use(self, region: int) -> Iterator[None]:
        with contextlib.nullcontext() if self._memory is None else self._memory.use(region):
            yield

    def has_output(self, name: str) -> bool:
        """Whether the graph gives it."""
        return any(node.name == name for node in self._session.get_outputs())

    def bind_pool(self, name: str, layer: int, pages: int, page: PoolSpec) -> BoundPool:
        """Make one of zeros and bind it; MemoryError if there is no room for it."""
        dtype, onnx_type = POOL_TYPES[page.dtype]
        values = lazy_zeros((pages, *page.shape), dtype)
        pool = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values, onnx_type)
        self._binding.bind_ortvalue_input(f"{name}.{layer}", pool)
        self._binding.bind_ortvalue_output(f"{name}_out.{layer}", pool)
        self._bound[f"{name}_out.{layer}"] = None
        return BoundPool(values, pool)

    def bind_inputs(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Those that the graph takes."""
        for name, values in arrays.items():
            if name in self._inputs:
                self._binding.bind_cpu_input(name, np.ascontiguousarray(values))

    def bind_output(self, name: str, buffer: np.ndarray | None) -> None:
        """Have an output of float32 written to `buffer`, which is as large, or to memory of ONNX Runtime's own."""
        if buffer is None:
            self._binding.bind_output(name, "cpu")
        else:
            self._binding.bind_output(name, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
        self._bound[name] = None

    def output(self, name: str) -> np.ndarray:
        """Of the last run, if it has no buffer."""
        values: np.ndarray = self._binding.get_outputs()[list(self._bound).index(name)].numpy()
        return values

    def run(self, what: str, remedy: str) -> None:
        """Run the graph; `what` ran and the `remedy` if it failed are for the sentence of an EdgeError."""
        try:
            with self._use(STEP):
                self._session.run_with_iobinding(self._binding)
        except Exception as error:  # the library has no narrower base
            if is_exhausted(error):
                raise EdgeError(f"{what} needs more than the plan has for it") from error
            raise EdgeError(f"ONNX Runtime failed in {what} ({error}); {remedy}") from error

    def taken(self, weights: str, step: str) -> dict[str, int]:
        """The most bytes that were taken of the two regions, by these names; nothing without regions."""
        if self._memory is None:
            return {}
        return {weights: self._memory.taken(WEIGHTS).peak, step: self._memory.taken(STEP).peak}


@contextlib.contextmanager
def load_errors(graph: Path, pools: str, too_large: str) -> Iterator[None]:
    """EdgeErrors for what may fail while a session is made: no memory for the `pools`, weights `too_large`, else."""
    try:
        yield
    except EdgeError:
        raise
    except MemoryError as error:
        raise EdgeError(pools.format(error=error)) from error
    except Exception as error:  # the library has no narrower base
        if is_exhausted(error):
            raise EdgeError(too_large) from error
        raise EdgeError(f"ONNX Runtime cannot load {graph} ({error}); export the bundle again") from error
