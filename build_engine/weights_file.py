"""One append-only file that holds every weight of a bundle as ONNX external data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx

# ONNX Runtime maps external data straight from the file if it starts on a page boundary.
ALIGNMENT = 4096


class WeightsFile:
    """Streams arrays to disk in chunks and hashes them on the way, so that nothing is held or read twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_written = 0
        self._file = path.open("wb")
        self._hash = hashlib.sha256()

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        """Hash of all that was written so far, in hexadecimal."""
        return self._hash.hexdigest()

    def add(self, name: str, element_type: int, shape: list[int], chunks: Iterable[np.ndarray]) -> onnx.TensorProto:
        """Append the concatenation of `chunks` (raw little-endian bytes) -> a tensor that refers to it."""
        self._write(b"\0" * (-self.bytes_written % ALIGNMENT))
        offset = self.bytes_written
        for chunk in chunks:
            self._write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
        tensor = onnx.TensorProto(name=name, data_type=element_type, dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": self.path.name, "offset": offset, "length": self.bytes_written - offset}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes_written += len(data)
