"""What the device language computes, by every route: rounding, fragments, bits, warps, against independent truth.

Half and bf16 results are compared bit for bit with float64 results rounded once, fragments with the layouts that
CUTLASS publishes and the PTX ISA's definition of ldmatrix, integers with numpy.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import pytest

from plugins.build.nvrtc import ptx
from plugins.launch import Kernel, Launch
from tests.cuda_routes import ROUTES, run_route
from tests.ptx_programs import BF16, F16, Format
from tests.test_ptx_collectives import A_LAYOUT, B_LAYOUT, C_LAYOUT, in_lanes

SOURCE, THREADS = "../tests/simt_numbers.cu", 128
ELEMENTS: dict[str, tuple[np.dtype, Format]] = {
    "half": (np.dtype(np.float16), F16),
    "bf16": (np.dtype(ml_dtypes.bfloat16), BF16),
}
NAN = 0x7FFF  # the only one that arithmetic makes


def rounded(x: np.ndarray, form: Format) -> np.ndarray:
    """Bit patterns of float64 values rounded to nearest even."""
    with np.errstate(all="ignore"):
        last = np.maximum(np.frexp(x)[1] - form.precision, form.smallest_exponent)
        value = np.ldexp(np.rint(np.ldexp(x, -last)), last)
        if form is F16:
            pattern = value.astype(np.float16).view(np.uint16)
        else:
            pattern = (value.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), NAN, pattern).astype(np.uint16)


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray, form: Format) -> np.ndarray:
    """x * y + z rounded once. A float64 sum that looks like a tie is moved to the side where the exact sum is."""
    product = x * y  # exact: 16 or 22 bits
    total = product + z
    part = total - product
    error = (product - (total - part)) + (z - part)
    last = np.maximum(np.frexp(total)[1] - form.precision, form.smallest_exponent)
    tie = np.isfinite(error) & (error != 0) & (np.abs(np.ldexp(total, -last) % 1) == 0.5)
    return rounded(np.where(tie, np.nextafter(total, np.copysign(np.inf, error)), total), form)


@cache
def patterns(element: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n] uint32 each: all 16-bit patterns, any bits, numbers of like size, and ties that a third number decides."""
    rng = np.random.default_rng(0)
    every = np.arange(1 << 16, dtype=np.uint32)
    anything = rng.integers(0, 1 << 32, (3, 1 << 15), dtype=np.uint32)
    one = 0x3C00 if element == "half" else 0x3F80
    sign = rng.integers(0, 2, (3, 1 << 14)) << 15
    near = (one + rng.integers(-300, 300, (3, 1 << 14)) ^ sign).astype(np.uint16).view(np.uint32)
    floats = np.concatenate([near_ties(rng, element), rng.standard_normal(1 << 12).astype(np.float32).view(np.uint32)])
    form = ELEMENTS[element][1]
    tiny = Fraction(2) ** (form.smallest_exponent + 3)
    encode = [form.encode(Fraction(v)) * 0x10001 for v in (129, 3, tiny, -tiny)]
    decided = np.array([[encode[0]] * 2, [encode[1]] * 2, encode[2:]], np.uint32)
    a = [every * 0x10001, anything[0], near[0], floats, decided[0]]
    b = [rng.permutation(every) << 16 | every, anything[1], near[1], floats, decided[1]]
    c = [rng.permutation(every) * 0x10001, anything[2], near[2], floats[::-1], decided[2]]
    return np.concatenate(a), np.concatenate(b), np.concatenate(c)


def near_ties(rng: np.random.Generator, element: str) -> np.ndarray:
    """float32 bits at and next to the middles between two neighbours, also of subnormal and the largest numbers."""
    dtype, _ = ELEMENTS[element]
    low = rng.integers(0, 0x7C00 if element == "half" else 0x7F80, 1 << 12, dtype=np.uint16)
    low[:3] = 0, 1, 0x7BFF if element == "half" else 0x7F7F
    middle = (low.view(dtype).astype(np.float64) + (low + np.uint16(1)).view(dtype).astype(np.float64)) / 2
    middle[~np.isfinite(middle)] = 65520 if element == "half" else 3.3961775e38
    bits = middle.astype(np.float32).view(np.uint32)
    return np.concatenate([bits, bits + 1, bits - 1, bits | 0x80000000])


