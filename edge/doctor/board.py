"""Checks of a Jetson's system. Each gives None where it has no meaning."""

from __future__ import annotations

import re

from edge.doctor import jetson
from edge.doctor.finding import CPU, ON_CPU, Finding, Patient, gib

SMALL = 12 << 30  # bytes of memory below which a board needs the care of an Orin Nano
# A default of 256 MiB stopped TensorRT on an Orin Nano, which fell back to a piece of 593 MiB; above 950M the kernel
# finds no place for it (spec: anchor_tensorrt_edge_llm.md 5, number 24).
CMA_ENOUGH, CMA_ASKED = 600 << 20, "950M"
HOT = 85.0  # degrees Celsius; an Orin slows down at 99


def board(patient: Patient) -> Finding:
    """Which computer it is."""
    machine = patient.machine
    if not jetson.is_jetson(machine):
        return Finding("board", "ok", f"PC, {machine.architecture}")
    chip = jetson.soc(machine)
    found = f"{jetson.board(machine) or 'Jetson'}, {machine.architecture}, {chip or 'unknown chip'}"
    if chip == jetson.ORIN or not chip:
        return Finding("board", "ok", found)
    remedy = f"run models on its CPU: {ON_CPU}"
    return Finding("board", patient.bad, f"{found}: kernels exist for Orin ({jetson.ORIN}) only", remedy)


def jetpack(patient: Patient) -> Finding | None:
    """Whether its release has the TensorRT and CUDA that plugins need."""
    if not jetson.is_jetson(patient.machine):
        return None
    found = jetson.release(patient.machine)
    if found is None:
        return Finding(
            "JetPack",
            "note" if patient.target == CPU else "warning",
            "unknown: /etc/nv_tegra_release cannot be read",
            "in a container: docker run --runtime nvidia -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro ...",
        )
    name = jetson.jetpack(found)
    if found < (36, 0, 0):
        reason = "unsupported, its TensorRT 8 has no IPluginV3 and its Python 3.8 is too old"
        remedy = "install JetPack 6.2 or 7.2 with NVIDIA's SDK Manager"
        return Finding("JetPack", patient.bad, f"{name}: {reason}", remedy)
    if found < jetson.OLDEST:
        remedy = (
            "sudo sed -i 's/r36\\.[0-9]*/r36.4/' /etc/apt/sources.list.d/nvidia-l4t-apt-source.list && "
            "sudo apt update && sudo apt dist-upgrade && sudo apt install nvidia-jetpack && sudo reboot"
        )
        return Finding("JetPack", patient.bad, f"{name}: too old, its TensorRT 8.6 has no IPluginV3", remedy)
    if found[0] > jetson.NEWEST:
        return Finding("JetPack", "warning", f"{name}: newer than this version knows", "pip install -U minicpm-edge")
    return Finding("JetPack", "ok", name)


def cma(patient: Patient) -> Finding | None:
    """Memory reserved for large pieces in one block, which small boards take GPU memory from."""
    info = patient.machine.meminfo
    size = info.get("CmaTotal")
    if not jetson.is_jetson(patient.machine) or patient.target == CPU or size is None:
        return None
    found = f"{size >> 20} MiB"
    if size >= CMA_ENOUGH or info.get("MemTotal", 0) >= SMALL:
        return Finding("CMA", "ok", found)
    file, append = "/boot/extlinux/extlinux.conf", "/^[[:space:]]*APPEND/"
    remedy = f"sudo sed -i '{append} s/ cma=[^ ]*//; {append} s/$/ cma={CMA_ASKED}/' {file} && sudo reboot"
    return Finding("CMA", "warning", f"{found}: too little for TensorRT to build large engines on this board", remedy)


