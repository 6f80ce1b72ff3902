"""Clocks, temperatures and throttling that Linux shows in sysfs, on boards and PCs alike."""

from __future__ import annotations

import re
from pathlib import Path

from edge.doctor.jetson import MEMORY_CLOCK, devfreq_unit
from edge.telemetry.reading import OFF, Key, Reading, SysFile, SysFiles, Unreadable, in_order, text_of

CPU = "sys/devices/system/cpu"
ZONES = "sys/class/thermal"
# Cooling devices that lower clocks, or tell that the hardware did; fans do not, and a TCC offset is a setting.
SLOWING = re.compile(r"-alert$|^(thermal-)?(cpufreq|devfreq)-|^Processor$")
# Of these the temperature is a constant (a Jetson's PMIC).
CONSTANT = re.compile(r"^PMIC", re.IGNORECASE)


class FastestCore:
    """The highest of the CPU's clocks: idle cores rest, and say nothing of the busy ones."""

    name = "cpufreq"

    def __init__(self, files: list[SysFile]) -> None:
        self._files = files

    def read(self) -> Reading:
        clocks = [number for file in self._files if (number := file.number())]
        return {("clock", "CPU"): max(clocks) * 1e3} if clocks else {}

    def close(self) -> None:
        for file in self._files:
            file.close()


def open_cpufreq(root: Path) -> FastestCore:
    """The clock of each group of cores that share one; Unreadable if the kernel shows none (as in most VMs)."""
    paths = in_order(root.glob(f"{CPU}/cpufreq/policy*/scaling_cur_freq"))
    if not paths:
        raise Unreadable(f"no cpufreq in /{CPU}")
    return FastestCore([SysFile(path) for path in paths])


def open_devfreq(root: Path) -> SysFiles:
    """Clocks of a Jetson's GPU and memory; before JetPack 7 only root sees the memory's."""
    files: dict[Key, tuple[Path, float]] = {}
    for path in in_order(root.glob("sys/class/devfreq/*/cur_freq")):
        if unit := devfreq_unit(path.parent.name):
            files.setdefault(("clock", unit), (path, 1.0))
    memory = root / MEMORY_CLOCK.lstrip("/") / "rate"
    if text_of(memory):
        files.setdefault(("clock", "memory"), (memory, 1.0))
    return SysFiles("devfreq", files, "no GPU in /sys/class/devfreq")


class Zones(SysFiles):
    """Thermal zones; of one whose unit is off the driver gives an error, or a temperature that is none."""

    def read(self) -> Reading:
        return {key: degrees for key, degrees in super().read().items() if degrees != OFF}


def open_zones(root: Path) -> Zones:
    """Thermal zones by type; equal types get their number. Unreadable if there are none."""
    files: dict[Key, tuple[Path, float]] = {}
    for path in in_order(root.glob(f"{ZONES}/thermal_zone*/type")):
        kind = text_of(path)
        zone = kind.removesuffix("-thermal").removesuffix("-therm")
        if kind and not CONSTANT.match(kind):
            name = f"{zone} {path.parent.name.removeprefix('thermal_zone')}" if ("temperature", zone) in files else zone
            files["temperature", name] = (path.with_name("temp"), 1e-3)
    return Zones("thermal zones", files, f"no thermal zone in /{ZONES}")


class Throttling:
    """Cooling devices that are at work now, and how often the hardware slowed down since it started."""

    name = "throttling"

    def __init__(self, devices: dict[str, list[SysFile]], events: dict[str, list[SysFile]]) -> None:
        self._devices, self._events = devices, events

    def read(self) -> Reading:
        found: dict[Key, float] = {}
        for name, files in self._devices.items():
            states = [number for file in files if (number := file.number()) is not None]
            if states:
                found["throttle", name] = float(max(states) > 0)  # some show -1 at rest
        for name, files in self._events.items():
            counts = [number for file in files if (number := file.number()) is not None]
            if len(counts) == len(files):  # a sum that lacks one would jump when it answers again
                found["events", name] = float(sum(counts))
        return found

    def close(self) -> None:
        for files in (*self._devices.values(), *self._events.values()):
            for file in files:
                file.close()


def open_throttling(root: Path) -> Throttling:
    """Everything in sysfs that tells of throttling; Unreadable if nothing does."""
    devices: dict[str, list[SysFile]] = {}
    for path in in_order(root.glob(f"{ZONES}/cooling_device*/type")):
        if SLOWING.search(kind := text_of(path)):
            devices.setdefault(kind, []).append(SysFile(path.with_name("cur_state")))
    counts = {
        "over-current {0}": root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt"),
        "CPU core heat": root.glob(f"{CPU}/cpu*/thermal_throttle/core_throttle_count"),
        "CPU package heat": root.glob(f"{CPU}/cpu*/thermal_throttle/package_throttle_count"),
    }
    events: dict[str, list[SysFile]] = {}
    for label, paths in counts.items():
        for path in _one_each(in_order(paths)):
            events.setdefault(label.format(path.name.removesuffix("_event_cnt")), []).append(SysFile(path))
    if not devices and not events:
        raise Unreadable(f"no cooling device in /{ZONES} and no count of throttling")
    return Throttling(devices, events)


def _one_each(paths: list[Path]) -> list[Path]:
    """Without repetitions: every logical CPU shows its core's and its package's count."""
    found: dict[tuple[str, ...], Path] = {}
    for path in paths:
        topology = path.parent.parent / "topology"
        levels = ("physical_package_id",) if path.name.startswith("package") else ("physical_package_id", "core_id")
        place = tuple(text_of(topology / level) for level in levels) if topology.is_dir() else (str(path),)
        found.setdefault(place, path)
    return list(found.values())
