"""What the benchmark ran on: facts that make a figure comparable, nothing that names person or host."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from edge.machine import usable_cores

PACKAGES = (
    *("minicpm-edge", "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "cuda-bindings"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "tensorrt-rtx-cu13"),
)
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")
NO_DEVICE = "no CUDA device"


@dataclass(frozen=True)
class Machine:
    """Facts of one machine at one time; `timestamp` is ISO 8601 in UTC, memory is in bytes."""

    cpu_model: str
    board: str
    instruction_sets: tuple[str, ...]
    logical_cores: int
    usable_cores: int
    cpu_governor: str
    memory_bytes: int
    os: str
    python: str
    packages: dict[str, str]
    accelerator: str
    timestamp: str


@dataclass(frozen=True)
class MemoryUse:
    """Memory of this process in bytes.

    `peak_bytes` is the highest resident size since the counter was reset (`peak_scope` "case"), or since the
    process began where the kernel allows no reset ("process"). `anonymous_bytes` (private memory: KV cache,
    buffers, copied weights; not mapped files) and `proportional_bytes` (Pss) are current, None if unknown.
    """

    peak_bytes: int
    peak_scope: str
    anonymous_bytes: int | None
    proportional_bytes: int | None


@dataclass(frozen=True)
class CpuClock:
    """Seconds: wall time, CPU time of this process, CPU time of the whole machine (over all its cores)."""

    wall: float
    own: float
    machine: float


def describe_machine() -> Machine:
    """Read the facts; whatever the system does not tell is "unknown", never an error."""
    return Machine(
        cpu_model=_cpu_model(),
        board=_text(Path("/proc/device-tree/model")),
        instruction_sets=_instruction_sets(),
        logical_cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        cpu_governor=_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) or "unknown",
        memory_bytes=_memory_bytes(),
        os=_operating_system(),
        python=platform.python_version(),
        packages=_package_versions(),
        accelerator=describe_accelerator(),
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def describe_accelerator(driver: Any | None = None) -> str:
    """The first CUDA device and its driver, or why there is none; `driver` replaces the system's libcuda."""
    if driver is None:
        try:
            driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        except OSError:
            return f"{NO_DEVICE} (no driver installed)"
    count, version = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return f"{NO_DEVICE} (a driver is installed)"
    name = ctypes.create_string_buffer(128)
    driver.cuDeviceGetName(name, len(name), 0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    more = f" and {count.value - 1} more" if count.value > 1 else ""
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return f"{name.value.decode()}{more}, driver for CUDA {cuda}"


def reset_peak_memory() -> bool:
    """Let the kernel's peak (VmHWM) start again from the current resident size; False where it refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def read_memory(peak_was_reset: bool) -> MemoryUse:
    """Memory of this process now and its peak (see `MemoryUse`)."""
    status, rollup = _kib_fields("/proc/self/status"), _kib_fields("/proc/self/smaps_rollup")
    return MemoryUse(
        peak_bytes=status["VmHWM"] if "VmHWM" in status else _peak_without_proc(),
        peak_scope="case" if peak_was_reset and "VmHWM" in status else "process",
        anonymous_bytes=rollup.get("Anonymous", status.get("RssAnon")),
        proportional_bytes=rollup.get("Pss"),
    )


def read_cpu_clock() -> CpuClock:
    """The three clocks that `other_cpu_share` compares."""
    own, machine = psutil.Process().cpu_times(), psutil.cpu_times()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    # guest time is already inside user time
    guest = getattr(machine, "guest", 0.0) + getattr(machine, "guest_nice", 0.0)
    return CpuClock(time.monotonic(), own.user + own.system, sum(machine) - idle - guest)


def other_cpu_share(before: CpuClock, after: CpuClock, logical_cores: int) -> float | None:
    """Share (0..1) of the machine's CPU time that other processes took between two readings."""
    capacity = (after.wall - before.wall) * logical_cores
    if capacity <= 0:
        return None
    other = (after.machine - before.machine) - (after.own - before.own)
    return min(1.0, max(0.0, other / capacity))


def _peak_without_proc() -> int:
    """Peak resident bytes of the process without /proc (macOS counts bytes; Windows: peak working set)."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _kib_fields(path: str) -> dict[str, int]:
    """The `Name:  123 kB` lines of a /proc file, in bytes; empty where the file cannot be read."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {w[0].rstrip(":"): int(w[1]) * 1024 for w in words if len(w) == 3 and w[2] == "kB"}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip().rstrip("\0")
    except OSError:
        return ""


def _cpuinfo(*names: str) -> str:
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _cpu_model() -> str:
    model = _cpuinfo("model name")
    # Arm kernels give part numbers only; lscpu knows their names
    if not model and (lscpu := shutil.which("lscpu")):
        listing = subprocess.run([lscpu], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        lines = (line.partition(":") for line in listing.stdout.splitlines())
        names = [value.strip() for key, _, value in lines if key == "Model name"]
        model = ", ".join(dict.fromkeys(names))
    return model or platform.processor() or platform.machine() or "unknown"


def _instruction_sets() -> tuple[str, ...]:
    flags = set(_cpuinfo("flags", "Features").split())
    return tuple(name for name in INSTRUCTION_SETS if name in flags)


def _memory_bytes() -> int:
    """Physical memory, or the limit of the control group if that is lower."""
    total = int(psutil.virtual_memory().total)
    limit = _text(Path("/sys/fs/cgroup/memory.max"))
    return min(total, int(limit)) if limit.isdigit() else total


def _operating_system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, kernel {platform.release()}, {platform.machine()}"


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
