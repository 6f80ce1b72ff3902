"""What a check says."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from typing import Literal

from edge.doctor.machine import Machine

Status = Literal["ok", "note", "warning", "problem"]
CPU = "onnxruntime"  # the target that needs no GPU
ON_CPU = "edge export CHECKPOINT --out bundle"  # what runs anywhere


@dataclass(frozen=True)
class Finding:
    """One line of the report. remedy: a command, or a change in words; "" if nothing is to be mended."""

    name: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Patient:
    """A machine and what it is meant for: an export target (plugins/build/embed.py), or CPU."""

    machine: Machine
    target: str

    @property
    def bad(self) -> Status:
        """How bad it is if the GPU cannot be used."""
        return "note" if self.target == CPU else "problem"


def version_of(text: str) -> tuple[int, ...]:
    """The leading numbers of '10.3.0.30-1'."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def gib(size: int) -> str:
    """Bytes as '7.4 GiB'."""
    return f"{size / 2**30:.1f} GiB"


def short(path: object) -> str:
    """A path that names no user and that a shell takes as it is."""
    text, home = str(path), os.path.expanduser("~")
    if home != "/" and text.startswith(f"{home}/"):
        return f"~/{shlex.quote(text[len(home) + 1 :])}"
    return shlex.quote(text)
