"""Machines as they were recorded, healthy and spoiled, for the tests of `edge doctor`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge.doctor.finding import Finding
from edge.doctor.machine import COMMANDS, PROBES, Machine, Output, gather, probe_command
from edge.doctor.report import Diagnosis

GIB = 1 << 30

# Texts as boards show them (Jetson Linux 35, 36.4 and 39.2).
RELEASE = "# R{0} (release), REVISION: {1}, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
MODES_NANO = """
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< POWER_MODEL ID=3 NAME=7W >
< PM_CONFIG DEFAULT=1 >
"""
MODES_AGX = "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=MODE_15W >\n< POWER_MODEL ID=2 NAME=MODE_30W >\n"
ORIN_GPU = {
    "name": "Orin",
    "architecture": "sm_87",
    "multiprocessors": 8,
    "total_memory": 7990 << 20,
    "is_integrated": True,
    "driver_version": [12, 6],
    "ordinal": 0,
    "free_memory": 5 * GIB,
    "bindings": "12.9.10",
}
RTX_GPU = {
    **ORIN_GPU,
    "name": "NVIDIA GeForce RTX 4070",
    "architecture": "sm_89",
    "multiprocessors": 46,
    "total_memory": 12 * GIB,
    "is_integrated": False,
    "driver_version": [13, 0],
    "free_memory": 11 * GIB,
    "bindings": "13.5.0",
}
NO_RTX = {"error": "tensorrt_rtx is not installed", "code": "missing"}
NO_TENSORRT = {"error": "tensorrt is not installed", "code": "missing"}
NO_BINDINGS = {"error": "cuda-bindings is missing", "code": "no bindings", "bindings": None}
NO_DRIVER = {"error": "cuInit is not to be had; install it", "code": "no driver", "bindings": "13.5.0"}


def meminfo(total: int, *, cma: int | None = None, swap: int = 0) -> str:
    lines = [f"MemTotal: {total // 1024} kB", f"MemAvailable: {total // 2048} kB", f"SwapTotal: {swap // 1024} kB"]
    return "\n".join(lines if cma is None else [*lines, f"CmaTotal:         {cma // 1024} kB"]) + "\n"


def devfreq(name: str, current: int, low: int, high: int) -> dict[str, str]:
    values = {"cur": current, "min": low, "max": high}
    return {f"sys/class/devfreq/{name}/{which}_freq": f"{value}\n" for which, value in values.items()}


def orin(release: tuple[str, str], model: str, memory: int, modes: str) -> dict[str, str]:
    """The tree of a healthy board: a large CMA, a swap file, clocks locked."""
    return {
        "proc/device-tree/model": f"{model}\0",
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
        "etc/nv_tegra_release": RELEASE.format(*release),
        "proc/meminfo": meminfo(memory, cma=960 << 20, swap=8 * GIB),
        "proc/swaps": "Filename Type Size Used Priority\n/swapfile file 8388604 0 -2\n",
        "etc/nvpmodel.conf": modes,
        **devfreq("17000000.gpu", 1020000000, 1020000000, 1020000000),
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "49468\n",
        "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",  # its unit is off: no temperature
        "sys/class/thermal/thermal_zone8/type": "tj-thermal\n",
        "sys/class/thermal/thermal_zone8/temp": "50125\n",
        "sys/class/hwmon/hwmon3/oc1_event_cnt": "0\n",
        "sys/class/hwmon/hwmon3/oc2_event_cnt": "0\n",
        "sys/class/hwmon/hwmon3/oc3_event_cnt": "37\n",
    }


PC = {
    "proc/meminfo": meminfo(32 * GIB),
    "sys/bus/pci/devices/0000:00:1f.3/vendor": "0x8086\n",
    "sys/bus/pci/devices/0000:00:1f.3/class": "0x040300\n",
}
RTX_PC = {
    **PC,
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
    "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",
    "sys/module/nvidia/version": "580.65.06\n",
}


class Recorded:
    """A machine to be: files, what commands say, and what is not read from files."""

    def __init__(self, files: dict[str, str], answers: dict[str, Any], **fields: Any) -> None:
        self.files = dict(files)
        self.answers = {"groups": "me adm video render\n", "g++": "11.4.0\n", **answers}
        self.fields = {"venv": "", "operators": ("libedge_ops_armv8_2.so",), "cache_free": 50 * GIB, **fields}

    def machine(self, folder: Path) -> Machine:
        root = folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for name, text in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        machine = gather(root, self.run)
        files = {**machine.files, **self.fields.get("files", {})}
        return replace(machine, **{**self.fields, "files": files})

    def run(self, command: Sequence[str]) -> Output:
        names = {value: name for name, value in {**COMMANDS, **{name: probe_command(name) for name in PROBES}}.items()}
        answer = self.answers.get(names[tuple(command)])
        if isinstance(answer, dict):
            return Output(0, f"noise of a library\n{json.dumps(answer)}\n")
        return answer if isinstance(answer, Output) else Output(None if answer is None else 0, answer or "")


def nano_jetpack_6() -> Recorded:
    model = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    answers = {"nvpmodel": "NV Power Mode: MAXN_SUPER\n2\n", "gpu": ORIN_GPU}
    answers |= {"tensorrt": {"version": "10.3.0"}, "tensorrt_rtx": NO_RTX}
    files = orin(("36", "4.3"), model, 7990 << 20, MODES_NANO)
    files["usr/lib/python3.10/dist-packages/tensorrt/__init__.py"] = ""
    devices = {"/dev/nvmap": True, "/dev/nvhost-gpu": True}
    fields = {"architecture": "aarch64", "python": "3.10.12", "available_memory": 5 * GIB, "devices": devices}
    return Recorded(files, answers, **fields)


def agx_jetpack_7() -> Recorded:
    answers = {"nvpmodel": "NV Power Mode: MAXN\n0\n"}
    answers["gpu"] = {**ORIN_GPU, "multiprocessors": 16, "driver_version": [13, 2], "bindings": "13.5.0"}
    answers |= {"tensorrt": {"version": "10.16.2.10"}, "tensorrt_rtx": NO_RTX}
    files = orin(("39", "2.0"), "NVIDIA Jetson AGX Orin Developer Kit", 62 * GIB, MODES_AGX)
    files |= devfreq("bwmgr", 3199000000, 3199000000, 3199000000)
    files["proc/meminfo"] = meminfo(62 * GIB, cma=256 << 20)
    files["usr/lib/python3.12/dist-packages/tensorrt/__init__.py"] = ""
    fields = {
        "architecture": "aarch64",
        "python": "3.12.3",
        "available_memory": 40 * GIB,
        "devices": {"/dev/nvmap": True},
    }
    return Recorded(files, answers, **fields)


def agx_jetpack_5() -> Recorded:
    recorded = agx_jetpack_7()
    recorded.files["etc/nv_tegra_release"] = RELEASE.format("35", "4.1")
    recorded.answers["gpu"] = {**ORIN_GPU, "driver_version": [11, 4]}
    recorded.answers["tensorrt"] = {"version": "8.5.2.2"}
    recorded.fields["python"] = "3.8.10"
    return recorded


def rtx_pc() -> Recorded:
    answers = {"nvidia-smi": "580.65.06, 41\n", "gpu": RTX_GPU}
    answers |= {"tensorrt_rtx": {"version": "1.7.1.116"}, "tensorrt": NO_TENSORRT}
    devices = {"/dev/nvidiactl": True, "/dev/nvidia0": True}
    fields = {"architecture": "x86_64", "python": "3.12.3", "available_memory": 20 * GIB, "devices": devices}
    return Recorded(RTX_PC, answers, **fields)


def plain_pc() -> Recorded:
    answers: dict[str, Any] = {"gpu": NO_DRIVER, "tensorrt": NO_TENSORRT, "tensorrt_rtx": NO_RTX}
    return Recorded(PC, answers, architecture="x86_64", python="3.11.7", available_memory=20 * GIB, devices={})


PLAIN = Machine(
    architecture="x86_64",
    python="3.11.7",
    venv="",
    files={},
    outputs={name: Output(0, json.dumps(NO_DRIVER) if name in PROBES else "") for name in (*COMMANDS, *PROBES)},
    devices={},
    operators=(),
    available_memory=8 * GIB,
    cache=Path("/cache"),
    cache_free=8 * GIB,
)


def by_name(diagnosis: Diagnosis) -> dict[str, Finding]:
    found = {finding.name: finding for finding in diagnosis.findings}
    assert len(found) == len(diagnosis.findings)
    return found
