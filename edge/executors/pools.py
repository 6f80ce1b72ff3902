"""Where the CPU executor's KV pools are: in memory, or some of their pages in memory and all on disk."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge.errors import EdgeError
from plugins.infllmv2 import meaning as infllmv2
from plugins.offload.store import PageStore
from plugins.ort.keep import Kept
from plugins.paged_attention import meaning as paged_attention


@dataclass(frozen=True)
class MemoryPages:
    """The pages of one pool [pages, ...] as rows of bytes."""

    values: np.ndarray

    @property
    def page_bytes(self) -> int:
        """Of one."""
        return int(self.values[0].nbytes)

    def read(self, pages: Sequence[int]) -> np.ndarray:
        """Copies of them [n, page_bytes]."""
        return self.values[list(pages)].view(np.uint8).reshape(len(pages), self.page_bytes)

    def write(self, pages: Sequence[int], data: np.ndarray) -> None:
        """Fill them from rows of bytes."""
        values = np.ascontiguousarray(data).view(self.values.dtype)
        self.values[list(pages)] = values.reshape(len(pages), *self.values.shape[1:])


@dataclass(frozen=True)
class StoredPages:
    """The same of a pool that has room for some of its pages; EdgeError if the disk fails."""

    store: PageStore

    @property
    def page_bytes(self) -> int:
        """Of one."""
        return self.store.page_bytes

    def read(self, pages: Sequence[int]) -> np.ndarray:
        """Copies of them [n, page_bytes]."""
        with _disk_errors():
            return np.stack([self.store.read_page(page) for page in pages])

    def write(self, pages: Sequence[int], data: np.ndarray) -> None:
        """Fill them from rows of bytes."""
        with _disk_errors():
            for page, values in zip(pages, data, strict=True):
                self.store.write_page(page, values)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error.strerror) from error


def disk_error(failure: str | None) -> EdgeError:
    """What is said of pages that could not be written or read back."""
    return EdgeError(f"{failure}; check the disk, or give more --memory to use less of it")


def keep_in_pools(pools: Mapping[str, np.ndarray], kv_type: str, kept: Kept) -> None:
    """`plugins.ort.keep.keep_tokens` for a layer without kernels, in the ONNX functions' order of values."""
    if kv_type == "bfloat16":
        import ml_dtypes  # comes with onnx, without which nobody runs functions

        pools = {name: values.view(ml_dtypes.bfloat16) for name, values in pools.items()}
    scales, where = pools.get("kv_scales"), (kept.pages, kept.first, kept.slots)
    if "c1_pool" in pools:
        infllmv2.keep_tokens(pools["kv_pool"], pools["c1_pool"], pools["c2_pool"], *where, scales)
    else:
        paged_attention.keep_tokens(pools["kv_pool"], *where, scales)


def lazy_zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
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
