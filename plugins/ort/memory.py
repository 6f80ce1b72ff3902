"""The memory of one ONNX Runtime session: two regions reserved once (plugins/ort/memory.h)."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnxruntime as ort

from plugins.ort.library import find_library

WEIGHTS, STEP = 0, 1
_NOTHING = -1
_EXHAUSTED = "std::bad_alloc"


@dataclass(frozen=True)
class Taken:
    """Bytes of a region that are taken now, and the end of the highest block that ever was."""

    now: int
    peak: int


class MemoryPool:
    """`weights`: for what the session packs of its weights; `step`: for the tensors of a step; both in bytes.

    A session gets its memory here if it was made with `session_options` while the pool was in `use`, and its steps
    run in `use`, too. What exceeds a region fails, as `is_exhausted` tells. MemoryError if there is not even the
    address space.
    """

    def __init__(self, weights: int, step: int) -> None:
        self._library = _library()
        self._number = self._library.edge_memory_open(weights, step)
        if self._number == 0:
            raise MemoryError(f"no address space for {weights + step} bytes")
        weakref.finalize(self, self._library.edge_memory_close, self._number)

    def session_options(self, options: ort.SessionOptions) -> None:
        """Make a session to come take its memory from the pool; its operators must have been registered."""
        options.add_session_config_entry("session.use_env_allocators", "1")

    @contextmanager
    def use(self, region: int) -> Iterator[None]:
        """Whatever ONNX Runtime allocates meanwhile comes from this region."""
        self._library.edge_memory_use(self._number, region)
        try:
            yield
        finally:
            self._library.edge_memory_use(self._number, _NOTHING)

    def taken(self, region: int) -> Taken:
        """What a region holds and held."""
        values = (ctypes.c_uint64 * 2)()
        self._library.edge_memory_stats(self._number, region, values)
        return Taken(*values)


def is_exhausted(error: Exception) -> bool:
    """Whether ONNX Runtime failed because a region was full."""
    return _EXHAUSTED in str(error)


def _library() -> ctypes.CDLL:
    path = find_library()
    if path is None:
        raise RuntimeError("the operators are not compiled")
    library = ctypes.CDLL(str(path))
    number, integer = ctypes.c_uint64, ctypes.c_int
    signatures = {
        "open": ((number, number), number),
        "use": ((number, integer), None),
        "stats": ((number, integer, ctypes.POINTER(ctypes.c_uint64)), None),
        "close": ((number,), None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, f"edge_memory_{name}")
        function.argtypes, function.restype = arguments, result
    return library
