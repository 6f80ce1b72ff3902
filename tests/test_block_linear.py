"""edge.BlockLinear: packing, numpy meaning, ONNX function and every compiled kernel against products in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.block_linear.meaning import round_rows, weights
from plugins.block_linear.pack import BLOCKS, pack_codes, unpack_codes, vector_inputs
from plugins.linear.meaning import ZEROS
from plugins.tile_linear.pack import pack_tiles, unpack_tiles
from tests.operators import HOW, KERNELS, one_node, session

INPUTS = (("x", "float32", 2), ("codes", "uint8", 5), ("scales", "float32", 3))
OFFSETS = (("offsets", "float16", 3),)
EPSILON = np.finfo(np.float32).eps


class Sample:
    """A matrix of `bits` with or without offsets, and what it is multiplied with."""

    def __init__(self, rows: int, n: int, k: int, bits: int, block: int, offsets: bool, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.bits, self.block, self.n, self.k = bits, block, n, k
        self.codes = rng.integers(0, 3 if bits == 2 else 1 << bits, (n, k), dtype=np.uint8)
        blocks = -(-k // block)
        self.scales = rng.uniform(0.1, 2, (n, blocks)).astype(np.float32)
        self.offsets = rng.standard_normal((n, blocks)).astype(np.float16) if offsets else None
        # Rows whose blocks are of very different sizes, one of them nothing.
        sizes = np.exp2(rng.integers(-12, 12, (rows, blocks))) * (rng.random((rows, blocks)) < 0.9)
        self.x = (rng.standard_normal((rows, k)) * np.repeat(sizes, block, axis=1)[:, :k]).astype(np.float32)

    def feeds(self) -> dict[str, np.ndarray]:
        feeds = {
            "x": self.x,
            "codes": pack_codes(self.codes, self.bits, self.block),
            "scales": pack_tiles(self.scales),
        }
        return feeds if self.offsets is None else feeds | {"offsets": pack_tiles(self.offsets)}

    def run(self, how: str) -> np.ndarray:
        has_offsets = self.offsets is not None
        model = one_node(
            "BlockLinearOffsets" if has_offsets else "BlockLinear",
            (*INPUTS, *OFFSETS) if has_offsets else INPUTS,
            (("y", "float32"),),
            bits=self.bits,
            block=self.block,
            n=self.n,
            k=self.k,
        )
        return session(how, model).run(None, self.feeds())[0]

    def expected(self, how: str) -> tuple[np.ndarray, np.ndarray]:
        """The product in float64, and the sums of its terms' magnitudes."""
        of_codes = weights(self.codes, self.scales, self.bits, self.block)
        rounded = self.x if how == "function" else round_rows(self.x, self.block)
        product, size = rounded @ of_codes.T, np.abs(rounded) @ np.abs(of_codes).T
        if self.offsets is not None:
            shifts = np.repeat(self.offsets.astype(np.float64), self.block, axis=1)[:, : self.k]
            product, size = product + self.x @ shifts.T, size + np.abs(self.x) @ np.abs(shifts).T
        return product, size


@functools.cache
def sample(*parameters: int) -> Sample:
    return Sample(*parameters)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    bits=st.sampled_from(sorted(ZEROS)),
    block=st.sampled_from(BLOCKS),
    seed=st.integers(0, 99),
)
def test_packing_loses_nothing(n: int, k: int, bits: int, block: int, seed: int) -> None:
    one = Sample(1, n, k, bits, block, offsets=True, seed=seed)
    packed = pack_codes(one.codes, bits, block)
    assert packed.shape == (-(-n // 16), -(-k // block), block // vector_inputs(bits), 16, 4)
    assert np.array_equal(unpack_codes(packed, bits, n, k), one.codes)
    assert np.array_equal(unpack_tiles(pack_tiles(one.scales), n), one.scales)
    # All that is not a code of the matrix means 0.
    whole = unpack_codes(packed, bits, 16 * len(packed), packed.shape[1] * block)
    assert (whole[n:] == ZEROS[bits]).all() and (whole[:, k:] == ZEROS[bits]).all()


def test_the_layout_is_the_documented_one() -> None:
    codes = np.zeros((16, 64), np.uint8)
    codes[5, 8 + 4 + 2] = 15  # vector 1 of 8 inputs, upper field, byte 2
    packed = pack_codes(codes, 4, 64)
    assert packed[0, 0, 1, 5, 2] == 0xF0 and packed.sum() == 0xF0


def check(how: str, one: Sample) -> None:
    got, (wanted, size) = one.run(how), one.expected(how)
    # A rounding of each product and of each sum, of which there are few: blocks are summed as whole numbers.
    bound = size * EPSILON * (4 + -(-one.k // one.block) if how != "function" else one.k)
    worst = np.abs(got - wanted) - bound
    assert (worst <= 1e-30).all(), (how, float(worst.max()))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 5, 8, 9, 15, 17, 64, 65, 130]),
    n=st.integers(1, 300),
    k=st.integers(1, 700),
    bits=st.sampled_from(sorted(ZEROS)),
    block=st.sampled_from(BLOCKS),
    offsets=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_agrees_with_float64(rows: int, n: int, k: int, bits: int, block: int, offsets: bool, seed: int) -> None:
    one = Sample(rows, n, k, bits, block, offsets, seed)
    for how in HOW:
        check(how, one)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("bits", "block", "offsets"), [(4, 64, 0), (4, 32, 1), (2, 128, 0), (8, 64, 0)])
def test_a_real_size(how: str, bits: int, block: int, offsets: int) -> None:
    check(how, sample(70, 2080, 1024, bits, block, offsets))


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize(("bits", "offsets"), [(2, False), (4, False), (4, True), (8, False)])
def test_a_row_does_not_depend_on_those_beside_it(how: str, bits: int, offsets: bool) -> None:
    """So a token is the same number by number, whether it is decoded alone, verified in a tree or batched."""
    one = Sample(130, 100, 320, bits, 64, offsets)
    together, x = one.run(how), one.x
    for first, count in ((0, 1), (1, 2), (3, 5), (8, 8), (16, 9), (100, 30)):
        one.x = x[first : first + count]
        assert np.array_equal(one.run(how), together[first : first + count]), (first, count)


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("bits", sorted(ZEROS))
def test_the_largest_sums_do_not_overflow(how: str, bits: int) -> None:
    """Every code as far from zero as it goes, every activation +-127 in the same direction."""
    for code in (0, 2 if bits == 2 else (1 << bits) - 1):
        one = Sample(3, 33, 256, bits, 128, offsets=False)
        one.codes[:], one.x[:] = code, 127
        one.x[1] = -127
        one.x[2, ::2] = -127
        got, wanted = one.run(how), one.x.astype(np.float64) @ weights(one.codes, one.scales, bits, 128).T
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("how", HOW)
def test_no_rows_are_no_result(how: str) -> None:
    one = Sample(0, 40, 64, 4, 32, offsets=False)
    assert one.run(how).shape == (0, 40)
