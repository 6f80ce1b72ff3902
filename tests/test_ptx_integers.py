"""PTX operations on integers, bit by bit against Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.simt.interpreter import PtxFault
from tests.ptx_programs import compute

few = settings(max_examples=8, deadline=None)


def patterns(bits: int) -> st.SearchStrategy[int]:
    """Unsigned integers, often at the edges of what shifts, fields and signs distinguish."""
    top = (1 << bits) - 1
    edges = [0, 1, 2, 31, 32, 33, 63, 64, 255, 256, 0x5140, 0xFB73, top >> 1, (top >> 1) + 1, top - 1, top]
    return st.sampled_from(edges) | st.integers(0, top)


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def truncating(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field_extract(a: int, position: int, length: int, bits: int, is_signed: bool) -> int:
    """bfe as the ISA's loop says it."""
    position, length, last = position & 255, length & 255, bits - 1
    bit = [a >> i & 1 for i in range(bits)]
    fill = 0 if not is_signed or length == 0 else bit[min(position + length - 1, last)]
    return sum((bit[position + i] if i < length and position + i <= last else fill) << i for i in range(bits))


def field_insert(a: int, b: int, position: int, length: int, bits: int) -> int:
    position, length = position & 255, length & 255
    for i in range(min(length, bits)):
        if position + i < bits:
            b = b & ~(1 << (position + i)) | ((a >> i & 1) << (position + i))
    return b


