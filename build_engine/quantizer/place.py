"""Where a quantised checkpoint grows: `OUT.partial` beside its destination, resumable, renamed when it is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from build_engine.quantizer.write import REPORT, write_json
from edge.errors import EdgeError, UsageError

STATE = "state.json"


def partial_path(out: Path) -> Path:
    """The folder of an unfinished run."""
    place = Path(os.path.realpath(out))
    return place.with_name(place.name + ".partial")


@dataclass
class Partial:
    """An unfinished run: its folder, the settings that a run must share to resume it, and what is known of each layer.

    `layers[i]` is the report of layer i, whose shard is complete; layers follow one another without gaps.
    """

    folder: Path
    settings: dict[str, Any]
    layers: list[Any] = field(default_factory=list)

    def add_layer(self, report: Any) -> None:
        """The next layer's shard is written."""
        self.layers.append(report)
        self.save()

    def save(self) -> None:
        """Put the state on disk."""
        write_json(self.folder / STATE, {"settings": self.settings, "layers": self.layers})


def check_place(out: Path, overwrite: bool) -> None:
    """UsageError unless `out` may be written."""
    place = Path(os.path.realpath(out))
    if not place.parent.is_dir():
        raise UsageError(f"{place.parent} is no folder to write in; create it or choose another --out")
    if place.exists() and not overwrite:
        raise UsageError(f"{out} already exists; choose another --out or add --overwrite")
    if place.exists() and not (place / REPORT).is_file():
        raise UsageError(
            f"{out} exists and was not written by edge quantize, so --overwrite will not replace it; choose another "
            "--out"
        )


@contextmanager
def open_partial(out: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> Iterator[Partial]:
    """The run to work on, alone: a fresh one, or with `resume` the one that was left, if it has the same settings.

    EdgeError if another run holds it. UsageError if one was left and neither `resume` nor `overwrite` says what to do
    with it, if it was made with other settings, or if the folder is somebody else's.
    """
    folder = partial_path(out)
    taken = UsageError(
        f"{folder}, where an unfinished {out.name} would grow, holds something else; move it away or choose another "
        "--out"
    )
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise taken from None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EdgeError(f"another run is writing {folder}; wait for it or choose another --out") from None
        left = (folder / STATE).is_file()
        if not left and any(path.name != f"{STATE}.tmp" for path in folder.iterdir()):
            raise taken
        if left and not (resume or overwrite):
            raise UsageError(
                f"{folder} holds an interrupted run; add --resume to finish it or --overwrite to start anew"
            )
        partial = _resumed(folder, settings) if left and resume else Partial(folder, settings)
        for path in folder.iterdir():
            if not partial.layers or path.suffix == ".tmp":
                path.unlink()
        try:
            partial.save()
            yield partial
        finally:
            if not partial.layers:
                shutil.rmtree(folder)  # nothing worth resuming
    finally:
        os.close(descriptor)


def _resumed(folder: Path, settings: dict[str, Any]) -> Partial:
    try:
        state = json.loads((folder / STATE).read_bytes())
        partial = Partial(folder, state["settings"], list(state["layers"]))
    except (ValueError, KeyError, TypeError) as error:
        raise EdgeError(f"{folder / STATE} is damaged ({error}); start anew with --overwrite") from None
    for name, value in settings.items():
        if (before := partial.settings.get(name)) != value:
            raise UsageError(
                f"{folder} was begun with another {name} ({before}, now {value}); give the same, or start anew with "
                "--overwrite"
            )
    return partial


def publish(partial: Partial, out: Path) -> None:
    """Put the finished folder in place. A checkpoint that it replaces is moved aside first, and back if that fails."""
    place = Path(os.path.realpath(out))
    for path in (*partial.folder.iterdir(), partial.folder):
        _sync(path)
    if not place.exists():
        os.rename(partial.folder, place)
    else:
        old = place.with_name(f"{place.name}.old-{os.getpid()}")
        try:
            os.rename(place, old)
            os.rename(partial.folder, place)
        finally:
            if not place.exists():
                os.rename(old, place)
            shutil.rmtree(old, ignore_errors=True)
    (place / STATE).unlink()
    _sync(place.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """What the disk refuses, in one sentence; the finished layers stay."""
    try:
        yield
    except OSError as error:
        remedy = "check the folder and its permissions, or choose another --out"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "make room and go on with --resume, or choose another --out"
        raise EdgeError(f"writing {partial_path(out)} failed ({error.strerror}); {remedy}") from error


def require_space(out: Path, needed: int) -> None:
    """EdgeError if the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(partial_path(out).parent).free
    if free < needed:
        raise EdgeError(
            f"{out} needs {needed / 2**30:.1f} GiB on disk but {free / 2**30:.1f} GiB are free; make room or choose "
            "another --out"
        )
