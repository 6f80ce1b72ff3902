"""A shared library without code: it answers to a name and brings another library along."""

from __future__ import annotations

import struct
from pathlib import Path


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
