"""Instructions on the bits of integers: shifts, fields, counts, permutations (PTX ISA 9.7.1, 9.7.8)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from plugins.simt.ptx_numbers import DTYPES
from plugins.simt.ptx_opcode import Function, Opcode, Operation, bits_of


def shift(opcode: Opcode) -> Operation:
    """shl and shr; counts beyond the width give 0, or copies of the sign."""
    kind = opcode.take_type()
    shifted = np.left_shift if opcode.base == "shl" else np.right_shift
    width = np.uint32(bits_of(kind))
    return Operation(lambda a, n: shifted(a, np.minimum(n, width).astype(a.dtype)), kind, (kind, "u32"))


def funnel_shift(opcode: Opcode) -> Operation:
    """shf: the upper (.l) or lower (.r) word of b:a shifted."""
    left = opcode.take("l", "r") == "l"
    wraps = opcode.take("wrap", "clamp") == "wrap"
    kind = opcode.take_type("b32")

    def shifted(a: np.ndarray, b: np.ndarray, n: np.ndarray) -> np.ndarray:
        pair = (b.astype(np.uint64) << np.uint64(32)) | a
        count = (n & np.uint32(31) if wraps else np.minimum(n, np.uint32(32))).astype(np.uint64)
        return ((pair << count) >> np.uint64(32) if left else pair >> count).astype(np.uint32)

    return Operation(shifted, kind, (kind, kind, "u32"))


def ones(count: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The lowest `count` bits set."""
    one = dtype.type(1)
    return (one << np.minimum(count, dtype.itemsize * 8).astype(dtype)) - one


def field_of(position: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return position & np.uint32(0xFF), length & np.uint32(0xFF)


def extract_field(opcode: Opcode) -> Operation:
    """bfe d, a, position, length; signed types repeat the field's highest bit."""
    kind = opcode.take_type("u32", "u64", "s32", "s64")
    last = np.uint32(bits_of(kind) - 1)

    def unsigned(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = field_of(position, length)
        return (a >> position.astype(a.dtype)) & ones(length, a.dtype)

    def signed(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = field_of(position, length)
        above = last - np.minimum(position + length - np.uint32(1), last)
        value = (a << above.astype(a.dtype)) >> (above + position).astype(a.dtype)
        return np.where(length == 0, a.dtype.type(0), value)

    return Operation(signed if kind[0] == "s" else unsigned, kind, (kind, "u32", "u32"))


def insert_field(opcode: Opcode) -> Operation:
    """bfi d, a, b, position, length: a's lowest bits in place of some of b's."""
    kind = opcode.take_type("b32", "b64")

    def inserted(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = field_of(position, length)
        by = position.astype(a.dtype)
        mask = ones(length, a.dtype) << by
        return (b & ~mask) | ((a << by) & mask)

    return Operation(inserted, kind, (kind, kind, "u32", "u32"))


def highest_bit(a: np.ndarray) -> np.ndarray:
    """Index of the highest bit set, -1 if there is none; int32."""
    high = a.astype(np.uint64) >> np.uint64(32)
    word = np.where(high > 0, high, a)  # at most 32 bits, exact in float64
    return (np.frexp(word.astype(np.float64))[1] - 1 + np.where(high > 0, 32, 0)).astype(np.int32)


def find_bit(opcode: Opcode) -> Operation:
    """bfind: the highest bit that differs from the sign; with .shiftamt, the shift that brings it to the top."""
    from_top = opcode.has("shiftamt")
    kind = opcode.take_type("u32", "u64", "s32", "s64")

    def found(a: np.ndarray) -> np.ndarray:
        index = highest_bit(np.where(a < 0, ~a, a).view(f"u{a.dtype.itemsize}"))
        return (np.where(index < 0, index, bits_of(kind) - 1 - index) if from_top else index).view(np.uint32)

    return Operation(found, "u32", (kind,))


def leading_zeros(opcode: Opcode) -> Operation:
    kind = opcode.take_type("b32", "b64")
    return Operation(lambda a: (bits_of(kind) - 1 - highest_bit(a)).astype(np.uint32), "u32", (kind,))


def bit_rows(a: np.ndarray) -> np.ndarray:
    """[threads, width] bits, lowest first."""
    return np.unpackbits(a.view(np.uint8).reshape(len(a), -1), axis=1, bitorder="little")


def count_bits(opcode: Opcode) -> Operation:
    kind = opcode.take_type("b32", "b64")
    return Operation(lambda a: bit_rows(a).sum(axis=1, dtype=np.uint32), "u32", (kind,))


def reverse_bits(opcode: Opcode) -> Operation:
    kind = opcode.take_type("b32", "b64")

    def reverse(a: np.ndarray) -> np.ndarray:
        return np.packbits(bit_rows(a)[:, ::-1], axis=1, bitorder="little").view(DTYPES[kind])[:, 0]

    return Operation(reverse, kind, (kind,))


def permuted_alike(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    sources = [word.view(np.uint8).reshape(-1, 4) for word in (a, b)]
    result = np.empty((len(a), 4), np.uint8)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = sources[nibble >> 2 & 1][:, nibble & 3]
        result[:, i] = (byte.view(np.int8) >> 7).view(np.uint8) if nibble & 8 else byte
    return result.view(np.uint32)[:, 0]


def permute_bytes(opcode: Opcode) -> Operation:
    """prmt: each nibble of c picks one of the 8 bytes of b:a, or (bit 3 set) eight copies of that byte's sign."""
    kind = opcode.take_type("b32")

    def permuted(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        if (c == c[0]).all():  # as nearly always: a constant
            return permuted_alike(a, b, int(c[0]))
        result = np.empty_like(a)
        for selector in np.unique(c):
            rows = c == selector
            result[rows] = permuted_alike(a[rows], b[rows], int(selector))
        return result

    return Operation(permuted, kind, (kind, kind, kind))


def boolean(table: int, operands: tuple[np.ndarray, ...]) -> np.ndarray | np.uint32:
    """The function of bits with truth table `table` (the first operand is the index's highest bit)."""
    if not operands:
        return np.uint32(0xFFFFFFFF if table else 0)
    first, *rest = operands
    half = 1 << len(rest)
    without, change = table & ((1 << half) - 1), (table & ((1 << half) - 1)) ^ (table >> half)
    value = boolean(without, tuple(rest))
    return value ^ (first & boolean(change, tuple(rest))) if change else value


def logic(opcode: Opcode) -> Operation:
    """lop3: any function of three bits."""
    kind = opcode.take_type("b32")

    def looked_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
        return np.broadcast_to(boolean(int(table[0]) & 0xFF, (a, b, c)), a.shape)

    return Operation(looked_up, kind, (kind, kind, kind, "u32"))


BITWISE: dict[str, Function] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


def bitwise(opcode: Opcode) -> Operation:
    kind = opcode.take_type("b16", "b32", "b64", "pred")
    return Operation(BITWISE[opcode.base], kind, (kind,) * (1 if opcode.base == "not" else 2))


BIT_OPERATIONS: dict[str, Callable[[Opcode], Operation]] = {
    **dict.fromkeys(("shl", "shr"), shift),
    "shf": funnel_shift,
    "bfe": extract_field,
    "bfi": insert_field,
    "bfind": find_bit,
    "clz": leading_zeros,
    "popc": count_bits,
    "brev": reverse_bits,
    "prmt": permute_bytes,
    "lop3": logic,
    **dict.fromkeys(BITWISE, bitwise),
}
