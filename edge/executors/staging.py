"""The small inputs of a device step: one pinned buffer on the host and its copy on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edge.cuda import ALIGNMENT, DeviceArray, Pool, Stream, pinned

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # name -> largest shape and dtype


def layout_bytes(layout: Layout) -> int:
    """Size of a buffer with all of it, each aligned as a tensor of its own."""
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in layout.values())


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Staging:
    """`host[name]` are views of the pinned buffer, flat; `device[name]` the same places on the device.

    One copy brings all of it over: a step's inputs are a few kilobytes, and a copy costs more than its bytes.
    """

    def __init__(self, pool: Pool, layout: Layout) -> None:
        size = layout_bytes(layout)
        self._pinned, self._device = pinned((size,), np.uint8), pool.take((size,), np.uint8)
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, DeviceArray] = {}
        start = 0
        for name, (shape, dtype) in layout.items():
            length = math.prod(shape)
            self.host[name] = np.frombuffer(self._pinned, dtype, length, start)
            self.device[name] = DeviceArray(self._device.address + start, (length,), dtype, self._device)
            start += _aligned(length * dtype.itemsize)

    @property
    def pinned_bytes(self) -> int:
        """Of the buffer on the host."""
        return int(self._pinned.nbytes)

    def put(self, name: str, values: np.ndarray) -> None:
        """Write the first values of one input, in C order."""
        self.host[name][: values.size] = values.reshape(-1)

    def upload(self, stream: Stream) -> None:
        """Queue the copy; nothing may be written until the stream has been waited for."""
        stream.upload(self._device, self._pinned)
