"""Where words go: results to stdout, everything else (errors, progress, notes) to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """A line for the person at the terminal."""
    err.print(text, style="dim", markup=False)


def write(text: str) -> None:
    """Model text, to stdout as it is: no markup, no wrapping, at once."""
    out.file.write(text)
    out.file.flush()


def print_json(values: Any) -> None:
    """One JSON document on stdout, for machines."""
    print(json.dumps(values, indent=1, ensure_ascii=False))


@contextmanager
def progress_bar(label: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on stderr that is gone when the work is done; yields update(done, total, what='').

    Silent if `quiet` or if stderr is no terminal.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal)
    with bar:
        task = bar.add_task(label, total=None)

        def update(done: int, total: int, what: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{label} {what[-28:]}".rstrip())

        yield update