@cache
def fragment_operands(element: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Registers of a warp's mma, its exact result in lanes, and rows for ldmatrix."""
    dtype, rng = ELEMENTS[element][0], np.random.default_rng(1)
    a, b = (rng.integers(-8, 9, shape).astype(dtype) for shape in ((16, 16), (16, 8)))
    c = rng.integers(-99, 99, (16, 8)).astype(np.float32)
    words = [in_lanes(m, p, n).view(np.uint32) for m, p, n in ((a, A_LAYOUT, 8), (b.T, B_LAYOUT, 4), (c, C_LAYOUT, 4))]
    product = a.astype(np.float32) @ b.astype(np.float32) + c
    rows = rng.integers(0, 1 << 16, (32, 8), dtype=np.uint16)
    return np.concatenate(words, axis=1), in_lanes(product, C_LAYOUT, 4), rows


@cache
def run_numbers(route: str, element: str) -> dict[str, np.ndarray]:
    a, b, c = patterns(element)
    operands, products, matrix = fragment_operands(element)
    buffers = {
        "a": a,
        "b": b,
        "c": c,
        "out": np.zeros((9, len(a)), np.uint32),
        "operands": operands,
        "products": np.zeros_like(products),
        "matrix": matrix,
        "fragments": np.zeros((2, 32, 4), np.uint32),
    }
    kernel = Kernel(SOURCE, f"numbers<{element}>", "NumberArguments", THREADS)
    grid = (-(-len(a) // THREADS), 1, 1)
    run_route(route, [Launch(kernel, grid, (*buffers, np.int32(len(a))), 32 * 16)], buffers, seed=int(route != "ptx"))
    return buffers


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ROUTES)
def test_pairs_are_rounded_once(route: str, element: str) -> None:
    dtype, form = ELEMENTS[element]
    out = run_numbers(route, element)["out"]
    with np.errstate(all="ignore"):
        x, y, z = (words.view(dtype).astype(np.float64) for words in patterns(element))
        want = {0: rounded(x + y, form), 1: rounded(x - y, form), 2: rounded(x * y, form), 3: fused(x, y, z, form)}
    for operation, patterns_ in want.items():
        np.testing.assert_array_equal(out[operation].view(np.uint16), patterns_, err_msg=str(operation))


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ROUTES)
def test_conversions_are_rounded_once_and_widening_is_exact(route: str, element: str) -> None:
    dtype, form = ELEMENTS[element]
    a, b, c = patterns(element)
    out = run_numbers(route, element)["out"]
    with np.errstate(all="ignore"):
        low, high = (rounded(words.view(np.float32).astype(np.float64), form) for words in (b, c))
    np.testing.assert_array_equal(out[4], low | high.astype(np.uint32) << 16)
    np.testing.assert_array_equal(out[5], high * np.uint32(0x10001))
    for got, narrow in ((out[6:8].T, a.view(dtype).reshape(-1, 2)), (out[8], b.view(dtype)[::2])):
        with np.errstate(invalid="ignore"):
            wide, number = narrow.astype(np.float32), ~np.isnan(narrow)
        np.testing.assert_array_equal(got[number], wide.view(np.uint32)[number])
        assert np.isnan(np.ascontiguousarray(got).view(np.float32)[~number]).all()


@pytest.mark.parametrize("element", ELEMENTS)
def test_the_rounding_oracle_agrees_with_fractions(element: str) -> None:
    dtype, form = ELEMENTS[element]
    chosen = np.random.default_rng(2).choice(len(patterns(element)[0]), 1500)
    words = [np.concatenate([p[chosen], p[-2:]]) for p in patterns(element)]
    with np.errstate(all="ignore"):
        x, y, z = (w.view(dtype)[::2].astype(np.float64) for w in words)
        got = fused(x, y, z, form)
    for i in np.flatnonzero(np.isfinite(x) & np.isfinite(y) & np.isfinite(z)):
        exact = Fraction(x[i]) * Fraction(y[i]) + Fraction(z[i])
        if exact:
            assert got[i] == form.encode(exact), (x[i], y[i], z[i])


@pytest.mark.parametrize("architecture", ["sm_87", "sm_120"])
def test_products_and_sums_are_not_fused_later(architecture: str) -> None:
    """ptxas makes one rounding of a product and a sum that do not say .rn: no route here would show it."""
    kernels = [Kernel(SOURCE, f"numbers<{element}>", "NumberArguments", THREADS) for element in ELEMENTS]
    text = ptx(kernels, architecture)
    assert "mul.rn.f16x2" in text
    assert re.findall(r"\b(?:add|sub|mul)\.b?f16(?:x2)?\b", text) == []


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ROUTES)
def test_mma_has_cutlass_fragments(route: str, element: str) -> None:
    np.testing.assert_array_equal(run_numbers(route, element)["products"], fragment_operands(element)[1])


