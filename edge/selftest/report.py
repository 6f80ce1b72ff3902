"""What `edge selftest` prints: a table for a terminal of 80 columns, JSON values, and the sentence of a failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edge.bench.tables import format_number
from edge.cuda import Device
from edge.selftest.kernels import ModelResult, Result, is_emulated
from edge.selftest.model import GoldenResult

EMULATED = "emulated here"
ON_CPU = "ONNX Runtime on the CPU"


@dataclass(frozen=True)
class SelftestReport:
    """The kernels of some models on one device, and golden tokens if any were run; no device: on the CPU."""

    device: Device | None
    models: Sequence[ModelResult]
    golden: GoldenResult | None = None

    @property
    def where(self) -> str:
        """What it ran on."""
        return ON_CPU if self.device is None else self.device.name

    @property
    def emulated(self) -> bool:
        """Whether the device is none."""
        return self.device is not None and is_emulated(self.device)

    @property
    def failures(self) -> list[Result]:
        """Vectors that exceed their tolerance."""
        return [r for model in self.models for r in model.results if not r.deviation.passed]


def failure(report: SelftestReport) -> str | None:
    """One sentence about the first wrong kernel, else about wrong tokens; None if all is right."""
    if not report.failures:
        golden = report.golden
        return None if golden is None or golden.passed else f"{report.where}: {golden.describe()}"
    first, *others = report.failures
    wrong = first.deviation
    more = f"; {len(others)} more {'vector is' if len(others) == 1 else 'vectors are'} wrong" if others else ""
    return (
        f"{', '.join(first.kernels)} on {report.where}: {wrong.buffer} of {first.name} is off by "
        f"{format_error(wrong.error)} where {format_error(wrong.allowed)} is allowed{more}; do not use this device "
        "with this build, and report it"
    )


def format_error(error: float) -> str:
    """Two significant digits: 0, 5.4e-04, nan."""
    return "0" if error == 0 else f"{error:.1e}"


def to_values(report: SelftestReport) -> dict[str, Any]:
    """Plain JSON values; seconds and gb_s are null where nothing was timed."""
    device = report.device
    return {
        "schema_version": 1,
        "device": None if device is None else _device_values(device),
        "execution": EMULATED if report.emulated else "measured here",
        "passed": failure(report) is None,
        "golden": None if report.golden is None else {"passed": report.golden.passed, **asdict(report.golden)},
        "models": [
            {"title": model.title, "vectors": [_values(result) for result in model.results]} for model in report.models
        ],
    }


def _device_values(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "architecture": device.architecture,
        "multiprocessors": device.multiprocessors,
        "memory_bytes": device.total_memory,
        "driver": list(device.driver_version),
    }


def _values(result: Result) -> dict[str, Any]:
    deviation = result.deviation
    finite = deviation.error == deviation.error and deviation.error != float("inf")
    return {
        "name": result.name,
        "kernels": list(result.kernels),
        "passed": deviation.passed,
        "worst_buffer": deviation.buffer,
        "error": deviation.error if finite else None,  # JSON has no NaN
        "allowed": deviation.allowed,
        "moved_bytes": result.moved,
        "seconds": result.seconds,
        "gb_s": result.gb_s,
    }


def terminal(report: SelftestReport) -> RenderableType:
    """The report for a terminal; readable without colour and when piped into a file."""
    parts: list[RenderableType] = [] if report.device is None else _kernels(report, report.device)
    if report.golden is not None:
        engine = ON_CPU if report.device is None else "TensorRT engine"
        parts.append(Text(f"{engine}: {report.golden.describe()}.", style="" if report.golden.passed else "bold red"))
    if report.device is not None and not report.emulated:
        parts.append(Text("Times: medians of replayed CUDA graphs. GB/s: by bytes that must move.", style="dim"))
    return Group(*parts)


def _kernels(report: SelftestReport, device: Device) -> list[RenderableType]:
    driver = ".".join(map(str, device.driver_version))
    results = sum(len(model.results) for model in report.models)
    right = results - len(report.failures)
    parts: list[RenderableType] = [
        Text(f"Kernels on {device.name}", style="bold"),
        Text(f"{device.architecture}, {device.multiprocessors} multiprocessors, CUDA driver {driver}.\n"),
    ]
    for model in report.models:
        parts += [Text(model.title, style="bold"), _table(model.results, emulated=report.emulated), Text()]
    parts.append(Text(f"{right} of {results} vectors are right.", style="green" if right == results else "bold red"))
    return parts


def _table(results: Sequence[Result], *, emulated: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Vector", no_wrap=True)
    for heading in ("", "Error", "Allowed", *((EMULATED,) if emulated else ("us", "GB/s"))):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        wrong = result.deviation
        speed = ["-"]
        if not emulated:
            speed = [format_number(result.seconds and result.seconds * 1e6), format_number(result.gb_s)]
        table.add_row(
            escape(result.name),
            "ok" if wrong.passed else "[bold red]WRONG[/]",
            format_error(wrong.error),
            format_error(wrong.allowed),
            *speed,
        )
    return table
