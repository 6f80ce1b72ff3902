"""The kernels' language and the two ways to run it without a device: emulated C++ and interpreted PTX."""

from __future__ import annotations

from dataclasses import dataclass

from edge.errors import EdgeError


class KernelFault(EdgeError):
    """A kernel did something that a device would not survive or not define; the message says what and where."""


@dataclass(frozen=True)
class Report:
    """What a sequence of launches did.

    read, written: bytes moved between registers or shared memory and each global buffer, by its name (an atomic
    operation counts as written); bank_conflicts: wavefronts of ldmatrix beyond the fewest possible; mma: matrix
    instructions, counted once a warp.
    """

    read: dict[str, int]
    written: dict[str, int]
    bank_conflicts: int
    mma: int
