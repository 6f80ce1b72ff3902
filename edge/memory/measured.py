"""What a run really takes, beside its plan."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.memory.ledger import MEMORY, Line

# What regions have more than their lines say is the headroom's; constants, on the CPU, have no line.
_REGIONS = {"headroom": ("weights", "activations"), "draft headroom": ("draft weights", "draft activations")}
_PAGE_PRESENT = np.uint64(1 << 63)  # Linux, Documentation/admin-guide/mm/pagemap.rst


@dataclass(frozen=True)
class Compared:
    """A line of the ledger: bytes planned, and measured (None: nothing here measures it). where: as in Line."""

    name: str
    planned: int
    measured: int | None
    where: str = MEMORY

    @property
    def difference(self) -> int | None:
        """Bytes measured beyond those planned."""
        return None if self.measured is None else self.measured - self.planned


def totals(rows: Sequence[Compared]) -> Compared:
    """The lines that the budget is for, added up; measured: of those that are."""
    counted = [row for row in rows if row.where == MEMORY]
    return Compared("total", sum(row.planned for row in counted), sum(row.measured or 0 for row in counted))


def compare(lines: Iterable[Line], measured: Mapping[str, int]) -> tuple[Compared, ...]:
    """Every line of a plan beside what an executor's `memory` says, in the plan's order."""
    planned = {line.name: line for line in lines}
    measured = dict(measured)
    for headroom, regions in _REGIONS.items():
        there = {name: planned[name].bytes if name in planned else 0 for name in regions if name in measured}
        if headroom in planned and there:
            measured[headroom] = sum(max(0, measured[name] - size) for name, size in there.items())
            measured |= {name: min(measured[name], size) for name, size in there.items()}
    return tuple(Compared(name, line.bytes, measured.get(name), line.where) for name, line in planned.items())


def mapped_bytes(path: Path) -> int | None:
    """Bytes of a file that are mapped, once or more often; None if the system does not tell."""
    try:
        inode, maps = path.stat().st_ino, Path("/proc/self/maps").read_text()
    except OSError:
        return None
    parts = []
    for line in maps.splitlines():  # from-to permissions offset device inode path
        columns = line.split(maxsplit=5)
        if int(columns[4]) == inode and len(columns) == 6:
            first, _, last = columns[0].partition("-")
            start = int(columns[2], 16)
            parts.append((start, start + int(last, 16) - int(first, 16)))
    total = end = 0
    for start, stop in sorted(parts):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def anonymous_bytes() -> int | None:
    """Resident memory of this process that is no file's; None if the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(sizes[0]) << 10 if sizes else None


def resident_bytes(array: np.ndarray) -> int:
    """Bytes of an array of its own pages that are in memory; those never written are not."""
    first, count = array.ctypes.data // mmap.PAGESIZE, -(-array.nbytes // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * count), np.uint64)
    return int(np.count_nonzero(entries & _PAGE_PRESENT)) * mmap.PAGESIZE