def swap(patient: Patient) -> Finding | None:
    """Room for what an engine build needs beside the GPU's memory."""
    machine, info = patient.machine, patient.machine.meminfo
    if not jetson.is_jetson(machine) or "SwapTotal" not in info:
        return None
    names = [line.split()[0] for line in machine.files.get("/proc/swaps", "").splitlines()[1:] if line.strip()]
    zram_only = bool(names) and all("zram" in name for name in names)
    size = gib(info["SwapTotal"]) if info["SwapTotal"] else "none"
    found = f"{size}{', zram (main memory, compressed)' if zram_only else ''}"
    if info.get("MemTotal", 0) >= SMALL or patient.target == CPU or (names and not zram_only):
        return Finding("swap", "ok", found)
    file = "/swapfile"
    remedy = f"sudo fallocate -l 8G {file} && sudo chmod 600 {file} && sudo mkswap {file} && sudo swapon {file}"
    if zram_only:
        return Finding("swap", "note", f"{found}; a file gives engine builds more room", remedy)
    return Finding("swap", "warning", "none: building an engine may end for lack of memory", remedy)


def power_mode(patient: Patient) -> Finding | None:
    """Whether the fastest mode is on; the published figures are those of MAXN."""
    machine = patient.machine
    if not jetson.is_jetson(machine):
        return None
    mode, modes = jetson.power_mode(machine), jetson.power_modes(machine)
    if mode is None:
        return Finding("power mode", "note", "unknown: nvpmodel does not tell", "sudo nvpmodel -q")
    found = mode.name if mode.name.startswith("mode ") else f"{mode.name} (mode {mode.id})"
    best = max(modes, key=lambda each: each.rank, default=None)
    if best is None or best.id == mode.id:
        return Finding("power mode", "ok", found)
    return Finding("power mode", "warning", f"{found}; {best.name} is faster", f"sudo nvpmodel -m {best.id}")


def clocks(patient: Patient) -> Finding | None:
    """Whether they are held at the maximum of the power mode, without which figures vary."""
    if not jetson.is_jetson(patient.machine):
        return None
    found = jetson.clocks(patient.machine)
    if "GPU" not in found:
        return Finding("clocks", "note", "unknown: no GPU in /sys/class/devfreq", "sudo jetson_clocks --show")
    words = ", ".join(f"{name} {c.current / 1e6:.0f} of {c.maximum / 1e6:.0f} MHz" for name, c in found.items())
    if all(clock.locked for clock in found.values()):
        return Finding("clocks", "ok", f"{words}, locked")
    loose = " and ".join(name for name, clock in found.items() if not clock.locked)
    remedy = "sudo jetson_clocks  # until the next boot"
    return Finding("clocks", "warning", f"{words}: {loose} not locked, so measurements vary", remedy)


def temperature(patient: Patient) -> Finding | None:
    """Whether it is about to slow down."""
    machine = patient.machine
    zones = jetson.temperatures(machine)
    if jetson.is_jetson(machine) and zones:
        name = max(zones, key=lambda zone: zones[zone])
        degrees, where = zones[name], name.removesuffix("-thermal")
    elif match := re.match(r"[^,]+, (\d+)", machine.said("nvidia-smi")):
        degrees, where = float(match[1]), "GPU"
    else:
        return None
    found = f"{degrees:.0f} °C ({where})"
    if degrees < HOT:
        return Finding("temperature", "ok", found)
    remedy = "sudo jetson_clocks --fan  # and let air reach it" if where != "GPU" else "let air reach it"
    return Finding("temperature", "warning", f"{found}: close to slowing down", remedy)


def supply(patient: Patient) -> Finding | None:
    """Whether the power supply made it slow down; short peaks (oc3) are usual under load in MAXN."""
    events = jetson.overcurrent_events(patient.machine)
    if not events:
        return None
    low, high, peaks = (events.get(name, 0) for name in ("oc1", "oc2", "oc3"))
    if low or high:
        found = f"slowed down since boot: {low} times by low voltage, {high} times by high current"
        return Finding("power supply", "warning", found, "use the board's own power supply, or a lower nvpmodel mode")
    return Finding(
        "power supply", "ok", f"{peaks} short peaks of current since boot" if peaks else "no event since boot"
    )
