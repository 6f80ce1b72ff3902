"""`edge selftest`: does this device compute what it should, and how fast?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge.cli import options as opt
from edge.cli.console import out, print_json, progress_bar
from edge.errors import EdgeError

if TYPE_CHECKING:
    from edge.cuda import Device
    from edge.selftest.kernels import ModelResult, Progress
    from edge.selftest.model import GoldenResult


def selftest(
    bundle: Annotated[Path | None, typer.Argument(help="Folder that `edge export` wrote.", metavar="BUNDLE")] = None,
    json: opt.Json = False,
) -> None:
    """Check the CUDA kernels on this device against numpy, and time them at the sizes of a decode step.

    With a bundle, its own kernels at its model's sizes. Without one, those of MiniCPM4-8B and 0.5B: wheels carry them
    for Jetson boards, elsewhere they are compiled here, which needs the compilers of the extra "kernels".

    The small model that `edge export selftest` makes goes through its TensorRT engine too, and must give the 32 tokens
    that exact arithmetic gives.

    Examples:

      edge selftest bundle

      edge selftest --json > selftest.json

      edge export selftest --target jetson --out st && edge build st && edge selftest st
    """
    from edge.cuda import open_device
    from edge.selftest.report import SelftestReport, failure, terminal, to_values

    device = open_device()
    with progress_bar("checking", quiet=json) as progress:
        models = _check_bundle(bundle, device, progress) if bundle else _check_published(device, progress)
    report = SelftestReport(device, models, _check_tokens(bundle) if bundle else None)
    if json:
        print_json(to_values(report))
    else:
        out.print(terminal(report))
    if (sentence := failure(report)) is not None:
        raise EdgeError(sentence)


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
    """Golden tokens through the executor; None of a model that has none."""
    from edge.bundle import open_bundle
    from edge.engine import open_engine
    from edge.plan import EngineOptions
    from edge.selftest.model import CONTEXT, is_selftest_model, run_golden

    if not is_selftest_model(open_bundle(path)):
        return None
    return run_golden(open_engine(path, EngineOptions(context=CONTEXT)))


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