@pytest.mark.parametrize("route", ROUTES)
def test_ldmatrix_gives_what_the_isa_says(route: str) -> None:
    """Lane 8 m + r names row r of matrix m; lane l gets elements 2 (l % 4), +1 of row l / 4 (transposed: column)."""
    got = run_numbers(route, "half")["fragments"].view(np.uint16).reshape(2, 32, 4, 2)
    matrices = fragment_operands("half")[2].reshape(4, 8, 8)
    for lane in range(32):
        for m in range(4):
            for e in range(2):
                assert got[0, lane, m, e] == matrices[m][lane // 4][2 * (lane % 4) + e]
                assert got[1, lane, m, e] == matrices[m][2 * (lane % 4) + e][lane // 4]


@cache
def integer_inputs() -> dict[str, np.ndarray]:
    rng, n = np.random.default_rng(3), 64 * THREADS
    a, b, c = rng.integers(0, 1 << 32, (3, n), dtype=np.uint32)
    floats = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2**31, -(2**31), 2**31 - 128, 3e9, -3e9, np.inf, -np.inf, np.nan, 0])
    a[: len(floats)] = floats.astype(np.float32).view(np.uint32)
    a[32:64] = a[32:64] // 64 * 64  # a warp of multiples of 32, and one with none
    a[64:96] |= 1
    b[96:128] = a[96:128] = np.float32(np.nan).view(np.uint32)
    b[96:112] = np.float32(1).view(np.uint32)
    for words in (a, b):  # no signalling NaN: fminf does not know them
        words[np.isnan(words.view(np.float32))] |= np.uint32(0x400000)
    return {"a": a, "b": b, "c": c, "rows": rng.integers(0, 1 << 32, (n, 4), dtype=np.uint32)}


