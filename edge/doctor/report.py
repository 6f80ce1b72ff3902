"""All checks of a machine, as a table for a person and as JSON for a report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edge.bundle import Bundle
from edge.doctor import board, gpu, jetson, software
from edge.doctor.bundle import check_bundle, fits, open_or_blame
from edge.doctor.finding import CPU, Finding, Patient
from edge.doctor.machine import Machine
from plugins.build.embed import TARGETS

CHECKS = (
    board.board,
    board.jetpack,
    software.python,
    gpu.gpu,
    gpu.access,
    gpu.driver,
    gpu.cuda_bindings,
    software.tensorrt,
    software.memory,
    gpu.gpu_memory,
    board.cma,
    board.swap,
    software.disk,
    software.operators,
    board.power_mode,
    board.clocks,
    board.temperature,
    board.supply,
)
# What comes with JetPack: nothing is to be said of it, and nothing to be mended, in a release that is too old itself.
OF_JETPACK = (software.python, gpu.driver, gpu.cuda_bindings, software.tensorrt)
STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "problem": "bold red"}
_MEANT_FOR = {
    CPU: "ONNX Runtime on the CPU",
    "rtx": "TensorRT-RTX on its GPU",
    "tensorrt": "TensorRT on its GPU",
    "jetson": "TensorRT on a Jetson",
}


@dataclass(frozen=True)
class Diagnosis:
    """target: what the machine is meant for, and was judged by."""

    machine: Machine
    target: str
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """No problem; warnings and notes stop nothing."""
        return all(finding.status != "problem" for finding in self.findings)


def diagnose(machine: Machine, bundle: Path | None = None) -> Diagnosis:
    """Judge a machine by what it can be: the bundle's target if it is the machine's too, else the machine's own."""
    own = target = target_of(machine)
    opened = open_or_blame(bundle) if bundle is not None else None
    if isinstance(opened, Bundle) and fits(opened, own):
        target = opened.manifest.target
    patient = Patient(machine, target)
    release = jetson.release(machine)
    checks = [check for check in CHECKS if release is None or release >= jetson.OLDEST or check not in OF_JETPACK]
    findings = [finding for check in checks if (finding := check(patient)) is not None]
    if isinstance(opened, Bundle):
        findings += check_bundle(opened, patient, own)
    elif opened is not None:
        findings.append(opened)
    return Diagnosis(machine, target, tuple(findings))


def target_of(machine: Machine) -> str:
    """The best target for a machine: by its GPU, and on a PC by the TensorRT that is installed."""
    architecture = machine.probed("gpu").get("architecture")
    if jetson.is_jetson(machine):
        return "jetson" if jetson.soc(machine) in ("", jetson.ORIN) else CPU
    if not gpu.has_nvidia(machine) or (architecture and architecture not in TARGETS["rtx"]):
        return CPU
    installed = [name for name in ("tensorrt_rtx", "tensorrt") if "version" in machine.probed(name)]
    return "tensorrt" if installed == ["tensorrt"] else "rtx"


def to_values(diagnosis: Diagnosis) -> dict[str, Any]:
    """Plain JSON values: the findings, and the facts that a report of measurements needs."""
    return {
        "target": diagnosis.target,
        "healthy": diagnosis.healthy,
        "findings": [asdict(finding) for finding in diagnosis.findings],
        "machine": facts(diagnosis.machine),
    }


def facts(machine: Machine) -> dict[str, Any]:
    """What was read, in SI units and bytes; nothing that names person or host."""
    answer, info = machine.probed("gpu"), machine.meminfo
    release, mode = jetson.release(machine), jetson.power_mode(machine)
    fields = ("name", "architecture", "multiprocessors", "total_memory", "free_memory", "is_integrated")
    return {
        "board": jetson.board(machine) or None,
        "chip": jetson.soc(machine) or None,
        "architecture": machine.architecture,
        "jetpack": jetson.jetpack(release) if release else None,
        "python": machine.python,
        "gpu": {field: answer[field] for field in fields} if "name" in answer else None,
        "gpu_error": answer.get("error"),
        "cuda_driver": ".".join(map(str, answer["driver_version"])) if "name" in answer else None,
        "driver": machine.files.get("/sys/module/nvidia/version"),
        "cuda_bindings": answer.get("bindings"),
        "tensorrt": software.tensorrt_versions(machine),
        "memory_bytes": info.get("MemTotal"),
        "available_memory_bytes": machine.available_memory,
        "cma_bytes": info.get("CmaTotal"),
        "swap_bytes": info.get("SwapTotal"),
        "power_mode": mode.name if mode else None,
        "clocks": {name: asdict(clock) for name, clock in jetson.clocks(machine).items()},
        "temperatures": jetson.temperatures(machine),
        "overcurrent_events": jetson.overcurrent_events(machine),
    }


def terminal(diagnosis: Diagnosis) -> RenderableType:
    """What it is for, and a line a check."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Check", no_wrap=True)
    table.add_column("Status", no_wrap=True)
    table.add_column("Found", overflow="fold")
    for finding in diagnosis.findings:
        status = Text(finding.status, style=STYLES[finding.status])
        table.add_row(Text(finding.name), status, Text(finding.found))
    return Group(Text(f"This machine is judged as one for {_MEANT_FOR[diagnosis.target]}.\n", style="bold"), table)


def remedies(diagnosis: Diagnosis) -> Text:
    """What mends what was found, the worst first; commands stand on lines of their own, to be copied."""
    text = Text()
    for status in ("problem", "warning", "note"):
        for finding in diagnosis.findings:
            if finding.status == status and finding.remedy:
                text.append(f"\n{finding.name}", style=STYLES[status]).append(f" ({status})\n  {finding.remedy}")
    counts = [sum(finding.status == status for finding in diagnosis.findings) for status in ("problem", "warning")]
    summary = ", ".join(
        f"{count} {noun}{'s' * (count != 1)}" for count, noun in zip(counts, ("problem", "warning"), strict=True)
    )
    return text.append(f"{chr(10) * 2 if text else chr(10)}{summary}")
