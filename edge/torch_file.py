"""Files of torch.save, read without torch and without running what they say: lists, dictionaries, tensors.

A file is a zip of a pickle and, stored plainly, the bytes of each storage that it names. A pickle is a program; here it
may call two functions that make tensors, and one that makes an empty dictionary, and nothing else.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from edge.errors import EdgeError

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
}
_MOST_PICKLE_BYTES = 64 << 20
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip's entry: where the lengths of its name and extra field are


class _RefusedError(pickle.UnpicklingError):
    """The pickle asks for something that no list or tensor needs."""


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor's elements lie in a storage, as the file says; nothing of it is checked yet."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, stride)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_CALLABLE = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


# The one written in Python: the other sizes its memo by what the file says, which may be more than there is memory.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (found := _CALLABLE.get((module, name))) is None:
            raise _RefusedError(f"it asks for {module}.{name}, which is neither a number, a list nor a tensor")
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str() as key, *_):
                return _Storage(dtype, key)
        raise _RefusedError("it refers to something that is no storage")


def load_torch_file(path: Path) -> Any:
    """What torch.save wrote: numbers, strings, lists, dictionaries; each tensor a read-only array of the mapped file.

    EdgeError if it is damaged, in the format of before 2020, or needs code to be read.
    """
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError) as error:  # ValueError: nothing can be mapped of an empty file
        raise EdgeError(
            f"{path} is no file of torch.save as it has been since torch 1.6 ({error}); load it and save it again with "
            "torch.save"
        ) from None
    with archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        program, order = entries.get("data.pkl"), entries.get("byteorder")
        if program is None or program.file_size > _MOST_PICKLE_BYTES:
            raise EdgeError(f"{path} has no readable data.pkl, so torch.save did not write it; get it again")
        try:
            if order is not None and archive.read(order) != b"little":
                raise _RefusedError("its numbers are big-endian")
            found = _Unpickler(io.BytesIO(archive.read(program))).load()
            return _resolve(found, _Storages(np.frombuffer(mapping, np.uint8), entries))
        except _RefusedError as error:
            raise EdgeError(f"{path} is not read: {error}; save plain tensors or lists of numbers") from None
        except Exception as error:  # a damaged pickle fails in any way
            raise EdgeError(f"{path} is damaged ({type(error).__name__}: {error}); get it again") from None


@dataclass(frozen=True)
class _Storages:
    """The mapped file and the entries of its zip by their names without the folder."""

    data: np.ndarray
    entries: dict[str, zipfile.ZipInfo]

    def read(self, storage: _Storage) -> np.ndarray:
        """All elements of a storage."""
        info = self.entries[f"data/{storage.key}"]
        if info.compress_type != zipfile.ZIP_STORED:
            raise _RefusedError(f"its storage {storage.key} is compressed")
        header = self.data[info.header_offset :][: _LOCAL_HEADER.size].tobytes()
        start = info.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
        if start + info.file_size > self.data.size:
            raise ValueError(f"storage {storage.key} is cut off")
        return self.data[start : start + info.file_size].view(storage.dtype)

    def tensor(self, tensor: _Tensor) -> np.ndarray:
        """A view of a storage."""
        shape, stride, offset = tuple(tensor.shape), tuple(tensor.stride), tensor.offset
        if not isinstance(tensor.storage, _Storage) or not all(type(n) is int and n >= 0 for n in (*shape, offset)):
            raise ValueError("a tensor without storage or shape")
        steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        if any(size > 1 and step != wanted for size, step, wanted in zip(shape, stride, steps, strict=True)):
            raise _RefusedError(f"a tensor of shape {list(shape)} is a transposed or strided view")
        values = self.read(tensor.storage)[offset : offset + math.prod(shape)]
        return values.reshape(shape)


def _resolve(value: Any, storages: _Storages) -> Any:
    match value:
        case _Tensor():
            return storages.tensor(value)
        case dict():
            return {key: _resolve(item, storages) for key, item in value.items()}
        case list() | tuple():
            return [_resolve(item, storages) for item in value]
        case bool() | int() | float() | str() | None:
            return value
    raise _RefusedError(f"it holds a {type(value).__name__}")
