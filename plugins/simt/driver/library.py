"""Builds the emulated libcuda.so.1 and loads it into this process, where every CUDA library then finds it."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from edge.errors import EdgeError, UsageError
from plugins.build.cache import ROOT
from plugins.build.wheels import wheel_file, wheel_version
from plugins.launch import Kernel
from plugins.simt.driver.exports import exports_source
from plugins.simt.emulator import COMMON, SOURCE, compile_cached, compiler, kernel_library

SONAME = "libcuda.so.1"
_HEADERS = ("nvidia-cuda-runtime", "nvidia/cu13/include")
_FILES = (
    "driver/arena.cpp",
    "driver/control.cpp",
    "driver/copies.cpp",
    "driver/cubin.cpp",
    "driver/device.cpp",
    "driver/events.cpp",
    "driver/graphs.cpp",
    "driver/launch.cpp",
    "driver/memory.cpp",
    "driver/modules.cpp",
    "driver/streams.cpp",
    "block.cpp",
    "switch.cpp",
    "warp.cpp",
    "copies.cpp",
    "buffers.cpp",
    "race.cpp",
)


@dataclass(frozen=True)
class DeviceFacts:
    """What an emulated GPU says of itself. total_memory, shared_memory (of an SM): bytes."""

    name: str
    architecture: str
    multiprocessors: int
    total_memory: int
    shared_memory: int
    is_integrated: bool = False


# RTX 3060, Jetson AGX Orin, RTX 4060, RTX 5070.
_GPUS = (
    DeviceFacts("Emulated GPU (sm_86)", "sm_86", 28, 12 << 30, 100 << 10),
    DeviceFacts("Emulated Jetson (sm_87)", "sm_87", 16, 64 << 30, 164 << 10, is_integrated=True),
    DeviceFacts("Emulated GPU (sm_89)", "sm_89", 24, 8 << 30, 100 << 10),
    DeviceFacts("Emulated GPU (sm_120)", "sm_120", 48, 12 << 30, 100 << 10),
)
DEVICES = {gpu.architecture: gpu for gpu in _GPUS}


@dataclass(frozen=True)
class Counts:
    """What the driver holds and has done since it was reset. bytes: of device memory, as cuMemGetInfo counts them;
    pending: pieces of work that are queued; waits: calls that waited for the device.
    """

    allocations: int
    bytes: int
    peak_bytes: int
    pinned_allocations: int
    pinned_bytes: int
    streams: int
    events: int
    graphs: int
    graph_execs: int
    modules: int
    pending: int
    launches: int
    graph_launches: int
    waits: int


class _Properties(ctypes.Structure):
    """`Properties` of driver.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        *((field, ctypes.c_int) for field in ("major", "minor", "multiprocessors", "integrated", "shared_memory")),
        ("memory", ctypes.c_size_t),
    )


class EmulatedDriver:
    """The driver of this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._properties = _Properties()

    def reset(self, facts: DeviceFacts) -> None:
        """Be a device on which nothing has happened; whatever was allocated, created or added is gone.

        Pinned memory stays readable, since arrays may still be on it.
        """
        major, minor = divmod(int(facts.architecture.removeprefix("sm_")), 10)
        self._library.emulated_reset()
        self._properties = _Properties(
            facts.name.encode(),
            major,
            minor,
            facts.multiprocessors,
            facts.is_integrated,
            facts.shared_memory,
            facts.total_memory,
        )
        self._library.emulated_configure(ctypes.byref(self._properties))

    def add_kernels(self, kernels: Iterable[Kernel]) -> None:
        """Compile the CPU builds of kernels, which run when a module's kernels of their symbols are launched."""
        distinct = list(dict.fromkeys(kernels))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            libraries = list(pool.map(lambda kernel: kernel_library(kernel, "fast"), distinct))
        for kernel, library in zip(distinct, libraries, strict=True):
            self._library.emulated_add_kernel(kernel.symbol.encode(), str(library).encode())

    def counts(self) -> Counts:
        """What is alive and what has been done; for leaks, and for what a step costs."""
        values = (ctypes.c_uint64 * len(Counts.__dataclass_fields__))()
        self._library.emulated_counts(values)
        return Counts(*values)


@functools.cache
def load_driver() -> EmulatedDriver:
    """Load the library so that whoever asks for libcuda.so.1 from now on gets it; an sm_86 until it is reset."""
    library = ctypes.CDLL(str(driver_library()), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(ctypes.CDLL(SONAME), "emulated_reset"):
        raise EdgeError(f"a real {SONAME} is loaded in this process; load the emulated driver before all else")
    return EmulatedDriver(library)


def device_facts(architecture: str) -> DeviceFacts:
    """The GPU that stands for an architecture, as 'sm_87'."""
    if architecture not in DEVICES:
        raise UsageError(f"no emulated GPU is {architecture}; choose from {', '.join(DEVICES)}")
    return DEVICES[architecture]


def driver_library() -> Path:
    """The shared library, built if need be. Its SONAME is libcuda.so.1; its file name is not."""
    headers = wheel_file(*_HEADERS)
    text = "".join(f'#include "plugins/simt/{name}"\n' for name in _FILES)
    sources = [(ROOT / "plugins/simt" / name).read_text() for name in _FILES]
    text += f"// {_HEADERS[0]} {wheel_version(_HEADERS[0])}\n{exports_source(headers, sources)}"
    flags = [*COMMON, "-O2", compiler()[1], "-fPIC", "-shared", "-fno-semantic-interposition", "-Wmissing-declarations"]
    link = [f"-Wl,-soname,{SONAME}", "-Wl,-Bsymbolic", "-ldl"]
    return compile_cached("libcuda", text, [[*flags, "-isystem", str(headers), SOURCE, *link]])