@cache
def run_integers(route: str) -> dict[str, np.ndarray]:
    given = integer_inputs()
    n = len(given["a"])
    buffers = {
        **{name: given[name] for name in ("a", "b", "c")},
        "out": np.zeros((24, n), np.uint32),
        "rows": given["rows"],
        "copied": np.full((n, 4), 0xFFFFFFFF, np.uint32),
        "count": np.zeros(256, np.int32),
        "most": np.array([0, -(2**31)], np.int64).astype(np.uint32),
        "total": np.zeros(1, np.float32),
    }
    kernel = Kernel(SOURCE, f"integers<{THREADS}>", "IntegerArguments", THREADS)
    launch = Launch(kernel, (n // THREADS, 1, 1), (*buffers, np.int32(n)), THREADS * 16 + 256 * 4)
    run_route(route, [launch], buffers, seed=int(route != "ptx"))
    return buffers


def bit(words: np.ndarray, i: int) -> np.ndarray:
    return words >> np.uint32(i) & 1


def lookup(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """lop3: bit i of the result is the table's bit 4 a_i + 2 b_i + c_i."""
    return sum((table >> (4 * bit(a, i) + 2 * bit(b, i) + bit(c, i)) & 1).astype(np.uint32) << i for i in range(32))


@pytest.mark.parametrize("route", ROUTES)
def test_bits_and_conversions(route: str) -> None:
    out = run_integers(route)["out"]
    a, b, c = (integer_inputs()[name] for name in ("a", "b", "c"))
    joined = np.stack([a, b], axis=1).view(np.uint8)  # eight bytes of each
    selected = [np.take_along_axis(joined, (c[:, None] >> 4 * i & 7).astype(np.int64), 1)[:, 0] for i in range(4)]
    np.testing.assert_array_equal(out[0], np.stack(selected, axis=1).view(np.uint32)[:, 0])
    ones = np.unpackbits(a.view(np.uint8), bitorder="little").reshape(-1, 32)
    np.testing.assert_array_equal(out[1], ones.sum(axis=1))
    np.testing.assert_array_equal(out[2], np.where(a == 0, 0, ones.argmax(axis=1) + 1))
    np.testing.assert_array_equal(out[3], np.where(a == 0, 32, ones[:, ::-1].argmax(axis=1)))
    x = a.view(np.float32).astype(np.float64)
    nearest = np.clip(np.rint(np.where(np.isnan(x), 0, x)), -(2**31), 2**31 - 1).astype(np.int64)
    np.testing.assert_array_equal(out[4].view(np.int32), nearest)
    for row, table in enumerate((0x96, 0xEA, 0xCA, 0x1B), 5):
        np.testing.assert_array_equal(out[row], lookup(table, a, b, c))


@pytest.mark.parametrize("route", ROUTES)
def test_lanes_exchange_and_vote(route: str) -> None:
    out = run_integers(route)["out"]
    a, b = integer_inputs()["a"], integer_inputs()["b"]
    warps, lane = a.reshape(-1, 32), np.arange(32)
    up, down = np.where(lane < 3, lane, lane - 3), np.where(lane > 26, lane, lane + 5)
    shuffles = {9: up, 10: down, 11: lane ^ 21, 21: lane ^ 1}
    for row, source in shuffles.items():
        np.testing.assert_array_equal(out[row], warps[:, source].reshape(-1))
    any_lane = np.take_along_axis(warps, (b % 32).reshape(-1, 32).astype(np.int64), 1)
    np.testing.assert_array_equal(out[12], any_lane.reshape(-1))
    votes = (warps % 3 == 0).astype(np.uint64) << lane.astype(np.uint64)
    np.testing.assert_array_equal(out[13], np.repeat(votes.sum(axis=1), 32))
    some = (warps % 32 == 0).any(axis=1)
    assert some.any() and not some.all()
    np.testing.assert_array_equal(out[14], np.repeat(some, 32))
    np.testing.assert_array_equal(out[15], np.repeat(~some, 32))


@pytest.mark.parametrize("route", ROUTES)
def test_comparisons_and_approximations(route: str) -> None:
    out = run_integers(route)["out"]
    a, b = integer_inputs()["a"], integer_inputs()["b"]
    x, y = a.view(np.float32), b.view(np.float32)
    np.testing.assert_array_equal(out[16].view(np.int32), np.minimum(a.view(np.int32), b.view(np.int32)))
    np.testing.assert_array_equal(out[17], np.maximum(a, b))
    np.testing.assert_array_equal(out[18].view(np.float32), np.minimum(x, y))  # not a number if either is none
    np.testing.assert_array_equal(out[19].view(np.float32), np.fmin(x, y))
    np.testing.assert_array_equal(out[20].view(np.float32), np.fmax(x, y))
    exponent = a.view(np.int32).astype(np.float32).astype(np.float64) * 2.0**-25
    np.testing.assert_allclose(out[22].view(np.float32), np.exp2(exponent), rtol=4e-7)
    logarithm = np.log2((a % 0xFFFFFF + 1).astype(np.float64))
    np.testing.assert_allclose(out[23].view(np.float32), logarithm, rtol=4e-7)


@pytest.mark.parametrize("route", ROUTES)
def test_copies_and_atomics(route: str) -> None:
    """Copies that are not valid give zeros and read nothing (their address is null)."""
    got, given = run_integers(route), integer_inputs()
    a = given["a"]
    rows = np.where((a % 2 == 1)[:, None], given["rows"], 0).reshape(-1, THREADS, 4)
    np.testing.assert_array_equal(got["copied"], np.roll(rows, -1, axis=1).reshape(-1, 4))
    np.testing.assert_array_equal(got["count"], np.bincount(a % 256, minlength=256))
    assert got["most"][0] == a.max()
    assert got["most"].view(np.int32)[1] == a.view(np.int32).max()
    assert got["total"][0] == (a % 16).sum()