def permuted(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    result = []
    for i in range(4):
        byte = source[selector >> 4 * i & 7]
        result.append((255 if byte >> 7 else 0) if selector >> 4 * i & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def highest(value: int, bits: int, is_signed: bool) -> int:
    if is_signed and value >> (bits - 1):
        value = ~value & ((1 << bits) - 1)
    return value.bit_length() - 1


def s32(value: int) -> int:
    return signed(value, 32)


def s64(value: int) -> int:
    return signed(value, 64)


# instruction: (bits of the result, its meaning on a, b, c of 32 and x, y of 64 unsigned bits)
INTEGERS: dict[str, tuple[int, Callable[[int, int, int, int, int], int]]] = {
    "add.s32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: a + b),
    "add.sat.s32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: max(-(2**31), min(2**31 - 1, s32(a) + s32(b)))),
    "sub.s32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: a - b),
    "add.s64 %d0, %a3, %a4": (64, lambda a, b, c, x, y: x + y),
    "mul.lo.s32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: a * b),
    "mul.hi.u32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: a * b >> 32),
    "mul.hi.s32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: s32(a) * s32(b) >> 32),
    "mul.wide.u32 %d0, %a0, %a1": (64, lambda a, b, c, x, y: a * b),
    "mul.wide.s32 %d0, %a0, -7": (64, lambda a, b, c, x, y: s32(a) * -7),
    "mul.lo.s64 %d0, %a3, %a4": (64, lambda a, b, c, x, y: x * y),
    "mul.hi.u64 %d0, %a3, %a4": (64, lambda a, b, c, x, y: x * y >> 64),
    "mul.hi.s64 %d0, %a3, %a4": (64, lambda a, b, c, x, y: s64(x) * s64(y) >> 64),
    "mad.lo.s32 %d0, %a0, %a1, %a2": (32, lambda a, b, c, x, y: a * b + c),
    "mad.hi.u32 %d0, %a0, %a1, %a2": (32, lambda a, b, c, x, y: (a * b >> 32) + c),
    "mad.wide.s32 %d0, %a0, %a1, %a3": (64, lambda a, b, c, x, y: s32(a) * s32(b) + x),
    "div.u32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: a // b if b else -1),
    "rem.u32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: a % b if b else a),
    "div.s32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: truncating(s32(a), s32(b)) if b else -1),
    "rem.s32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: s32(a) - truncating(s32(a), s32(b)) * s32(b) if b else a),
    "div.s64 %d0, %a3, %a4": (64, lambda a, b, c, x, y: truncating(s64(x), s64(y)) if y else -1),
    "rem.u64 %d0, %a3, %a4": (64, lambda a, b, c, x, y: x % y if y else x),
    "min.s32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: min(s32(a), s32(b))),
    "max.u32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: max(a, b)),
    "min.u64 %d0, %a3, %a4": (64, lambda a, b, c, x, y: min(x, y)),
    "neg.s32 %d0, %a0": (32, lambda a, b, c, x, y: -a),
    "abs.s64 %d0, %a3": (64, lambda a, b, c, x, y: abs(s64(x))),
    "and.b32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: a & b),
    "or.b64 %d0, %a3, %a4": (64, lambda a, b, c, x, y: x | y),
    "xor.b32 %d0, %a0, 0xFFU": (32, lambda a, b, c, x, y: a ^ 255),
    "not.b64 %d0, %a3": (64, lambda a, b, c, x, y: ~x),
    "shl.b32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: a << min(b, 32)),
    "shr.u32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: a >> min(b, 32)),
    "shr.s32 %d0, %a0, %a1": (32, lambda a, b, c, x, y: s32(a) >> min(b, 32)),
    "shl.b64 %d0, %a3, %a1": (64, lambda a, b, c, x, y: x << min(b, 64)),
    "shr.s64 %d0, %a3, %a1": (64, lambda a, b, c, x, y: s64(x) >> min(b, 64)),
    "shf.l.wrap.b32 %d0, %a0, %a1, %a2": (32, lambda a, b, c, x, y: (b << 32 | a) << (c & 31) >> 32),
    "shf.l.clamp.b32 %d0, %a0, %a1, %a2": (32, lambda a, b, c, x, y: (b << 32 | a) << min(c, 32) >> 32),
    "shf.r.wrap.b32 %d0, %a0, %a1, %a2": (32, lambda a, b, c, x, y: (b << 32 | a) >> (c & 31)),
    "shf.r.clamp.b32 %d0, %a0, %a1, %a2": (32, lambda a, b, c, x, y: (b << 32 | a) >> min(c, 32)),
    "bfe.u32 %d0, %a0, %a1, %a2": (32, lambda a, b, c, x, y: field_extract(a, b, c, 32, False)),
    "bfe.s32 %d0, %a0, %a1, %a2": (32, lambda a, b, c, x, y: field_extract(a, b, c, 32, True)),
    "bfe.u64 %d0, %a3, %a1, %a2": (64, lambda a, b, c, x, y: field_extract(x, b, c, 64, False)),
    "bfe.s64 %d0, %a3, 3, 5": (64, lambda a, b, c, x, y: field_extract(x, 3, 5, 64, True)),
    "bfi.b32 %d0, %a0, %a1, %a2, 5": (32, lambda a, b, c, x, y: field_insert(a, b, c, 5, 32)),
    "bfi.b64 %d0, %a3, %a4, 9, %a2": (64, lambda a, b, c, x, y: field_insert(x, y, 9, c, 64)),
    "bfind.u32 %d0, %a0": (32, lambda a, b, c, x, y: highest(a, 32, False)),
    "bfind.s32 %d0, %a0": (32, lambda a, b, c, x, y: highest(a, 32, True)),
    "bfind.shiftamt.u32 %d0, %a0": (32, lambda a, b, c, x, y: 31 - highest(a, 32, False) if a else -1),
    "bfind.u64 %d0, %a3": (32, lambda a, b, c, x, y: highest(x, 64, False)),
    "clz.b32 %d0, %a0": (32, lambda a, b, c, x, y: 32 - a.bit_length()),
    "clz.b64 %d0, %a3": (32, lambda a, b, c, x, y: 64 - x.bit_length()),
    "popc.b32 %d0, %a0": (32, lambda a, b, c, x, y: bin(a).count("1")),
    "popc.b64 %d0, %a3": (32, lambda a, b, c, x, y: bin(x).count("1")),
    "brev.b32 %d0, %a0": (32, lambda a, b, c, x, y: int(f"{a:032b}"[::-1], 2)),
    "brev.b64 %d0, %a3": (64, lambda a, b, c, x, y: int(f"{x:064b}"[::-1], 2)),
    "prmt.b32 %d0, %a0, %a1, %a2": (32, lambda a, b, c, x, y: permuted(a, b, c)),
    "prmt.b32 %d0, %a0, 0, 0xBA98": (32, lambda a, b, c, x, y: permuted(a, 0, 0xBA98)),
    "setp.lt.s32 %p0, %a0, %a1; selp.b32 %d0, %a1, 5, %p0": (32, lambda a, b, c, x, y: b if s32(a) < s32(b) else 5),
    "setp.hs.u32 %p0, %a0, %a1; selp.b32 %d0, 1, 0, %p0": (32, lambda a, b, c, x, y: a >= b),
    "setp.ne.s64 %p0, %a3, %a4; selp.b32 %d0, 1, 0, %p0": (32, lambda a, b, c, x, y: x != y),
    "slct.b32.s32 %d0, %a0, %a1, %a2": (32, lambda a, b, c, x, y: a if s32(c) >= 0 else b),
    "mov.b64 {%r1, %r2}, %a3; xor.b32 %d0, %r1, %r2": (32, lambda a, b, c, x, y: x & 0xFFFFFFFF ^ x >> 32),
    "mov.b32 {%h1, %h2}, %a0; mov.b64 %d0, {%h2, %h1, %h1, %h2}": (
        64,
        lambda a, b, c, x, y: a >> 16 | (a & 0xFFFF) << 16 | (a & 0xFFFF) << 32 | a >> 16 << 48,
    ),
    "mov.b32 {_, %h2}, %a0; mov.b32 %d0, {0, %h2}": (32, lambda a, b, c, x, y: a >> 16 << 16),
}


@few
@given(rows=st.lists(st.tuples(*[patterns(32)] * 3, *[patterns(64)] * 2), min_size=1, max_size=64))
@pytest.mark.parametrize("instruction", INTEGERS)
def test_integers(instruction: str, rows: list[tuple[int, int, int, int, int]]) -> None:
    bits, meaning = INTEGERS[instruction]
    dtypes = [np.uint32] * 3 + [np.uint64] * 2
    inputs = [np.array(column, dtype) for column, dtype in zip(zip(*rows, strict=True), dtypes, strict=True)]
    (result,) = compute(instruction + ";", inputs, [f"u{bits // 8}"])
    assert result.tolist() == [meaning(*row) & ((1 << bits) - 1) for row in rows]


def test_logic_of_three() -> None:
    """The ISA's definition: the table is the function's value on 0xF0, 0xCC, 0xAA."""
    operands = [np.full(32, value, np.uint32) for value in (0xF0, 0xCC, 0xAA)]
    for table in range(256):
        (result,) = compute(f"lop3.b32 %d0, %a0, %a1, %a2, {table:#x};", operands, ["u4"])
        assert (result & 0xFF == table).all(), table


@few
@given(values=st.lists(patterns(64), min_size=1, max_size=64))
@pytest.mark.parametrize("saturated", [False, True])
@pytest.mark.parametrize("to", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_conversions(source: str, to: str, saturated: bool, values: list[int]) -> None:
    """The source is the lowest bits of a wider register; the result is extended to one."""

    def meaning(value: int) -> int:
        bits, out = int(source[1:]), int(to[1:])
        value = signed(value, bits) if source[0] == "s" else value & ((1 << bits) - 1)
        low, high = (-(1 << (out - 1)), (1 << (out - 1)) - 1) if to[0] == "s" else (0, (1 << out) - 1)
        if saturated:
            return min(max(value, low), high)
        return signed(value, out) if to[0] == "s" else value & ((1 << out) - 1)

    (result,) = compute(f"cvt{'.sat' * saturated}.{to}.{source} %d0, %a0;", [np.array(values, np.uint64)], ["u8"])
    assert result.tolist() == [meaning(value) % 2**64 for value in values]


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 %d0, %a0, %a0",
        "add.cc.u32 %d0, %a0, %a0",
        "mul.s32 %d0, %a0, %a0",
        "add.rn.f64 %d0, %a0, %a0",
        "cvt.rz.f16.f32 %h1, %a0",
        "setp.ltu.s32 %p1, %a0, %a0",
        "prmt.b32.f4e %d0, %a0, %a0, %a0",
        "lop3.b32 %d0",
    ],
)
def test_what_is_not_known_is_refused(instruction: str) -> None:
    with pytest.raises(PtxFault, match=r"unknown opcode|operands expected"):
        compute(instruction + ";", [np.zeros(32, np.uint32)], ["u4"])
