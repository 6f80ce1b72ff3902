"""What every source of sensor values gives, and files of sysfs that are read again and again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol

# power: watts. energy: joules since an arbitrary start. clock: hertz. temperature: degrees Celsius.
# throttle: 1 while this reason holds clocks down, else 0. events: how often it did since the machine started.
Quantity = Literal["power", "energy", "clock", "temperature", "throttle", "events"]
Key = tuple[Quantity, str]
Reading = Mapping[Key, float]

OFF = -256.0  # degrees that a Jetson shows while a sensor's unit is off


class Unreadable(Exception):
    """A source is not there, or not for this user; the message says which and why, without a full stop."""


class Source(Protocol):
    """Sensors that are read together; `name` is for the report."""

    @property
    def name(self) -> str: ...

    def read(self) -> Reading:
        """The values at this moment; one that cannot be read now is left out, never 0."""
        ...

    def close(self) -> None: ...


class SysFile:
    """A file of sysfs that stays open: reading it again from its start asks the driver again."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def number(self) -> int | None:
        """The whole number in it; None if the driver does not answer now, as a sensor whose unit is off."""
        try:
            return int(os.pread(self._descriptor, 64, 0))
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        os.close(self._descriptor)


class SysFiles:
    """A source of one number a file; `files` has path and scale (a value in SI units is number x scale) by key."""

    def __init__(self, name: str, files: Mapping[Key, tuple[Path, float]], absent: str) -> None:
        """Files that this user may not open are left out; Unreadable if none is left, saying `absent` if none was."""
        self.name = name
        self._files: dict[Key, tuple[SysFile, float]] = {}
        refused = ""
        for key, (path, scale) in files.items():
            try:
                self._files[key] = (SysFile(path), scale)
            except OSError as error:
                refused = f"{path}: {error.strerror}"
        if not self._files:
            raise Unreadable(refused or absent)

    def read(self) -> Reading:
        numbers = ((key, file.number(), scale) for key, (file, scale) in self._files.items())
        return {key: number * scale for key, number, scale in numbers if number is not None}

    def close(self) -> None:
        for file, _ in self._files.values():
            file.close()


def text_of(path: Path) -> str:
    """The text of a file; "" if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Paths with numbers in numeric order: cpu2 before cpu10."""
    return sorted(paths, key=lambda path: (len(str(path)), str(path)))
