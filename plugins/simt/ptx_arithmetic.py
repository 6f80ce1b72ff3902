"""Arithmetic instructions (PTX ISA 9.7.1 to 9.7.5). NaN results are some NaN: their bits are not those of a device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from plugins.simt.ptx_numbers import DTYPES, clamp, decode, encode, flush, sum_to_odd, to_float32
from plugins.simt.ptx_opcode import FLOATS, HALVES, ROUNDINGS, Function, Opcode, Operation, bits_of, is_float

# Functions of exact float64 values, whose results are rounded once.
EXACT: dict[str, Function] = {
    "add": sum_to_odd,
    "sub": lambda x, y: sum_to_odd(x, -y),
    "mul": np.multiply,  # of at most 24 bits each: exact
    "fma": lambda x, y, z: sum_to_odd(x * y, z),
}
# fp16 spans so few exponents that float64 rounds no sum into a tie.
EXACT_F16: dict[str, Function] = EXACT | {"add": np.add, "sub": np.subtract, "fma": lambda x, y, z: x * y + z}
WRAPPING: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def with_modifiers(function: Function, ftz: bool, sat: bool) -> Function:
    """.ftz flushes subnormal operands and results, .sat clamps to [0, 1] with NaN -> 0."""

    def modified(*operands: np.ndarray) -> np.ndarray:
        value = function(*map(flush, operands)) if ftz else function(*operands)
        if ftz:
            value = flush(value)
        return np.fmin(np.fmax(value, np.float32(0)), np.float32(1)) if sat else value

    return modified if ftz or sat else function


def float_arithmetic(opcode: Opcode, name: str, kind: str) -> Operation:
    """add, sub, mul, fma of any floating-point type."""
    rounding = opcode.one_of(*ROUNDINGS) or "rn"
    ftz, sat = opcode.has("ftz"), opcode.has("sat")
    if kind in HALVES and not (ftz or sat) and rounding == "rn":
        exact = (EXACT_F16 if kind.startswith("f16") else EXACT)[name]
        function: Function = lambda *x: encode(kind, exact(*(decode(kind, v) for v in x)))  # noqa: E731
    elif kind == "f32" and name != "fma" and rounding == "rn":
        function = WRAPPING[name]
    elif kind == "f32":
        function = lambda *x: to_float32(EXACT[name](*(v.astype(np.float64) for v in x)), rounding)  # noqa: E731
    else:
        raise opcode.unknown()
    return Operation(with_modifiers(function, ftz, sat), kind, (kind,) * (3 if name == "fma" else 2))


def add_or_subtract(opcode: Opcode) -> Operation:
    kind = opcode.take_type()
    if is_float(kind):
        return float_arithmetic(opcode, opcode.base, kind)
    if opcode.has("sat"):
        wrapping = WRAPPING[opcode.base]
        return Operation(lambda a, b: clamp(wrapping(a.astype(np.int64), b), "s32"), kind, (kind, kind))
    return Operation(WRAPPING[opcode.base], kind, (kind, kind))


def multiply(opcode: Opcode) -> Operation:
    """mul and mad; integers: .lo, .hi and .wide (the product, and the addend of mad, at twice the width)."""
    adds = opcode.base == "mad"
    kind = opcode.take_type()
    if is_float(kind):
        return float_arithmetic(opcode, "fma" if adds else "mul", kind)
    part = opcode.take("lo", "hi", "wide")
    wide = DTYPES[f"{kind[0]}{bits_of(kind) * 2}"] if bits_of(kind) < 64 else None
    result = kind
    if part == "lo":
        product: Function = np.multiply
    elif part == "wide" and wide:
        product = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
        result = f"{kind[0]}{bits_of(kind) * 2}"
    elif wide:
        product = lambda a, b: (a.astype(wide) * b >> bits_of(kind)).astype(a.dtype)  # noqa: E731
    else:
        product = multiply_high_64
    if adds:
        return Operation(lambda a, b, c: product(a, b) + c, result, (kind, kind, result))
    return Operation(product, result, (kind, kind))


def multiply_high_64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper 64 bits of a product of 64-bit integers, from four products of 32-bit halves."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.view(np.uint64), b.view(np.uint64)
    middle = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    other = (x & low) * (y >> half) + (middle & low)
    high = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":  # a negative factor f was taken for f + 2^64
        high = high - np.where(a < 0, y, 0).astype(np.uint64) - np.where(b < 0, x, 0).astype(np.uint64)
    return high.view(a.dtype)


def fused(opcode: Opcode) -> Operation:
    return float_arithmetic(opcode, "fma", opcode.take_type(*FLOATS))


def divide(opcode: Opcode) -> Operation:
    """div and rem. Integers truncate; x / 0 is all ones and x % 0 is x, as on devices. f32: rounded to nearest."""
    kind = opcode.take_type()
    if is_float(kind):
        if kind != "f32" or opcode.base == "rem":
            raise opcode.unknown()
        opcode.take("rn", "approx", "full")
        return Operation(with_modifiers(np.divide, opcode.has("ftz"), False), kind, (kind, kind))

    def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        # Magnitudes: two's complement makes |least| right when read as unsigned.
        x, y = (np.abs(v).view(f"u{v.dtype.itemsize}") for v in (a, b))
        q = (x // np.maximum(y, 1)).view(a.dtype)
        return np.where(b == 0, np.array(-1).astype(a.dtype), np.where((a < 0) != (b < 0), -q, q))

    if opcode.base == "div":
        return Operation(quotient, kind, (kind, kind))
    return Operation(lambda a, b: np.where(b == 0, a, a - quotient(a, b) * b), kind, (kind, kind))


def smaller_or_larger(opcode: Opcode) -> Operation:
    """min and max. Floats: a number beats NaN unless .NaN, and -0 < +0."""
    kind = opcode.take_type()
    smaller = opcode.base == "min"
    if not is_float(kind):
        return Operation(np.minimum if smaller else np.maximum, kind, (kind, kind))
    function = (np.minimum if smaller else np.maximum) if opcode.has("NaN") else (np.fmin if smaller else np.fmax)

    def choose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        first = np.signbit(a) == smaller
        return np.where(a == b, np.where(first, a, b), function(a, b))

    if kind in HALVES:
        return Operation(lambda a, b: encode(kind, choose(decode(kind, a), decode(kind, b))), kind, (kind, kind))
    return Operation(with_modifiers(choose, opcode.has("ftz"), False), kind, (kind, kind))


def sign_operation(opcode: Opcode) -> Operation:
    """neg and abs."""
    kind = opcode.take_type()
    if kind in HALVES:
        sign = DTYPES[kind].type(0x80008000 if bits_of(kind) == 32 else 0x8000)
        return Operation((lambda a: a ^ sign) if opcode.base == "neg" else (lambda a: a & ~sign), kind, (kind,))
    function: Function = np.negative if opcode.base == "neg" else np.abs
    return Operation(with_modifiers(function, opcode.has("ftz"), False), kind, (kind,))


UNARY: dict[str, Function] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def unary_function(opcode: Opcode) -> Operation:
    """.rn is exact; .approx is given the exact value, rounded: a device is within a few ulp of it."""
    function = UNARY[opcode.base]
    opcode.take("rn", "approx")
    kind = opcode.take_type("f32", *HALVES)
    rounded: Function = lambda a: encode(kind, function(decode(kind, a)))  # noqa: E731
    return Operation(with_modifiers(rounded, opcode.has("ftz") and kind == "f32", False), kind, (kind,))


def copy_sign(opcode: Opcode) -> Operation:
    return Operation(lambda a, b: np.copysign(b, a), opcode.take_type("f32"), ("f32", "f32"))


ARITHMETIC: dict[str, Callable[[Opcode], Operation]] = {
    **dict.fromkeys(("add", "sub"), add_or_subtract),
    **dict.fromkeys(("mul", "mad"), multiply),
    "fma": fused,
    **dict.fromkeys(("div", "rem"), divide),
    **dict.fromkeys(("min", "max"), smaller_or_larger),
    **dict.fromkeys(("neg", "abs"), sign_operation),
    **dict.fromkeys(UNARY, unary_function),
    "copysign": copy_sign,
}
