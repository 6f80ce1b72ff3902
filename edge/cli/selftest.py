"""`edge selftest`: does this device compute what it should, and how fast?"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from edge.cli import options as opt
from edge.cli.console import note, out, print_json, progress_bar
from edge.errors import EdgeError, UsageError

if TYPE_CHECKING:
    from edge.cuda import Device
    from edge.selftest.kernels import ModelResult, Progress
    from edge.selftest.model import GoldenResult
    from edge.selftest.report import SelftestReport


def selftest(
    bundle: Annotated[Path | None, typer.Argument(help="Folder that `edge export` wrote.", metavar="BUNDLE")] = None,
    record: Annotated[bool, typer.Option("--record", help="Write the tokens that BUNDLE gives here into it.")] = False,
    json: opt.Json = False,
) -> None:
    """Check the CUDA kernels on this device against numpy, and time them at the sizes of a decode step.

    With a bundle, its own kernels at its model's sizes. Without one, those of MiniCPM4-8B and 0.5B: wheels carry them
    for Jetson boards, elsewhere they are compiled here, which needs the compilers of the extra "kernels".

    The small model that `edge export selftest` makes goes through its TensorRT engine too, and must give the 32 tokens
    that exact arithmetic gives. A bundle for the CPU has no CUDA kernels: that model runs on the CPU. A bundle with a
    record must give the tokens of its record.

    Examples:

      edge selftest bundle

      edge selftest --json > selftest.json

      edge selftest bundle --record        # on the machine that is right; then copy the bundle

      edge export selftest --target jetson --out st && edge build st && edge selftest st
    """
    from edge.selftest.report import failure, terminal, to_values

    if record:
        _record(bundle)
        return
    with progress_bar("checking", quiet=json) as progress:
        report = _check(bundle, progress)
    if json:
        print_json(to_values(report))
    else:
        out.print(terminal(report))
    if (sentence := failure(report)) is not None:
        raise EdgeError(sentence)


def _record(path: Path | None) -> None:
    from edge.engine import open_engine
    from edge.plan import EngineOptions
    from edge.selftest.model import CONTEXT, GOLDEN, record_golden

    if path is None:
        raise UsageError("--record needs the bundle whose tokens are to be recorded; give its folder")
    tokens = record_golden(open_engine(path, EngineOptions(context=CONTEXT))).tokens
    note(f"{path / GOLDEN}: {len(tokens)} golden tokens; `edge selftest` asks every machine for them")


def _check(path: Path | None, progress: Progress) -> SelftestReport:
    from edge.bundle import open_bundle
    from edge.doctor.finding import CPU
    from edge.selftest.report import SelftestReport

    if path is not None and open_bundle(path).manifest.target == CPU:
        return SelftestReport(None, [], _check_tokens(path) or _check_made())
    from edge.cuda import open_device

    device = open_device()
    models = _check_bundle(path, device, progress) if path else _check_published(device, progress)
    return SelftestReport(device, models, _check_tokens(path) if path else None)


def _check_bundle(path: Path, device: Device, progress: Progress) -> list[ModelResult]:
    from edge.bundle import open_bundle
    from edge.cuda import Kernels
    from edge.selftest.kernels import run_model
    from edge.selftest.vectors import kernels_of

    bundle = open_bundle(path)
    model, module = kernels_of(bundle.manifest), bundle.kernels(device.architecture)
    title = f"{bundle.manifest.name}, {bundle.manifest.weights['description']}"
    return [run_model(title, model, Kernels(module, device), progress)]


def _check_tokens(path: Path) -> GoldenResult | None:
    """Golden tokens through the executor; None of a bundle that has none."""
    from edge.bundle import open_bundle
    from edge.engine import open_engine
    from edge.plan import EngineOptions
    from edge.selftest.model import CONTEXT, golden_of, run_golden

    if golden_of(open_bundle(path, verify=False)) is None:
        return None
    return run_golden(open_engine(path, EngineOptions(context=CONTEXT)))


def _check_made() -> GoldenResult | None:
    """The self-test's model, made here in float32, through this machine's CPU kernels."""
    from build_engine.export import ExportOptions, export_bundle
    from build_engine.formats import WeightFormat
    from build_engine.selftest_model import selftest_checkpoint

    with TemporaryDirectory() as folder:
        options = ExportOptions(weights=WeightFormat("exact"))
        return _check_tokens(export_bundle(selftest_checkpoint(), Path(folder) / "bundle", options))


def _check_published(device: Device, progress: Progress) -> list[ModelResult]:
    """The models that everybody has, with kernels that came along, or are compiled for this device."""
    from edge.cuda import Kernels
    from edge.selftest.kernels import run_model
    from edge.selftest.modules import shipped_module
    from edge.selftest.vectors import PUBLISHED
    from plugins.build.nvrtc import cubin
    from plugins.build.registry import kernels_for

    results = []
    for title, model in PUBLISHED.items():
        module = shipped_module(title, device.architecture)
        if module is None:
            needed = kernels_for(model.config, model.element, model.kv_element, model.weights, model.head)
            module = cubin(needed, device.architecture)
        results.append(run_model(title, model, Kernels(module, device), progress))
    return results
