"""What to launch: kernels and launches as plain data, made from shapes by pure functions (plugins/*/launch.py).

The same `Launch` runs in the emulator (plugins/simt/emulator.py), as interpreted PTX (plugins/simt/interpreter.py)
and, through the driver API, on a device. Every kernel takes one struct by value and one-dimensional blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

# A buffer's name, no buffer (a null pointer), or a number in the type that the struct gives it.
Argument = str | None | np.int32 | np.int64 | np.float32


@dataclass(frozen=True)
class Kernel:
    """One instantiation of a device function template.

    source: the file in plugins/ that defines it; body: the device function, as 'attend<half, 128>'; arguments: the
    struct it takes; threads: of a block; min_blocks: blocks an SM must hold (bounds the registers).
    """

    source: str
    body: str
    arguments: str
    threads: int
    min_blocks: int = 1

    @property
    def symbol(self) -> str:
        """The kernel's name in modules: 'attend_half_128'."""
        return re.sub(r"\W+", "_", self.body).strip("_")


@dataclass(frozen=True)
class Launch:
    """One kernel launch. shared_bytes: dynamic shared memory of a block; arguments: the struct's fields, in order."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    shared_bytes: int = 0

    def bind(self, names: Mapping[str, str]) -> Launch:
        """The launch on other buffers: `names` says what a buffer is called now; others keep their names."""
        bound = (names.get(a, a) if isinstance(a, str) else a for a in self.arguments)
        return replace(self, arguments=tuple(bound))

    def pack(self, addresses: Mapping[str, int]) -> bytes:
        """The struct as C lays it out, buffers replaced by their addresses."""
        packed, alignment = bytearray(), 1
        for argument in self.arguments:
            value = _value(argument, addresses)
            alignment = max(alignment, value.itemsize)
            packed += bytes(-len(packed) % value.itemsize) + value.tobytes()
        return bytes(packed + bytes(-len(packed) % alignment))

    def pointers(self) -> list[tuple[int, str]]:
        """Where in the packed struct which buffer's address stands."""
        found, end = [], 0
        for argument in self.arguments:
            size = _value(argument, None).itemsize
            end += -end % size
            if isinstance(argument, str):
                found.append((end, argument))
            end += size
        return found


def _value(argument: Argument, addresses: Mapping[str, int] | None) -> np.int32 | np.int64 | np.float32:
    if argument is None:
        return np.int64(0)
    if isinstance(argument, str):
        return np.int64(addresses[argument] if addresses is not None else 0)
    return argument


def divide_up(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


def module_file(architecture: str) -> str:
    """The name, in a bundle, of the module with all its kernels for 'sm_87'."""
    return f"kernels-{architecture}.cubin"


def module_source(kernels: list[Kernel]) -> str:
    """The translation unit that defines `kernels`: their files and one entry point each (KERNEL of simt/device.h)."""
    lines = ['#include "plugins/simt/device.h"']
    lines += [f'#include "plugins/{source}"' for source in sorted({kernel.source for kernel in kernels})]
    lines += [
        f"KERNEL({k.symbol}, {k.threads}, {k.min_blocks}, {k.arguments}, ({k.body}))" for k in dict.fromkeys(kernels)
    ]
    return "\n".join(lines) + "\n"
