"""What this process may use of the machine: physical resources, and the limits of its control group (containers)."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
# Of control groups version 2 and 1: the limit, what is used of it, and the prefix of memory.stat's hierarchical names.
_MEMORY_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def usable_cores() -> int:
    """Cores of this process's affinity, or the CPU quota of its control group if that is lower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups():
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def available_memory() -> int:
    """Bytes that can be had without swapping: what the system offers, within the control group's limits."""
    available = int(psutil.virtual_memory().available)
    for group in _control_groups():
        for limit_file, used_file, prefix in _MEMORY_FILES:
            limit, used = _text(group / limit_file), _text(group / used_file)
            if limit.isdigit() and used.isdigit():
                available = min(available, max(0, int(limit) - int(used) + _cached_files(group, prefix)))
    return available


def available_swap() -> int:
    """Bytes of swap that can be had, within the control group's limits."""
    available = int(psutil.swap_memory().free)
    for group in _control_groups():
        limit, used = _text(group / "memory.swap.max"), _text(group / "memory.swap.current")
        if limit.isdigit() and used.isdigit():
            available = min(available, max(0, int(limit) - int(used)))
    return available


def _control_groups() -> list[Path]:
    """The groups of this process and those around them: version 2's, and version 1's of memory.

    In a container only its own may be visible, at the place of the outermost.
    """
    groups: list[Path] = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        own = root / path.lstrip("/")
        groups += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return groups


def _cached_files(group: Path, prefix: str) -> int:
    """Bytes of cached file pages, which the kernel gives up before it refuses memory."""
    wanted = (f"{prefix}inactive_file", f"{prefix}active_file")
    lines = (line.partition(" ") for line in _text(group / "memory.stat").splitlines())
    return sum(int(value) for name, _, value in lines if name in wanted)


def _text(path: Path) -> str:
    """The text of a file, "" if there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
