"""Instructions whose result depends only on the same thread's operands: opcode -> a numpy function of registers.

One small function per family reads the opcode's modifiers and gives an `Operation`; FAMILIES is the table of all.
Arithmetic is in ptx_arithmetic.py, bits in ptx_bits.py; here are conversions, comparisons and selections.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from plugins.simt.ptx_arithmetic import ARITHMETIC, with_modifiers
from plugins.simt.ptx_bits import BIT_OPERATIONS, BITWISE
from plugins.simt.ptx_numbers import DTYPES, clamp, decode, encode, flush, to_float32
from plugins.simt.ptx_opcode import HALVES, ROUNDINGS, Function, Opcode, Operation, bits_of, is_float

INTEGRAL: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_integer(values: np.ndarray, source: str, kind: str) -> np.ndarray:
    """Integral float64 values -> integers of type `kind`, clamped; NaN -> 0, or the top bit alone at 64 bits."""
    limits = np.iinfo(DTYPES[kind].name)
    inside = (values >= float(limits.min)) & (values < float(limits.max) + (bits_of(kind) < 64))
    converted = np.where(inside, values, 0).astype(DTYPES[kind])
    converted = np.where(values < float(limits.min), DTYPES[kind].type(limits.min), converted)
    converted = np.where(values > 0, np.where(inside, converted, DTYPES[kind].type(limits.max)), converted)
    if "64" not in source + kind:
        return converted
    return np.where(np.isnan(values), np.uint64(1 << (bits_of(kind) - 1)).astype(DTYPES[kind]), converted)


def convert(opcode: Opcode) -> Operation:
    """cvt between any two types."""
    rounding, ftz, sat = opcode.one_of(*ROUNDINGS, *INTEGRAL), opcode.has("ftz"), opcode.has("sat")
    kind, source = opcode.take_type(), opcode.take_type()
    if kind.endswith("x2"):
        return convert_two(opcode, kind, source, rounding)
    if is_float(source):
        value = float_conversion(opcode, kind, source, rounding)
    elif is_float(kind):
        value = integer_to_float(opcode, kind, source, rounding)
    elif sat:
        return Operation(lambda a: clamp(a, kind), kind, (source,))
    else:
        return Operation(lambda a: a.astype(DTYPES[kind]), kind, (source,))
    if (ftz or sat) and (source, kind) != ("f32", "f32"):
        if ftz or is_float(kind):
            raise opcode.unknown()
        sat = False  # conversions to integers always clamp
    return Operation(with_modifiers(value, ftz, sat), kind, (source,))


def convert_two(opcode: Opcode, kind: str, source: str, rounding: str | None) -> Operation:
    """cvt.rn.f16x2.f32 d, a, b: a becomes the upper half."""
    if (source, rounding) != ("f32", "rn"):
        raise opcode.unknown()
    half = kind.removesuffix("x2")

    def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return encode(half, np.stack([low, high], axis=1).astype(np.float64)).view(np.uint32)[:, 0]

    return Operation(pack, kind, (source, source))


def float_conversion(opcode: Opcode, kind: str, source: str, rounding: str | None) -> Function:
    """From floating point to anything."""
    if not is_float(kind):
        if rounding not in INTEGRAL:
            raise opcode.unknown()
        return lambda a: float_to_integer(INTEGRAL[rounding](decode(source, a)), source, kind)
    if rounding in INTEGRAL:
        return lambda a: encode(kind, INTEGRAL[rounding](decode(source, a)))
    if kind == "f32":
        return lambda a: to_float32(decode(source, a), rounding or "rn")
    if rounding not in (None, "rn"):
        raise opcode.unknown()
    return lambda a: encode(kind, decode(source, a))


def integer_to_float(opcode: Opcode, kind: str, source: str, rounding: str | None) -> Function:
    if rounding == "rn" and kind == "f32":
        return lambda a: a.astype(np.float32)  # directly: 64 bits do not fit float64
    if rounding == "rn":
        return lambda a: encode(kind, a.astype(np.float64))
    if rounding in ROUNDINGS and kind == "f32" and bits_of(source) < 64:
        return lambda a: to_float32(a.astype(np.float64), rounding)
    raise opcode.unknown()


ORDERED: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(opcode: Opcode, name: str, kind: str) -> Function:
    """The test `name` on values of type `kind`. Floats: true of NaN are only the names that end in u, and nan."""
    if not is_float(kind):
        if name not in (*ORDERED, *UNSIGNED):
            raise opcode.unknown()
        return ORDERED[UNSIGNED.get(name, name)]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name.endswith("u"):
        return lambda a, b: ORDERED[name[:2]](a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return ORDERED[name]


def set_predicate(opcode: Opcode) -> Operation:
    """setp.<comparison>[.and|.or|.xor].<type> p, a, b[, c]"""
    name = opcode.take(*ORDERED, *UNSIGNED, *(f"{n}u" for n in ORDERED), "num", "nan")
    combine = opcode.one_of("and", "or", "xor")
    kind, ftz = opcode.take_type(), opcode.has("ftz")
    if kind.endswith("x2"):
        raise opcode.unknown()
    test = comparison(opcode, name, kind)
    if kind in HALVES:
        compare: Function = lambda a, b: test(decode(kind, a), decode(kind, b))  # noqa: E731
    else:
        compare = (lambda a, b: test(flush(a), flush(b))) if ftz else test
    if combine is None:
        return Operation(compare, "pred", (kind, kind))
    return Operation(lambda a, b, c: BITWISE[combine](compare(a, b), c), "pred", (kind, kind, "pred"))


def select(opcode: Opcode) -> Operation:
    """selp d, a, b, p and slct d, a, b, c (a if c >= 0)."""
    kind = opcode.take_type()
    if opcode.base == "selp":
        return Operation(lambda a, b, p: np.where(p, a, b), kind, (kind, kind, "pred"))
    by = opcode.take_type("s32", "f32")
    return Operation(lambda a, b, c: np.where(c >= 0, a, b), kind, (kind, kind, by))


FAMILIES: dict[str, Callable[[Opcode], Operation]] = {
    **ARITHMETIC,
    **BIT_OPERATIONS,
    "cvt": convert,
    "setp": set_predicate,
    **dict.fromkeys(("selp", "slct"), select),
}


@cache
def operation(text: str) -> Operation:
    """What the opcode `text` does. Raises PtxFault if a modifier is unknown."""
    opcode = Opcode(text)
    found = FAMILIES[opcode.base](opcode)
    opcode.finish()
    return found
