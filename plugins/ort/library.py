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
    path = find_library()
    if path is None:
        return None
    take = ctypes.CDLL(str(path)).edge_take_pool_bytes_read
    take.argtypes, take.restype = (), ctypes.c_uint64
    return int(take())
