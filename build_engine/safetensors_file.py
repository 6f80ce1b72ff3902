"""Safetensors files, memory-mapped: the library's numpy reader copies, and does not know bfloat16."""

from __future__ import annotations

import json
import math
import mmap
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from build_engine.checkpoint import LazyTensor
from edge.errors import EdgeError

_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "I32": np.dtype(np.int32),
}
# The integer tensors of a GPTQ checkpoint; all others hold floating-point numbers.
INTEGER_SUFFIXES = (".qweight", ".qzeros", ".g_idx")


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Map one file: 8 bytes of header length, a JSON header, then the tensors' bytes.

    EdgeError names the file, and the tensor whose header entry is wrong or whose bytes are not there.
    """
    size = path.stat().st_size
    if size < 8:
        raise EdgeError(f"{path} has {size} bytes, too few for a safetensors file; download it again")
    with path.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    release = partial(mapping.madvise, mmap.MADV_DONTNEED)
    file = np.frombuffer(mapping, np.uint8)
    header_bytes = int(file[:8].view("<u8")[0])
    if header_bytes > size - 8:
        raise EdgeError(
            f"{path} announces a header of {header_bytes} bytes but {size - 8} follow: "
            "it is truncated or not a safetensors file; download it again"
        )
    header = parse_json_object(file[8 : 8 + header_bytes].tobytes(), path)
    header.pop("__metadata__", None)
    data = file[8 + header_bytes :]
    tensors = {}
    intervals = []
    for name, entry in header.items():
        begin, end = _check_entry(name, entry, data.size, path)
        intervals.append((begin, end, name))
        shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
        array = data[begin:end].view(dtype).reshape(shape)
        tensors[name] = LazyTensor(name, shape, dtype, entry["dtype"], array.__getitem__, release)
    for (_, end, name), (begin, _, later) in pairwise(sorted(intervals)):
        if begin < end:
            raise EdgeError(f"{path}: the bytes of tensors {name} and {later} overlap; download it again")
    return tensors


def _check_entry(name: str, entry: Any, data_bytes: int, path: Path) -> tuple[int, int]:
    """Where the tensor's bytes begin and end, after the header."""
    try:
        stored_as, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound or not isinstance(stored_as, str):
        raise EdgeError(f"{path}: the header entry of tensor {name} is damaged; download it again")
    supported = ("I32",) if name.endswith(INTEGER_SUFFIXES) else ("BF16", "F16", "F32")
    if stored_as not in supported:
        raise EdgeError(f"{path}: tensor {name} is stored as {stored_as}; supported are {', '.join(supported)}")
    if end > data_bytes:
        raise EdgeError(
            f"{path} is truncated: tensor {name} ends {end - data_bytes} bytes after the end of the file; "
            "download it again"
        )
    needed = math.prod(shape) * _DTYPES[stored_as].itemsize
    if end - begin != needed:
        raise EdgeError(
            f"{path}: tensor {name} of shape {shape} in {stored_as} needs {needed} bytes but has "
            f"{end - begin}; download it again"
        )
    return begin, end


def parse_json_object(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `text`, read from `path`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EdgeError(f"{path} is damaged: its JSON does not parse ({error})") from error
    if not isinstance(values, dict):
        raise EdgeError(f"{path} is damaged: its JSON is not an object")
    return values
