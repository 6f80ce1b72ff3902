"""The binding of page_file.h and page_store.h in the operator library."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DISK_BLOCK = 4096  # units begin at multiples of it (page_store.h)
MINIMUM_SLOTS = 8  # what a step that does not fit keeps in the pool at once (plugins/paged_attention/stored.h)

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS = {
    "edge_page_file_open": ((ctypes.c_int, ctypes.c_int, ctypes.c_char_p), _POINTER),
    "edge_page_file_close": ((_POINTER,), None),
    "edge_page_file_take_counters": ((_POINTER, _POINTER), None),
    "edge_page_file_take_failure": ((_POINTER, _POINTER, ctypes.c_uint64), None),
    "edge_page_store_open": ((_POINTER, *[_INT] * 6, _POINTER, _POINTER, _POINTER), _POINTER),
    "edge_page_store_close": ((_POINTER,), None),
    "edge_page_store_lock": ((_POINTER, _POINTER, _INT), ctypes.c_int),
    "edge_page_store_unlock": ((_POINTER, _POINTER, _INT, ctypes.c_int, ctypes.c_int), None),
    "edge_page_store_slot": ((_POINTER, _INT, _INT), _INT),
    "edge_page_store_copy": ((_POINTER, _INT, _POINTER, ctypes.c_int), ctypes.c_int),
}


@dataclass(frozen=True)
class Counters:
    """What happened to units (a page of one KV head) that attention asked for, and the bytes that were moved for it."""

    hits: int
    misses: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class PoolPart:
    """A bound tensor [slots, planes, heads, slice_bytes] at `address`; a page's planes are stored together."""

    address: int
    planes: int
    slice_bytes: int


def unit_bytes(parts: Sequence[PoolPart]) -> int:
    """Bytes of the file that one head's share of a page takes."""
    stored = sum(part.planes * part.slice_bytes for part in parts)
    return -(-stored // DISK_BLOCK) * DISK_BLOCK


class PageFile:
    """An open file for the pages of all layers; `direct`: it is open with O_DIRECT. Owns neither file nor pools."""

    def __init__(self, library: Path, fd: int, folder: Path, *, direct: bool) -> None:
        self._library = ctypes.CDLL(str(library))
        for name, (arguments, result) in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, result
        self.fd = fd
        self._handle = self._library.edge_page_file_open(fd, int(direct), os.fsencode(folder))
        self._stores: list[PageStore] = []

    def add_store(
        self, layer: int, heads: int, pages: int, slots: int, offset: int, parts: Sequence[PoolPart]
    ) -> PageStore:
        """Let attention find the pages of one layer: `slots` of them at a time in its pools, all from `offset` on."""
        if slots < MINIMUM_SLOTS:
            raise ValueError(f"{slots} slots; at least {MINIMUM_SLOTS} are needed")
        addresses = np.array([part.address for part in parts], np.uint64)
        planes = np.array([part.planes for part in parts], np.int64)
        slices = np.array([part.slice_bytes for part in parts], np.int64)
        lists = (array.ctypes.data for array in (addresses, planes, slices))
        handle = self._library.edge_page_store_open(
            self._handle, layer, heads, pages, slots, offset, len(parts), *lists
        )
        size = sum(part.planes * heads * part.slice_bytes for part in parts)
        self._stores.append(PageStore(self._library, handle, size))
        return self._stores[-1]

    def take_counters(self) -> Counters:
        """Of all stores, since the last call."""
        values = np.zeros(4, np.uint64)
        self._library.edge_page_file_take_counters(self._handle, values.ctypes.data)
        return Counters(*values.tolist())

    def take_failure(self) -> str:
        """Which page could not be had since the last call, and why; "" if none."""
        text = ctypes.create_string_buffer(1024)
        self._library.edge_page_file_take_failure(self._handle, text, len(text))
        return text.value.decode(errors="replace")

    def close(self) -> None:
        """Forget stores and file. The pools must still be there."""
        for store in self._stores:
            store.close()
        self._stores.clear()
        if self._handle is not None:
            self._library.edge_page_file_close(self._handle)
            self._handle = None


class PageStore:
    """One layer's pages. `lock` and `unlock` are what attention does around its work (page_store.h)."""

    def __init__(self, library: ctypes.CDLL, handle: int, page_bytes: int) -> None:
        self._library = library
        self._handle: int | None = handle
        self.page_bytes = page_bytes

    def lock(self, units: np.ndarray) -> bool:
        """Bring units [N, 3] (page, head, 1 if it will be written anew) into the pool; False: some cannot be had."""
        units = np.ascontiguousarray(units, np.int32)
        return bool(self._library.edge_page_store_lock(self._handle, units.ctypes.data, len(units)))

    def unlock(self, units: np.ndarray, *, changed: bool, streamed: bool = False) -> None:
        """Let locked units go; those `changed` will be written back, those `streamed` go first."""
        units = np.ascontiguousarray(units, np.int32)
        self._library.edge_page_store_unlock(self._handle, units.ctypes.data, len(units), int(changed), int(streamed))

    def slot(self, page: int, head: int) -> int:
        """Where in the pool a unit is; -1 if it is not."""
        return int(self._library.edge_page_store_slot(self._handle, page, head))

    def read_page(self, page: int) -> np.ndarray:
        """A copy of a page's bytes, wherever it is, part after part as the pools have it. OSError if it is lost."""
        values = np.empty(self.page_bytes, np.uint8)
        self._copy(page, values, is_write=False)
        return values

    def write_page(self, page: int, values: np.ndarray) -> None:
        """Replace a page by bytes that `read_page` gave. OSError if that cannot be done."""
        values = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        if values.size != self.page_bytes:
            raise ValueError(f"{values.size} bytes for a page of {self.page_bytes}")
        self._copy(page, values, is_write=True)

    def _copy(self, page: int, values: np.ndarray, *, is_write: bool) -> None:
        error = self._library.edge_page_store_copy(self._handle, page, values.ctypes.data, int(is_write))
        if error:
            reason = os.strerror(error) if error > 0 else "the file is shorter than it should be"
            raise OSError(error if error > 0 else errno.EIO, f"KV page {page}: {reason}")

    def close(self) -> None:
        """Attention finds it no more."""
        if self._handle is not None:
            self._library.edge_page_store_close(self._handle)
            self._handle = None
