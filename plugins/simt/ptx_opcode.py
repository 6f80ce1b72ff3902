"""What an opcode says: its modifiers, and the numpy function of registers that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plugins.simt.ptx_numbers import DTYPES
from plugins.simt.ptx_parser import PtxFault

Function = Callable[..., Any]  # arrays -> array
HALVES = ("f16", "f16x2", "bf16", "bf16x2")
FLOATS = (*HALVES, "f32", "f64")
ROUNDINGS = ("rn", "rz", "rm", "rp")


class Opcode:
    """An opcode being read: every modifier must be taken by its family, or the instruction is unknown."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.base, *self.left = text.split(".")

    def has(self, modifier: str) -> bool:
        """Takes the modifier, if there."""
        if modifier not in self.left:
            return False
        self.left.remove(modifier)
        return True

    def one_of(self, *modifiers: str) -> str | None:
        """Takes the one that is there."""
        return next((modifier for modifier in modifiers if self.has(modifier)), None)

    def take(self, *modifiers: str) -> str:
        """Takes one of the modifiers, which must be there."""
        found = self.one_of(*modifiers)
        if found is None:
            raise self.unknown()
        return found

    def take_type(self, *allowed: str) -> str:
        """Takes the first type, one of `allowed` (default: any)."""
        return self.take(*[m for m in self.left if m in (allowed or DTYPES)])

    def finish(self) -> None:
        """Raises PtxFault if a modifier is left."""
        if self.left:
            raise self.unknown()

    def unknown(self) -> PtxFault:
        return PtxFault(f"unknown opcode {self.text}")


@dataclass(frozen=True)
class Operation:
    """function(operands of the given types, in numpy) -> the result, of type `result`."""

    function: Function
    result: str
    operands: tuple[str, ...]


def is_float(kind: str) -> bool:
    return kind in FLOATS


def bits_of(kind: str) -> int:
    return DTYPES[kind].itemsize * 8
