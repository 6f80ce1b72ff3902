"""PTX operations on floating point, bit by bit against exact fractions that are rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.ptx_programs import BF16, F16, F32, Format, compute

few = settings(max_examples=8, deadline=None)


def finite(form: Format) -> st.SearchStrategy[int]:
    bits = form.precision + form.exponent_bits
    top = ((1 << form.exponent_bits) - 1) << (form.precision - 1)
    one = ((1 << (form.exponent_bits - 1)) - 1) << (form.precision - 1)
    edges = [0, 1, top - 1, one, one + 1, one - 1, 1 << (form.precision - 1)]
    near = st.integers(one - (8 << (form.precision - 1)), one + (8 << (form.precision - 1)))
    magnitude = st.sampled_from(edges) | st.integers(0, top - 1) | near
    return st.builds(lambda sign, m: sign << (bits - 1) | m, st.booleans(), magnitude)


Exact = Callable[..., Fraction]
EXACT: dict[str, tuple[int, Exact]] = {
    "add": (2, lambda x, y: x + y),
    "sub": (2, lambda x, y: x - y),
    "mul": (2, lambda x, y: x * y),
    "fma": (3, lambda x, y, z: x * y + z),
    "div": (2, lambda x, y: x / y),
}
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32}
FLOAT_OPERATIONS = [
    *("add.f32", "sub.f32", "mul.f32", "fma.rn.f32", "div.rn.f32"),
    *(f"{name}.{rounding}.f32" for name in ("add", "mul", "fma") for rounding in ("rz", "rm", "rp")),
    *("add.f16", "sub.rn.f16", "mul.f16", "fma.rn.f16", "add.rn.bf16", "mul.bf16", "fma.rn.bf16"),
]


@few
@given(data=st.data())
@pytest.mark.parametrize("opcode", FLOAT_OPERATIONS)
def test_floating_point_is_rounded_once(opcode: str, data: st.DataObject) -> None:
    name, *modifiers, kind = opcode.split(".")
    form, (arity, exact), rounding = FORMATS[kind], EXACT[name], modifiers[0] if modifiers else "rn"
    rows = data.draw(st.lists(st.tuples(*[finite(form)] * arity), min_size=1, max_size=64))
    values = [tuple(form.decode(p) for p in row) for row in rows]
    if name == "div":
        assume(all(y for _, y in values))
    dtype = np.uint32 if kind == "f32" else np.uint16
    inputs = [np.array(column, dtype) for column in zip(*rows, strict=True)]
    operands = ", ".join(f"%a{i}" for i in range(arity))
    (result,) = compute(f"{opcode} %d0, {operands};", inputs, [f"u{dtype().itemsize}"])
    for pattern, row in zip(result.tolist(), values, strict=True):
        value = exact(*row)
        if value:
            assert pattern == form.encode(value, rounding), row
        else:
            assert pattern & ((1 << (form.precision + form.exponent_bits - 1)) - 1) == 0, row


@few
@given(rows=st.lists(st.tuples(*[finite(F16)] * 2, *[finite(BF16)] * 2), min_size=2, max_size=32))
def test_pairs_are_two_numbers(rows: list[tuple[int, int, int, int]]) -> None:
    """Lane by lane, a pair's halves are the neighbours in `rows`."""
    rows = rows[: len(rows) // 2 * 2]
    halves = [np.array(column, np.uint16) for column in zip(*rows, strict=True)]
    scalars = [compute(f"{op} %d0, %a0, %a1;", halves[:2], ["u2"])[0] for op in ("add.f16", "mul.f16", "max.f16")]
    scalars.append(compute("fma.rn.bf16 %d0, %a0, %a1, %a0;", halves[2:], ["u2"])[0])
    pairs = [half.view(np.uint32) for half in halves]
    packed = [compute(f"{op} %d0, %a0, %a1;", pairs[:2], ["u4"])[0] for op in ("add.f16x2", "mul.f16x2", "max.f16x2")]
    packed.append(compute("fma.rn.bf16x2 %d0, %a0, %a1, %a0;", pairs[2:], ["u4"])[0])
    for single, double in zip(scalars, packed, strict=True):
        np.testing.assert_array_equal(single, double.view(np.uint16))


def test_fused_products_that_float64_would_round_into_a_tie() -> None:
    """129 * 3 and 4097 * 4097 lie between two bf16 (float32) neighbours; a tiny addend decides."""
    tiny = np.array([2.0**-100, -(2.0**-100)], np.float32)
    to_bf16 = (tiny.view(np.uint32) >> 16).astype(np.uint16)
    a, b = (np.full(2, BF16.encode(Fraction(value)), np.uint16) for value in (129, 3))
    (result,) = compute("fma.rn.bf16 %d0, %a0, %a1, %a2;", [a, b, to_bf16], ["u2"])
    assert [BF16.decode(p) for p in result.tolist()] == [388, 386]
    a = np.full(2, 4097, np.float32)
    (result,) = compute("fma.rn.f32 %d0, %a0, %a0, %a1;", [a, tiny], ["f4"])
    assert result.tolist() == [16785410, 16785408]


@few
@given(values=st.lists(finite(F32), min_size=1, max_size=64), rounding=st.sampled_from(["rn", "rz", "rm", "rp"]))
def test_conversions_between_formats(values: list[int], rounding: str) -> None:
    x = np.array(values, np.uint32)
    exact = [F32.decode(p) for p in values]
    half, brain, pair = compute(
        "cvt.rn.f16.f32 %d0, %a0; cvt.rn.bf16.f32 %d1, %a0; neg.f32 %r1, %a0; cvt.rn.f16x2.f32 %d2, %a0, %r1;",
        [x],
        ["u2", "u2", "u4"],
    )
    assert half.tolist() == [F16.encode(v, negative_zero=p >> 31 == 1) for v, p in zip(exact, values, strict=True)]
    assert brain.tolist() == [BF16.encode(v, negative_zero=p >> 31 == 1) for v, p in zip(exact, values, strict=True)]
    assert pair.tolist() == [h << 16 | (h ^ 0x8000) for h in half.tolist()]
    integers = [(p if p < 2**31 else p - 2**32) for p in values]
    from_s32, from_u32 = compute(
        f"cvt.{rounding}.f32.s32 %d0, %a0; cvt.{rounding}.f32.u32 %d1, %a0;", [x], ["u4", "u4"]
    )
    assert from_s32.tolist() == [F32.encode(Fraction(i), rounding) for i in integers]
    assert from_u32.tolist() == [F32.encode(Fraction(p), rounding) for p in values]
    wide = np.array([p * 0x9E3779B97F4A7C15 % 2**64 for p in values], np.uint64)
    (from_u64,) = compute("cvt.rn.f32.u64 %d0, %a0;", [wide], ["u4"])
    assert from_u64.tolist() == [F32.encode(Fraction(p)) for p in wide.tolist()]


@pytest.mark.parametrize(("kind", "form"), [("f16", F16), ("bf16", BF16)])
def test_every_half_widens_exactly(kind: str, form: Format) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    (wide,) = compute(f"cvt.f32.{kind} %d0, %a0;", [every], ["f4"])
    bits = form.precision - 1
    is_finite = (every >> bits) & ((1 << form.exponent_bits) - 1) != (1 << form.exponent_bits) - 1
    expected = [float(form.decode(int(p))) for p in every[is_finite]]
    np.testing.assert_array_equal(wide[is_finite], np.array(expected, np.float32))
    assert not np.isfinite(wide[~is_finite]).any()
    assert np.isinf(wide[~is_finite]).sum() == 2


INTEGRAL = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@few
@given(values=st.lists(finite(F32), min_size=1, max_size=64))
@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u8", "f32"])
@pytest.mark.parametrize("rounding", INTEGRAL)
def test_conversions_to_integers_clamp(rounding: str, to: str, values: list[int]) -> None:
    x, bits = np.array(values, np.uint32), int(to[1:])
    (result,) = compute(f"cvt.{rounding}.{to}.f32 %d0, %a0;", [x], ["u4" if to == "f32" else "u8"])
    wholes = [INTEGRAL[rounding](F32.decode(p)) for p in values]
    if to == "f32":
        assert [F32.decode(p) for p in result.tolist()] == wholes
        return
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    assert result.tolist() == [min(max(whole, low), high) % 2**64 for whole in wholes]


def test_conversions_of_nan_and_infinity() -> None:
    x = np.array([np.nan, np.inf, -np.inf], np.float32)
    s32_, u32_, s64_, half, saturated = compute(
        "cvt.rni.s32.f32 %d0, %a0; cvt.rzi.u32.f32 %d1, %a0; cvt.rzi.s64.f32 %d2, %a0; cvt.rn.f16.f32 %d3, %a0;"
        "cvt.sat.f32.f32 %d4, %a0;",
        [x],
        ["i4", "u4", "i8", "u2", "f4"],
    )
    assert s32_.tolist() == [0, 2**31 - 1, -(2**31)]
    assert u32_.tolist() == [0, 2**32 - 1, 0]
    assert s64_.tolist() == [-(2**63), 2**63 - 1, -(2**63)]
    assert np.isnan(half.view(np.float16)[0])
    assert half[1:].tolist() == [0x7C00, 0xFC00]
    assert saturated.tolist() == [0, 1, 0]


COMPARED = np.array([np.nan, -np.inf, -1, -0.0, 0.0, 1e-40, 1, np.inf], np.float32)
COMPARISONS = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x < y or x > y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "equ": lambda x, y: not (x < y or x > y),
    "neu": lambda x, y: x != y,
    "ltu": lambda x, y: not x >= y,
    "leu": lambda x, y: not x > y,
    "gtu": lambda x, y: not x <= y,
    "geu": lambda x, y: not x < y,
    "num": lambda x, y: x == x and y == y,
    "nan": lambda x, y: x != x or y != y,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_float_comparisons(name: str) -> None:
    x, y = (a.reshape(-1).astype(np.float32) for a in np.meshgrid(COMPARED, COMPARED))
    expected = [COMPARISONS[name](a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    plain, both, either, differs = compute(
        f"setp.gt.s32 %p1, %a0, 0; setp.{name}.f32 %p2, %a0, %a1; selp.b32 %d0, 1, 0, %p2;"
        f"setp.{name}.and.f32 %p3, %a0, %a1, %p1; selp.b32 %d1, 1, 0, %p3;"
        f"setp.{name}.or.f32 %p4, %a0, %a1, !%p1; selp.b32 %d2, 1, 0, %p4;"
        "xor.pred %p5, %p2, %p1; selp.b32 %d3, 1, 0, %p5;",
        [x, y],
        ["u4"] * 4,
    )
    positive = (x.view(np.int32) > 0).tolist()
    assert plain.tolist() == expected
    assert both.tolist() == [e and p for e, p in zip(expected, positive, strict=True)]
    assert either.tolist() == [e or not p for e, p in zip(expected, positive, strict=True)]
    assert differs.tolist() == [e != p for e, p in zip(expected, positive, strict=True)]


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_smaller_and_larger(kind: str) -> None:
    dtype = {"f32": np.float32, "f16": np.float16}[kind]
    x, y = (a.reshape(-1).astype(dtype) for a in np.meshgrid(COMPARED, COMPARED))
    size = f"f{dtype().itemsize}"
    low, high, strict_low = compute(
        f"min.{kind} %d0, %a0, %a1; max.{kind} %d1, %a0, %a1; min.NaN.{kind} %d2, %a0, %a1;", [x, y], [size] * 3
    )
    for a, b, lo, hi, strict in zip(x, y, low, high, strict_low, strict=True):
        numbers = sorted((v for v in (a, b) if v == v), key=lambda v: (v, not np.signbit(v)))
        if not numbers:
            assert np.isnan([lo, hi, strict]).all()
            continue
        assert (lo, np.signbit(lo)) == (numbers[0], np.signbit(numbers[0]))
        assert (hi, np.signbit(hi)) == (numbers[-1], np.signbit(numbers[-1]))
        assert np.isnan(strict) if len(numbers) < 2 else strict == lo


APPROXIMATED = {
    "ex2.approx.ftz.f32": lambda v: 2**v,
    "lg2.approx.ftz.f32": math.log2,
    "rcp.approx.f32": lambda v: 1 / v,
    "rcp.rn.f32": lambda v: 1 / v,
    "rsqrt.approx.f32": lambda v: v**-0.5,
    "sqrt.approx.f32": math.sqrt,
    "sin.approx.f32": math.sin,
    "tanh.approx.f32": math.tanh,
}


@pytest.mark.parametrize("opcode", APPROXIMATED)
def test_approximate_functions(opcode: str) -> None:
    x = np.random.default_rng(0).uniform(0.01, 30, 256).astype(np.float32)
    (result,) = compute(f"{opcode} %d0, %a0;", [x], ["f4"])
    np.testing.assert_allclose(result, [APPROXIMATED[opcode](v) for v in x.tolist()], rtol=6.1e-8)


def test_square_root_is_exact() -> None:
    x = np.random.default_rng(0).integers(0, 0x7F800000, 256).astype(np.uint32)
    (result,) = compute("sqrt.rn.f32 %d0, %a0;", [x], ["u4"])
    for pattern, root in zip(x.tolist(), result.tolist(), strict=True):
        below, above = ((F32.decode(root) + F32.decode(root + step)) / 2 for step in (-1, 1))
        assert below**2 <= F32.decode(pattern) <= above**2


def test_flushing_and_special_values() -> None:
    x = np.array([-200, -130, -1e-40, 0, 130, np.nan, np.inf, -np.inf], np.float32)
    power, product, flushed, logarithm, clamped = compute(
        "ex2.approx.ftz.f32 %d0, %a0; mul.f32 %d1, %a0, 0f3F000000; mul.ftz.f32 %d2, %a0, 0f3F000000;"
        "lg2.approx.ftz.f32 %d3, %a0; mul.sat.f32 %d4, %a0, %a0;",
        [x],
        ["f4"] * 5,
    )
    np.testing.assert_array_equal(power, np.array([0, 0, 1, 1, np.inf, np.nan, np.inf, 0], np.float32))
    assert product[2] == np.float32(-1e-40) / 2
    assert flushed[2] == 0
    assert np.signbit(flushed[2])
    np.testing.assert_array_equal(logarithm[[0, 2, 3, 6]], np.array([np.nan, -np.inf, -np.inf, np.inf], np.float32))
    np.testing.assert_array_equal(clamped, np.array([1, 1, 0, 0, 1, 0, 1, 1], np.float32))


def test_signs() -> None:
    x = np.array([0x3C00, 0xBC00, 0x7E01, 0xFC00], np.uint16)
    negated, absolute = compute("neg.f16 %d0, %a0; abs.bf16 %d1, %a0;", [x], ["u2", "u2"])
    np.testing.assert_array_equal(negated, x ^ 0x8000)
    np.testing.assert_array_equal(absolute, x & 0x7FFF)
    pairs = x.view(np.uint32)
    negated, moved = compute("neg.bf16x2 %d0, %a0; copysign.f32 %d1, 0fBF800000, %a0;", [pairs], ["u4", "u4"])
    np.testing.assert_array_equal(negated, pairs ^ 0x80008000)
    np.testing.assert_array_equal(moved, pairs | 0x80000000)
