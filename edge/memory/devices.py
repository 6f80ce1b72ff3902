"""Memory of the boards and cards that a run is planned for, without having one.

Sizes are what the driver or kernel reports of such a device (MiB). What the system, the CUDA context and the process
take is **assumed** until a device says otherwise: `edge run` plans with what is really free.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge.errors import UsageError
from edge.machine import available_memory, usable_cores

MIB = 1 << 20
CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """What there is. memory, system, context, process: bytes; the last three are assumptions.

    is_integrated: the GPU shares the system's memory, so that the process counts, too.
    """

    name: str
    target: str
    memory: int
    system: int = 0
    context: int = 0
    process: int = 0
    is_integrated: bool = False
    cores: int = 1

    @property
    def budget(self) -> int:
        """What a run may take: all but the system's part."""
        return self.memory - self.system


def _jetson(name: str, memory: int) -> Device:
    return Device(name, "jetson", memory * MIB, 1536 * MIB, 384 * MIB, 640 * MIB, is_integrated=True)


def _card(name: str, memory: int) -> Device:
    return Device(name, "rtx", memory * MIB, 512 * MIB, 384 * MIB)


DEVICES = (
    _jetson("AGX Orin 64GB", 62841),
    _jetson("AGX Orin 32GB", 30697),
    _jetson("Orin NX 16GB", 15656),
    _jetson("Orin NX 8GB", 7620),
    _jetson("Orin Nano 8GB", 7620),
    _card("RTX 3060 12GB", 12288),
    _card("RTX 3090", 24576),
    _card("RTX 4060", 8188),
    _card("RTX 4070", 12282),
    _card("RTX 4080", 16376),
    _card("RTX 4090", 24564),
    _card("RTX 5070", 12227),
    _card("RTX 5080", 16303),
    _card("RTX 5090", 32607),
)


def this_machine() -> Device:
    """The CPU that is here, with 90 % of the memory that is free, as a run would plan."""
    return Device("this CPU", "onnxruntime", int(available_memory() * 0.9), cores=usable_cores())


def find_device(name: str) -> Device:
    """By name, or by a part of it that no other has; case, blanks and dashes do not matter."""
    wanted = _plain(name)
    if wanted == CPU:
        return this_machine()
    found = [device for device in DEVICES if _plain(device.name) == wanted]
    found = found or [device for device in DEVICES if wanted and wanted in _plain(device.name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(device.name for device in found or DEVICES)
    what = "is unknown" if not found else "may be one of several"
    raise UsageError(f"--device {name} {what}; choose {'cpu, ' if not found else ''}{known}, or give --budget SIZE")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]|jetson|geforce|nvidia", "", name.lower())
