"""What this process may use of the machine: physical resources, and the limits of its control group (containers)."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


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
        limit, used = _text(group / "memory.max"), _text(group / "memory.current")
        if limit.isdigit() and used.isdigit():
            available = min(available, max(0, int(limit) - int(used) + _cached_files(group)))
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
    """The group of this process and those around it (version 2; in a container only its own is visible)."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::"):
            own = CGROUPS / line.removeprefix("0::").lstrip("/")
            return [own, *(parent for parent in own.parents if parent.is_relative_to(CGROUPS))]
    return []


def _cached_files(group: Path) -> int:
    """Bytes of cached file pages, which the kernel gives up before it refuses memory."""
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def _text(path: Path) -> str:
    """The text of a file, "" if there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
