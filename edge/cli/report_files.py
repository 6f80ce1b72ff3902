"""The files that --html, --markdown and --output ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge.cli import options as opt
from edge.cli.console import note

Form = tuple[Path, Callable[[Any], str]]


def wanted_forms(*forms: tuple[Path | None, Callable[[Any], str]]) -> list[Form]:
    """Those with a path, which is checked before the work rather than after it."""
    wanted = [(path, render) for path, render in forms if path is not None]
    for path, _ in wanted:
        opt.check_output(path)
    return wanted


def write_forms(wanted: list[Form], report: Any, what: str = "report") -> None:
    """Write each whole or not at all, and say so."""
    from edge.bench.report import write_text

    for path, render in wanted:
        write_text(path, render(report))
        note(f"{what} written to {path}")
