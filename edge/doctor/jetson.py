"""What a Jetson says of itself: release, power mode, clocks, heat. Formats: NVIDIA's Jetson Linux Developer Guide."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from edge.doctor.machine import Machine

Release = tuple[int, int, int]  # of Jetson Linux (L4T), as (36, 4, 3)

ORIN = "tegra234"
OLDEST = (36, 4, 0)  # JetPack 6.1, the first with TensorRT 10.3 and CUDA 12.6
NEWEST = 39  # JetPack 7.2
_JETPACK = {
    (36, 2, 0): "6.0 DP",
    (36, 3, 0): "6.0",
    (36, 4, 0): "6.1",
    (36, 4, 3): "6.2",
    (36, 4, 4): "6.2.1",
    (36, 5, 0): "6.2.2",
    (38, 2, 0): "7.0",
    (38, 4, 0): "7.1",
    (39, 2, 0): "7.2",
    (39, 2, 1): "7.2.1",
}
MEMORY_CLOCK = "/sys/kernel/debug/bpmp/debug/clk/emc"  # for root, and gone in JetPack 7
_MAJOR = {32: "4", 34: "5", 35: "5", 36: "6", 38: "7", 39: "7"}


@dataclass(frozen=True)
class PowerMode:
    """A line of nvpmodel.conf. id: what `nvpmodel -m` takes; None if only the name is known."""

    id: int | None
    name: str

    @property
    def rank(self) -> tuple[bool, bool, int]:
        """Sorts modes by speed: MAXN lifts every limit, and MAXN_SUPER those of the board's first release."""
        watts = re.search(r"(\d+) ?W", self.name, re.IGNORECASE)
        return "MAXN" in self.name, "SUPER" in self.name, int(watts[1]) if watts else 0


@dataclass(frozen=True)
class Clock:
    """Frequencies in Hz; locked: it stays at its maximum, as after `jetson_clocks`."""

    current: int
    maximum: int
    locked: bool


def board(machine: Machine) -> str:
    """The device tree's model; "" on machines without one, as PCs."""
    return machine.files.get("/proc/device-tree/model", "")


def soc(machine: Machine) -> str:
    """As 'tegra234', the last of the device tree's compatible names; "" if it is none of NVIDIA's."""
    chips = re.findall(r"nvidia,(tegra\d+)", machine.files.get("/proc/device-tree/compatible", ""))
    return chips[-1] if chips else ""


def is_jetson(machine: Machine) -> bool:
    """By the chip, or by NVIDIA's release file, which a container may hide or show."""
    return bool(soc(machine)) or "/etc/nv_tegra_release" in machine.files


def release(machine: Machine) -> Release | None:
    """From '# R36 (release), REVISION: 4.3, GCID: ...'."""
    text = machine.files.get("/etc/nv_tegra_release", "")
    match = re.search(r"R(\d+) \(release\), REVISION: (\d+)(?:\.(\d+))?", text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def jetpack(found: Release) -> str:
    """The JetPack of a release, as 'JetPack 6.2 (L4T R36.4.3)'; releases of the future by their major number."""
    name = _JETPACK.get(found) or _MAJOR.get(found[0])
    l4t = f"L4T R{found[0]}.{found[1]}.{found[2]}"
    return f"JetPack {name} ({l4t})" if name else l4t


def power_modes(machine: Machine) -> tuple[PowerMode, ...]:
    """What nvpmodel.conf offers."""
    found = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=([^>]+?)\s*>", machine.files.get("/etc/nvpmodel.conf", ""))
    return tuple(PowerMode(int(number), name) for number, name in found)


def power_mode(machine: Machine) -> PowerMode | None:
    """The current one: 'NV Power Mode: 15W' and its number on the next line, or else nvpmodel's status file."""
    if match := re.search(r"NV Power Mode: (\S.*)\n\s*(\d+)", machine.said("nvpmodel")):
        return PowerMode(int(match[2]), match[1].strip())
    if match := re.search(r"pmode:(\d+)", machine.files.get("/var/lib/nvpmodel/status", "")):
        number = int(match[1])
        return next((mode for mode in power_modes(machine) if mode.id == number), PowerMode(number, f"mode {number}"))
    return None


def devfreq_unit(name: str) -> str | None:
    """Whose clock a folder of /sys/class/devfreq has: 'GPU' (17000000.gpu, .ga10b before JetPack 6; gpu-gpc-0 after
    Orin) or, from JetPack 7 on, 'memory' (bwmgr)."""
    if name == "bwmgr":
        return "memory"
    return "GPU" if re.search(r"\.(gpu|ga10b)$|^gpu-gpc", name) else None


def clocks(machine: Machine) -> dict[str, Clock]:
    """Of 'GPU' and 'memory', where this user may read them: before JetPack 7 only root sees the memory's."""
    found = {}
    for path in machine.matching("/sys/class/devfreq/*/cur_freq"):
        what = devfreq_unit(path.parent.name)
        numbers = _numbers(machine, [str(path.with_name(f"{which}_freq")) for which in ("cur", "min", "max")])
        if what and numbers:
            found[what] = Clock(numbers[0], numbers[2], locked=numbers[1] == numbers[2])
    if numbers := _numbers(machine, [f"{MEMORY_CLOCK}/{name}" for name in ("rate", "max_rate", "mrq_rate_locked")]):
        found.setdefault("memory", Clock(numbers[0], numbers[1], locked=numbers[2] == 1))
    return found


def temperatures(machine: Machine) -> dict[str, float]:
    """Degrees Celsius by thermal zone, as {'tj-thermal': 48.5}; some zones cannot be read while their unit is off."""
    found = {}
    for path, name in machine.matching("/sys/class/thermal/thermal_zone*/type").items():
        if numbers := _numbers(machine, [str(path.with_name("temp"))]):
            found[name] = numbers[0] / 1000
    return found


def overcurrent_events(machine: Machine) -> dict[str, int]:
    """How often the board slowed down since it booted: 'oc1' for low voltage, 'oc2' and 'oc3' for high current."""
    found = {}
    for path, text in machine.matching("/sys/class/hwmon/*/oc*_event_cnt").items():
        if text.isdigit():
            found[path.name.removesuffix("_event_cnt")] = int(text)
    return found


def _numbers(machine: Machine, paths: Sequence[str]) -> list[int]:
    """The numbers in files; nothing if one of them is missing."""
    texts = [machine.files.get(path, "") for path in paths]
    return [int(text) for text in texts] if all(re.fullmatch(r"-?\d+", text) for text in texts) else []
