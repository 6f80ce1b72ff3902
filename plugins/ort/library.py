"""Find the operator library built for this processor and register it with ONNX Runtime."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import onnxruntime as ort

_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd")
# Best first. The flags are those of /proc/cpuinfo; an entry is used if the processor has them all.
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "x86_64_v4_bf16": (*_AVX512, "avx512_bf16", "avx512_vnni"),
        "x86_64_v4": _AVX512,
        "x86_64_v3": ("avx2", "fma", "f16c", "bmi2"),
    },
    "aarch64": {"armv8_2": ("asimdhp", "asimddp")},
}


def library_file(instruction_set: str) -> str:
    """File name of the library for one instruction set, beside this module."""
    return f"libedge_ops_{instruction_set}.so"


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def find_library() -> Path | None:
    """The best library that was built and that this processor can run; None if there is none."""
    flags = _cpu_flags()
    for name, needed in INSTRUCTION_SETS.get(platform.machine(), {}).items():
        path = Path(__file__).with_name(library_file(name))
        if path.exists() and flags.issuperset(needed):
            return path
    return None


def multiplies_packed() -> bool:
    """Whether the kernels multiply pairs of bfloat16 and fours of int8: attention then works in fewer bytes."""
    path = find_library()
    return path is not None and path.stem.endswith("_bf16")


def register(options: ort.SessionOptions) -> Path | None:
    """Register the kernels with a session to come. None: there are none, and the FunctionProtos will run."""
    path = find_library()
    if path is not None:
        options.register_custom_ops_library(str(path))
    return path


def take_pool_bytes_read() -> int | None:
    """Bytes of KV and compressed-key pools that attention has read, in this process, since the last call.

    None if there are no kernels. Loading the library again gives the copy that ONNX Runtime uses.
    """
    return _counter("edge_take_pool_bytes_read")


def attention_peak() -> int | None:
    """Most bytes that the buffers of attention have had at once, in this process; None if there are no kernels."""
    return _counter("edge_attention_peak")


def _counter(name: str) -> int | None:
    path = find_library()
    if path is None:
        return None
    count = getattr(ctypes.CDLL(str(path)), name)
    count.argtypes, count.restype = (), ctypes.c_uint64
    return int(count())
