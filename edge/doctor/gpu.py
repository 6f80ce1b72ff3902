"""Checks of the GPU, its driver and cuda-bindings. Each gives None where it has no meaning."""

from __future__ import annotations

from edge.doctor import jetson
from edge.doctor.finding import CPU, ON_CPU, Finding, Patient, gib, version_of
from edge.doctor.machine import Machine
from plugins.build.embed import TARGETS

# The CUDA that a target's machine code is compiled with (plugins/build/nvrtc.py): an older driver does not load it.
NEEDED_CUDA = {"jetson": (12, 6), "rtx": (13, 0), "tensorrt": (13, 0)}
LITTLE_MEMORY = 2 << 30  # bytes; what building an engine of MiniCPM4-0.5B takes

_NEW_DRIVER = "install NVIDIA's driver 580 or newer (Ubuntu: sudo ubuntu-drivers install), then sudo reboot"


def has_nvidia(machine: Machine) -> bool:
    """Whether there is an NVIDIA GPU, with or without a driver that works."""
    if jetson.is_jetson(machine) or "name" in machine.probed("gpu") or machine.said("nvidia-smi"):
        return True
    vendors = machine.matching("/sys/bus/pci/devices/*/vendor")
    kinds = {path: machine.files.get(str(path.with_name("class")), "") for path in vendors}
    return any(text == "0x10de" and kinds[path].startswith("0x03") for path, text in vendors.items())


def gpu(patient: Patient) -> Finding:
    """Whether CUDA gives one that there are kernels for."""
    machine, answer = patient.machine, patient.machine.probed("gpu")
    if "name" in answer:
        found = f"{answer['name']}, {answer['architecture']}, {answer['multiprocessors']} SMs"
        if patient.target == CPU:
            known = answer["architecture"] in {sm for architectures in TARGETS.values() for sm in architectures}
            why = "not used" if known else "there are no kernels for it"
            return Finding("GPU", "note", f"{found}: {why}, models run on the CPU")
        if answer["architecture"] in TARGETS[patient.target]:
            return Finding("GPU", "ok", found)
        kernels = ", ".join(TARGETS[patient.target])
        remedy = f"use another machine, or its CPU: {ON_CPU}"
        return Finding("GPU", "problem", f"{found}: kernels for {patient.target} exist for {kernels}", remedy)
    if not has_nvidia(machine):
        if patient.target == CPU:
            return Finding("GPU", "note", "none of NVIDIA's; models run on the CPU")
        remedy = f"use another machine, or its CPU: {ON_CPU}"
        return Finding("GPU", "problem", f"none of NVIDIA's, and {patient.target} needs one", remedy)
    if answer["code"] == "no bindings":
        return Finding("GPU", "note", "not examined: that takes cuda-bindings")
    return Finding("GPU", patient.bad, answer["error"].split("; ")[0], _gpu_remedy(machine, answer["code"]))


def _gpu_remedy(machine: Machine, code: str) -> str:
    if code == "no driver" and jetson.is_jetson(machine):
        return "sudo apt install --reinstall nvidia-l4t-cuda; in a container: docker run --runtime nvidia ..."
    if code == "no driver":
        return f"{_NEW_DRIVER}; in a container: docker run --gpus all ..."
    if code == "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH":
        return "sudo reboot  # the driver was updated while it ran"
    if code == "CUDA_ERROR_NO_DEVICE":
        container = "--runtime nvidia" if jetson.is_jetson(machine) else "--gpus all"
        return f"unset CUDA_VISIBLE_DEVICES; in a container: docker run {container} ...; else sudo reboot"
    if code == "CUDA_ERROR_OUT_OF_MEMORY":
        return "close the programs that use the GPU"
    return "sudo reboot; if it stays, install the driver again"


