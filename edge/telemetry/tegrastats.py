"""`tegrastats`, for boards whose rails sysfs does not show: its lines as JetPack 4 to 7 print them, and the command.

The fields: Jetson Linux Developer Guide, "Tegrastats Utility". What differs between releases and boards: units (`mW`
since JetPack 5), the GPU's clock (`0%@1109`, `0%@[114]`, `0%@[0,0]`, `@[0,0,0]`, or none), capitals of the zones.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import time

from edge.telemetry.reading import OFF, Key, Reading, Unreadable

_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)(?:mW(?:/\d+mW)+|/\d+)(?=\s|$)")
_ZONE = re.compile(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C\b")
_GPU = re.compile(r"\bGR3D2?_FREQ (?:\d+%)?@\[?([\d,]+)")
_MEMORY = re.compile(r"\bEMC_FREQ (?:\d+%)?@(\d+)")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
PATIENCE = 2.0  # seconds until the first line, beyond its interval


def parse_line(line: str) -> Reading:
    """One line's power (of the moment, not the average), clocks and temperatures; empty if it is none of tegrastats'.

    A clock of 0 is that of a unit that is off, and left out. So is PMIC, whose temperature is a constant.
    """
    if not re.search(r"\bRAM \d+/\d+MB", line):
        return {}
    found: dict[Key, float] = {}
    for rail, milliwatts in _RAIL.findall(line):
        if rail != "NC":  # not connected
            found["power", rail] = int(milliwatts) / 1e3
    for zone, degrees in _ZONE.findall(line):
        if float(degrees) != OFF and zone != "PMIC":
            found["temperature", zone.lower()] = float(degrees)
    cores = _CPU.search(line)
    clocks = {
        "GPU": [int(part) for group in _GPU.findall(line) for part in group.split(",") if part],
        "memory": [int(part) for part in _MEMORY.findall(line)],
        "CPU": [int(part) for part in re.findall(r"%@(\d+)", cores[1])] if cores else [],
    }
    for unit, megahertz in clocks.items():
        if max(megahertz, default=0) > 0:
            found["clock", unit] = max(megahertz) * 1e6
    return found


class Tegrastats:
    """The command, which prints a line each `interval` seconds; what arrived since the last reading is one reading."""

    name = "tegrastats"

    def __init__(self, command: str, interval: float) -> None:
        arguments = [command, "--interval", str(max(1, round(interval * 1e3)))]
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        self._rest = b""
        self._first: Reading = {}

    def wait(self, seconds: float) -> bool:
        """Whether a first line comes in time; the next reading will be that line's."""
        end = time.monotonic() + seconds
        while not self._first and self._process.poll() is None and (left := end - time.monotonic()) > 0:
            select.select([self._pipe], [], [], left)
            self._first = self.read()
        return bool(self._first)

    def read(self) -> Reading:
        """The newest whole line; empty if none has come since."""
        if self._first:
            first, self._first = self._first, {}
            return first
        try:
            while chunk := os.read(self._pipe, 1 << 16):
                self._rest += chunk
        except BlockingIOError:
            pass
        lines, _, self._rest = self._rest.rpartition(b"\n")
        return parse_line(lines.rpartition(b"\n")[2].decode(errors="replace"))

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


def open_tegrastats(interval: float) -> Tegrastats:
    """Start the command on the PATH; Unreadable if there is none, or it prints no values."""
    command = shutil.which("tegrastats")
    if command is None:
        raise Unreadable("no tegrastats on the PATH")
    try:
        source = Tegrastats(command, interval)
    except OSError as error:
        raise Unreadable(f"{command}: {error.strerror}") from error
    if source.wait(PATIENCE + interval):
        return source
    source.close()
    raise Unreadable(f"{command} prints no values")
