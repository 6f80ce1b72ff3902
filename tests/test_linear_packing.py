"""Packed low-bit weights (plugins/linear): where every code lies, and that nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import EdgeError
from plugins.linear.meaning import ZEROS, argmax, linear, weights
from plugins.linear.pack import (
    GROUPS,
    chunk_inputs,
    pack_codes,
    pack_scales,
    unpack_codes,
    unpack_scales,
    vector_inputs,
)

BITS = st.sampled_from((2, 4, 8))


def place(row: int, k: int, bits: int) -> tuple[int, int, int, int, int]:
    """(tile, vector, lane, word, lowest bit) of a code, as plugins/linear describes it, one code at a time."""
    g, upper = row % 8, row // 8 % 2  # rows g and g + 8 of the tile
    vector, inside = divmod(k, 256 // bits)
    span, inside = divmod(inside, 32)
    q, inside = divmod(inside, 8)  # the lane's eight inputs of every 32
    step, inside = divmod(inside, 4)  # four of one step, four of the next
    later, high = divmod(inside, 2)  # (0, 1) then (2, 3); the lower input in the lower half
    pair = 4 * (2 * span + step) + 2 * later + upper
    word, field = divmod(pair, 16 // bits)
    return row // 16, vector, 4 * g + q, word, bits * field + 16 * high


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_code_lies_where_mma_wants_it(bits: int) -> None:
    n, k = 32, 2 * vector_inputs(bits)
    codes = np.random.default_rng(bits).integers(0, 3 if bits == 2 else 1 << bits, (n, k)).astype(np.uint8)
    words = pack_codes(codes, bits)
    assert words.shape == (2, 2, 32, 4)
    assert words.dtype == np.int32
    seen = set()
    for row in range(n):
        for column in range(k):
            *word, bit = spot = place(row, column, bits)
            seen.add(spot)
            assert (int(words[tuple(word)]) >> bit) & ((1 << bits) - 1) == codes[row, column], spot
    assert len(seen) == n * k


@given(bits=BITS, n=st.integers(1, 40), vectors=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_codes_round_trip(bits: int, n: int, vectors: int, seed: int) -> None:
    k = vectors * 128
    codes = np.random.default_rng(seed).integers(0, 3 if bits == 2 else 1 << bits, (n, k)).astype(np.uint8)
    words = pack_codes(codes, bits)
    assert words.nbytes == -(-n // 16) * 16 * k * bits // 8
    np.testing.assert_array_equal(unpack_codes(words, bits, n), codes)
    whole = unpack_codes(words, bits, -(-n // 16) * 16)
    assert (whole[n:] == ZEROS[bits]).all()


@given(bits=BITS, group=st.sampled_from(GROUPS), n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_scales_round_trip(bits: int, group: int, n: int, seed: int) -> None:
    k = 2 * chunk_inputs(bits, group)
    shape, dtype = ((n, k // group), np.float16) if group else ((n,), np.float32)
    scales = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    packed = pack_scales(scales, k, bits)
    assert packed.dtype == dtype
    np.testing.assert_array_equal(unpack_scales(packed, n), scales)
    assert (unpack_scales(packed, -(-n // 16) * 16)[n:] == 0).all()
    if group:  # one lane's scales of a chunk: consecutive, rows g and g + 8 side by side
        chunk, row = 1, min(n - 1, 9)
        got = packed[row // 16, chunk, row % 8, :, row // 8 % 2]
        np.testing.assert_array_equal(got, scales[row, packed.shape[3] * chunk :])


def test_meaning_by_hand() -> None:
    codes = np.array([[0, 1, 2, 1], [2, 2, 0, 0]], np.uint8)
    np.testing.assert_array_equal(
        weights(codes, np.array([0.5, 2], np.float32), 2), [[-0.5, 0, 0.5, 0], [2, 2, -2, -2]]
    )
    grouped = np.array([[1, 4], [2, 8]], np.float16)
    np.testing.assert_array_equal(weights(codes + 7, grouped, 4), [[-1, 0, 4, 0], [2, 2, -8, -8]])
    x = np.array([[1, 2, 3, 4]], np.float16)
    np.testing.assert_array_equal(linear(x, codes, np.ones(2, np.float32), 2), [[2, -4]])
    nan, inf = np.nan, np.inf
    logits = np.array([[1, 3, 3], [nan, -inf, 2], [nan, nan, nan], [nan, -inf, -inf], [inf, nan, inf]], np.float32)
    np.testing.assert_array_equal(argmax(logits), [1, 2, 0, 0, 0])


def test_what_cannot_be_packed_is_refused() -> None:
    codes = np.zeros((16, 128), np.uint8)
    for bits, code in ((2, 3), (4, 16)):
        codes[3, 5] = code
        with pytest.raises(EdgeError, match=f"code {code} is not one of"):
            pack_codes(codes, bits)
    with pytest.raises(EdgeError, match="3 bits"):
        pack_codes(codes, 3)
    with pytest.raises(EdgeError, match="96 inputs are not whole chunks of 64: pad the weights with code 8"):
        pack_codes(np.zeros((16, 96), np.uint8), 4)
    with pytest.raises(EdgeError, match="192 inputs are not whole chunks of 128"):
        pack_codes(np.zeros((16, 192), np.uint8), 2)
    with pytest.raises(EdgeError, match="group size 16"):
        pack_scales(np.ones((16, 8), np.float16), 128, 4)
    with pytest.raises(EdgeError, match="do not fit float16"):
        pack_scales(np.full((16, 1), 1e6, np.float32), 128, 4)
    with pytest.raises(EdgeError, match="do not fit float16"):
        pack_scales(np.full((16, 1), 0.1, np.float32), 128, 4)
