"""Errors planted in compiled PTX where ptx.h's assembly is: the emulator cannot see them, so the PTX tests must."""

from __future__ import annotations

import re
from collections.abc import Callable

REGISTERS = r"\s*,\s*".join([r"(%\w+)"] * 4)
# name -> pattern in the PTX, replacement
MUTATIONS: dict[str, tuple[str, str | Callable[[re.Match[str]], str]]] = {
    "lop3 operands swapped": (
        r"(lop3\.b32\s+%\w+,\s*)([%\w]+),(\s*[%\w]+),\s*([%\w]+),",
        r"\g<1>\g<4>,\g<3>, \g<2>,",
    ),
    "mma a1 and a2 swapped": (
        rf"(mma\.sync[\w.]+\s*{{[^}}]*}},\s*){{{REGISTERS}}}",
        r"\g<1>{\g<2>,\g<4>,\g<3>,\g<5>}",
    ),
    "ldmatrix not transposed": (r"(ldmatrix\.[\w.]*)\.trans\b", r"\g<1>"),
    "wait_group off by one": (r"cp\.async\.wait_group\s+(\d+)", lambda m: f"cp.async.wait_group {int(m[1]) + 1}"),
    "cp.async size ignored": (r"(cp\.async\.cg\.[^;]*\],\s*16),\s*%\w+;", r"\g<1>;"),
}


def applies(ptx: str, name: str) -> bool:
    """Whether the PTX has what the mutation changes."""
    return re.search(MUTATIONS[name][0], ptx) is not None


def mutate(ptx: str, name: str) -> str:
    """The PTX with the error `name` everywhere it can be. ValueError if that changes nothing."""
    pattern, replacement = MUTATIONS[name]
    mutant = re.sub(pattern, replacement, ptx)
    if mutant == ptx:
        raise ValueError(f"nothing in this PTX for the mutation '{name}'")
    return mutant
