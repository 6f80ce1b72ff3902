"""`edge doctor`: what this machine lacks, and the command that mends it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge.cli.console import out, print_json, progress_bar
from edge.cli.options import Json


def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Folder that `edge export` wrote, to be judged as well.")
    ] = None,
    json: Json = False,
) -> None:
    """Check the board, GPU, driver, TensorRT, memory, power mode and clocks; changes nothing.

    Says for all that is missing what mends it. Exit code 1 if there is a problem for what this machine is meant for.

    Examples:

      edge doctor

      edge doctor bundle --json
    """
    from edge.doctor.machine import gather
    from edge.doctor.report import diagnose, remedies, terminal, to_values

    with progress_bar("examining", quiet=json):
        diagnosis = diagnose(gather(), bundle)
    if json:
        print_json(to_values(diagnosis))
    else:
        out.print(terminal(diagnosis), soft_wrap=False)
        out.print(remedies(diagnosis))
    if not diagnosis.healthy:
        raise typer.Exit(1)