def access(patient: Patient) -> Finding | None:
    """Whether this user may open the GPU's device files."""
    machine = patient.machine
    if not has_nvidia(machine):
        return None
    member_of = [name for name in ("video", "render") if name in machine.said("groups").split()]
    groups = f"groups {' and '.join(member_of)}" if member_of else "neither in group video nor render"
    if closed := [path for path, may in machine.devices.items() if not may]:
        remedy = "sudo usermod -aG video,render $USER  # then log in again"
        return Finding("device files", patient.bad, f"{closed[0]} may not be opened; {groups}", remedy)
    if not machine.devices and "name" in machine.probed("gpu"):
        return None  # as in WSL
    if not machine.devices:
        return Finding("device files", "note", "none, so the driver is not loaded, or this is a container")
    return Finding("device files", "ok", f"{len(machine.devices)} may be opened; {groups}")


def driver(patient: Patient) -> Finding | None:
    """Whether the driver is new enough for the machine code."""
    machine, answer = patient.machine, patient.machine.probed("gpu")
    kernel = machine.files.get("/sys/module/nvidia/version") or machine.said("nvidia-smi").partition(",")[0]
    cuda = tuple(answer.get("driver_version", ()))
    if not kernel and answer.get("code") == "no bindings" and has_nvidia(machine) and not jetson.is_jetson(machine):
        return Finding("driver", patient.bad, "none is loaded", _NEW_DRIVER)
    if not cuda:
        return Finding("driver", "note", f"{kernel}; its CUDA version is unknown") if kernel else None
    found = f"CUDA {cuda[0]}.{cuda[1]}{f', driver {kernel}' if kernel else ''}"
    needed = NEEDED_CUDA.get(patient.target, (0, 0))
    if cuda >= needed:
        return Finding("driver", "ok", found)
    remedy = "install JetPack 6.2 or 7.2 with NVIDIA's SDK Manager" if patient.target == "jetson" else _NEW_DRIVER
    return Finding("driver", "problem", f"{found}: the kernels need CUDA {needed[0]}.{needed[1]} or newer", remedy)


def cuda_bindings(patient: Patient) -> Finding | None:
    """Whether it is there and no newer than the driver."""
    machine, answer = patient.machine, patient.machine.probed("gpu")
    found = answer.get("bindings")
    if patient.target == CPU or answer.get("code") in ("crash", "timeout"):
        return None
    major = answer["driver_version"][0] if "driver_version" in answer else _driver_major(machine)
    wanted = "'cuda-bindings>=12.9,<13'" if major == 12 else "'cuda-bindings>=13'"
    if not found:
        return Finding("cuda-bindings", "problem", "missing", f"pip install {wanted}")
    if answer.get("code") == "no bindings":  # installed, but its import failed
        return Finding("cuda-bindings", "problem", answer["error"], f"pip install --force-reinstall {wanted}")
    if major and version_of(found)[0] > major:
        words = f"{found} is for CUDA {version_of(found)[0]}, the driver for CUDA {major}"
        return Finding("cuda-bindings", "problem", words, f"pip install {wanted}")
    return Finding("cuda-bindings", "ok", found)


def _driver_major(machine: Machine) -> int:
    """CUDA's major version by the release or the driver's number, where the driver itself was not asked; 0: unknown."""
    if (release := jetson.release(machine)) is not None:
        return 12 if release[0] <= 36 else 13
    kernel = version_of(machine.files.get("/sys/module/nvidia/version") or machine.said("nvidia-smi"))
    return (12 if kernel < (580,) else 13) if kernel else 0


def gpu_memory(patient: Patient) -> Finding | None:
    """Memory of a GPU that has its own."""
    answer = patient.machine.probed("gpu")
    if "name" not in answer or answer["is_integrated"]:
        return None
    found = f"{gib(answer['free_memory'])} of {gib(answer['total_memory'])} free"
    if answer["free_memory"] >= LITTLE_MEMORY or patient.target == CPU:
        return Finding("GPU memory", "ok", found)
    return Finding("GPU memory", "warning", found, "close the programs that nvidia-smi lists")
