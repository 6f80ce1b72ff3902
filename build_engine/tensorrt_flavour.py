"""The TensorRT that a target is built with; the only module that names the package.

TensorRT-RTX (RTX GPUs, builds without one) is what a host can use. A Jetson's TensorRT exists only on the board.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edge.errors import EdgeError, UsageError

_RTX_LIBRARY = "libtensorrt_rtx.so"


@dataclass(frozen=True)
class Flavour:
    """`name` with the version, as 'TensorRT-RTX 1.7.1.116'; `api` is the package."""

    name: str
    api: Any


@cache
def load_flavour(target: str) -> Flavour:
    """Import the target's TensorRT, ready for networks with plugins; UsageError if there is none here."""
    if target == "jetson":
        raise UsageError("a Jetson's engine can only be built on the board, which is not supported yet; build for rtx")
    if target != "rtx":
        raise UsageError(f"unknown target {target!r}; the only engine that can be built is rtx")
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise UsageError("TensorRT-RTX is not installed; run: pip install 'minicpm-edge[rtx]'")
    try:
        api: Any = importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        raise EdgeError(f"TensorRT-RTX does not load ({error}); reinstall 'minicpm-edge[rtx]'") from None
    _make_plugins_loadable()
    return Flavour(f"TensorRT-RTX {api.__version__}", api)


def _make_plugins_loadable() -> None:
    """Let the ONNX parser find the library it is part of.

    At its first plugin the parser opens "libtensorrt_rtx.so", a name that the wheel does not ship (it has
    libtensorrt_rtx.so.1), and ends the process if that fails. The dynamic loader takes a library it already holds
    for any request of its SONAME, so an empty library of that SONAME which depends on the real one answers it.
    It exists in memory only: nothing to install, to clean up or to race for.
    """
    try:
        ctypes.CDLL(_RTX_LIBRARY)  # the system's own installation has the name
        return
    except OSError:
        pass
    descriptor = os.memfd_create(_RTX_LIBRARY)
    try:
        os.write(descriptor, alias_library(_RTX_LIBRARY, f"{_RTX_LIBRARY}.1"))
        ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError as error:
        raise EdgeError(f"TensorRT-RTX's ONNX parser cannot be given {_RTX_LIBRARY}: {error}") from None
    finally:
        os.close(descriptor)


def alias_library(soname: str, needed: str) -> bytes:
    """A shared library (64-bit ELF, little endian) without code, called `soname`, that depends on `needed`."""
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    headers, entries, symbol = 64 + 3 * 56, 7, bytes(24)
    dynamic_at = headers
    symbols_at = dynamic_at + 16 * entries
    strings_at = symbols_at + len(symbol)
    size = strings_at + len(strings)
    dynamic = [  # tag, value
        (14, 1),  # DT_SONAME
        (1, 2 + len(soname)),  # DT_NEEDED
        (5, strings_at),  # DT_STRTAB
        (10, len(strings)),  # DT_STRSZ
        (6, symbols_at),  # DT_SYMTAB
        (11, len(symbol)),  # DT_SYMENT
        (0, 0),  # DT_NULL
    ]
    with Path("/proc/self/exe").open("rb") as interpreter:
        (machine,) = struct.unpack_from("<H", interpreter.read(20), 18)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0)  # 3: ET_DYN
    segments = [  # type, offset, size, alignment; all readable and writable
        (1, 0, size, 4096),  # PT_LOAD
        (2, dynamic_at, 16 * entries, 8),  # PT_DYNAMIC
        (0x6474E551, 0, 0, 16),  # PT_GNU_STACK: without it the loader would make the stack executable
    ]
    for kind, offset, length, alignment in segments:
        header += struct.pack("<IIQQQQQQ", kind, 6, offset, offset, offset, length, length, alignment)
    return header + b"".join(struct.pack("<qQ", *entry) for entry in dynamic) + symbol + strings
