"""Checks of what is installed and how much room there is. Each gives None where it has no meaning."""

from __future__ import annotations

import re

from edge.doctor import jetson
from edge.doctor.finding import CPU, Finding, Patient, Status, gib, short, version_of
from edge.doctor.gpu import LITTLE_MEMORY
from edge.doctor.machine import Machine

PYTHONS = ((3, 10), (3, 13))  # of pyproject.toml
OLDEST_TENSORRT = (10, 3)  # the first with aliased plugin inputs
LITTLE_DISK = 1 << 30
# Target -> package, and its name in edge/tensorrt.py.
TENSORRT = {
    "rtx": ("tensorrt_rtx", "TensorRT-RTX"),
    "tensorrt": ("tensorrt", "TensorRT"),
    "jetson": ("tensorrt", "TensorRT"),
}


def python(patient: Patient) -> Finding:
    """Its version, and whether it is that of JetPack's TensorRT."""
    version, found = version_of(patient.machine.python)[:2], patient.machine.python
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        limits = " to ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        return Finding("Python", "problem", f"{found}: it must be {limits}", f"make a venv of Python {limits}")
    return Finding("Python", "ok", f"{found}{', in a venv' if patient.machine.venv else ''}")


def tensorrt(patient: Patient) -> Finding:
    """The flavour that the target needs."""
    machine = patient.machine
    versions = tensorrt_versions(machine)
    if patient.target == CPU:
        there = ", ".join(f"{name} {version}" for name, version in versions.items())
        return Finding(
            "TensorRT", "note", f"{there}; it can build, but running takes a GPU" if there else "none; not needed"
        )
    package, name = TENSORRT[patient.target]
    if name not in versions:
        answer = machine.probed(package)
        return Finding("TensorRT", "problem", answer["error"], _tensorrt_remedy(patient, answer["code"]))
    found = f"{name} {versions[name]}"
    if name == "TensorRT" and version_of(versions[name]) < OLDEST_TENSORRT:
        remedy = _tensorrt_remedy(patient, "missing")
        return Finding("TensorRT", "problem", f"{found}: the plugins need 10.3 or newer", remedy)
    return Finding("TensorRT", "ok", found)


def tensorrt_versions(machine: Machine) -> dict[str, str]:
    """What can be imported, as {'TensorRT-RTX': '1.7.1.116'}."""
    answers = {name: machine.probed(package) for package, name in TENSORRT.values()}
    return {name: answer["version"] for name, answer in answers.items() if "version" in answer}


def _tensorrt_remedy(patient: Patient, code: str) -> str:
    """For a Jetson, whose TensorRT comes as a system package for the system's Python only: how to let it be seen."""
    machine = patient.machine
    if patient.target == "rtx":
        again = "" if code == "missing" else "--force-reinstall "
        return f"pip install {again}'minicpm-edge[rtx]'"
    if patient.target == "tensorrt":
        return "pip install -U tensorrt-cu13"
    pythons = [
        path.parents[2].name for path in machine.matching("/usr/lib/python3*/dist-packages/tensorrt/__init__.py")
    ]
    own = ".".join(machine.python.split(".")[:2])
    if not pythons:
        return "sudo apt update && sudo apt install python3-libnvinfer"
    new_venv = (
        f"/usr/bin/{pythons[0]} -m venv --system-site-packages ~/edge && ~/edge/bin/pip install 'minicpm-edge[jetson]'"
    )
    if f"python{own}" not in pythons:
        return f"{new_venv}  # TensorRT is for {pythons[0]}, this is {own}"
    if re.search(r"include-system-site-packages\s*=\s*false", machine.files.get(machine.venv, "")):
        config = short(machine.venv)
        return (
            f"sed -i '/^include-system-site-packages/ s/false/true/' {config}  # lets this venv see JetPack's packages"
        )
    return "sudo apt install --reinstall python3-libnvinfer" if code == "broken" else new_venv


def operators(patient: Patient) -> Finding:
    """The compiled operators of the CPU executor, and the compiler that makes them when the package is installed."""
    machine = patient.machine
    compiler = f"g++ {machine.said('g++')}" if machine.said("g++") else "no g++"
    if machine.operators:
        sets = ", ".join(name.removeprefix("libedge_ops_").removesuffix(".so") for name in machine.operators)
        return Finding("CPU operators", "ok", f"{sets}; {compiler}")
    status: Status = "warning" if patient.target == CPU else "note"
    install = "sudo apt install g++ && " if not machine.said("g++") else ""
    remedy = f"{install}pip install --force-reinstall --no-deps --no-cache-dir minicpm-edge"
    return Finding("CPU operators", status, f"not compiled ({compiler}): models run several times slower", remedy)


def memory(patient: Patient) -> Finding | None:
    """Main memory, which a Jetson's GPU shares."""
    total = patient.machine.meminfo.get("MemTotal")
    if total is None:
        return None
    free = patient.machine.available_memory
    found = f"{gib(free)} of {gib(total)} available"
    if free >= LITTLE_MEMORY:
        return Finding("memory", "ok", found)
    desktop = "; without the desktop there is more: sudo systemctl isolate multi-user.target"
    remedy = f"close other programs{desktop if jetson.is_jetson(patient.machine) else ''}"
    return Finding("memory", "warning", f"{found}; a small model's build takes {gib(LITTLE_MEMORY)}", remedy)


def disk(patient: Patient) -> Finding:
    """Space where compiled kernels are cached."""
    machine = patient.machine
    found = f"{gib(machine.cache_free)} free for the cache in {short(machine.cache)}"
    if machine.cache_free >= LITTLE_DISK:
        return Finding("disk", "ok", found)
    remedy = "free space there, or export EDGE_CACHE=FOLDER on another disk"
    return Finding("disk", "warning", found, remedy)
