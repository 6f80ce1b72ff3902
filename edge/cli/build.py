"""`edge build`: a bundle's graph becomes an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge.cli.console import note, print_json, progress_bar
from edge.cli.options import Json, parse_size


def build(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Bundle exported with --target rtx, tensorrt or jetson.")
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="rtx (TensorRT-RTX; needs no GPU to build), tensorrt (for the GPU that is here) or jetson (on the "
            "board). Default: the bundle's."
        ),
    ] = None,
    max_context: Annotated[int | None, typer.Option(min=1, help="Longest context. Default: the model's.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Most prompt tokens a step.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Most sequences a step.")] = 8,
    verify: Annotated[
        int,
        typer.Option(
            min=0, help="Tokens a sequence that a step of speculative decoding computes: one and drafted ones; 0: none."
        ),
    ] = 0,
    functions: Annotated[
        bool, typer.Option("--functions", help="Use the operators' ONNX functions instead of plugins: for checks.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory that building may take, as 4GiB. Default: what is free.")
    ] = None,
    json: Json = False,
) -> None:
    """Compile a bundle's graph into a TensorRT engine with profiles for prefill, decode and verification.

    An engine of the same bundle, TensorRT, GPU, plugins and options is kept. Too little memory is refused beforehand.

    Examples:

      edge export MiniCPM4-0.5B --out bundle-rtx --target rtx

      edge build bundle-rtx

      edge build bundle-jetson --batch 1 --memory 6GiB
    """
    from build_engine.tensorrt import BuildOptions, build_engine

    options = BuildOptions(
        target,
        max_context,
        chunk,
        batch,
        plugins=not functions,
        verify=verify,
        memory=None if memory is None else parse_size(memory),
    )
    with progress_bar("building", quiet=json) as progress:
        report = build_engine(bundle, options, progress)
    if json:
        print_json(report.to_dict())
    else:
        note(report.describe())
