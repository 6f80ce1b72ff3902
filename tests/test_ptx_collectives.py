"""Shuffles, votes and matrix instructions of interpreted PTX, against the ISA's pseudocode and CUTLASS's layouts."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.simt.interpreter import PtxFault
from tests.ptx_programs import compute, run_text

few = settings(max_examples=25, deadline=None)
Layout = Callable[[int, int], int]


def isa_shuffle(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The pseudocode of shfl.sync (PTX ISA): the lane that is read, and the predicate."""
    bval, cval, segmask = b & 0x1F, c & 0x1F, c >> 8 & 0x1F
    max_lane = (lane & segmask) | (cval & ~segmask)
    min_lane = lane & segmask
    if mode == "up":
        j = lane - bval
        inside = j >= max_lane
    elif mode == "down":
        j = lane + bval
        inside = j <= max_lane
    elif mode == "bfly":
        j = lane ^ bval
        inside = j <= max_lane
    else:
        j = min_lane | (bval & ~segmask)
        inside = j <= max_lane
    return (j if inside else lane), inside


@few
@given(
    mode=st.sampled_from(["up", "down", "bfly", "idx"]),
    by=st.lists(st.integers(0, 40), min_size=64, max_size=64),
    width=st.sampled_from([2, 4, 8, 16, 32]),
    any_clamp=st.none() | st.integers(0, 0x1F1F),
)
def test_shuffles(mode: str, by: list[int], width: int, any_clamp: int | None) -> None:
    """Clamps are those of CUDA's __shfl_*_sync for all widths, and any other; lanes shuffle by different amounts."""
    clamp = (32 - width << 8 | (0 if mode == "up" else 31)) if any_clamp is None else any_clamp
    values = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    result, inside = compute(
        f"shfl.sync.{mode}.b32 %d0|%p1, %a0, %a1, {clamp}, -1; selp.b32 %d1, 1, 0, %p1;",
        [values, np.array(by, np.uint32)],
        ["u4", "u4"],
    )
    for i in range(64):
        source, valid = isa_shuffle(mode, i % 32, by[i], clamp)
        assert (result[i], inside[i]) == (values[i // 32 * 32 + source], valid), i


@few
@given(votes=st.lists(st.booleans(), min_size=64, max_size=64), first=st.sampled_from(["", "all", "none"]))
def test_votes(votes: list[bool], first: str) -> None:
    votes = [True] * 32 + votes[32:] if first == "all" else [False] * 32 + votes[32:] if first == "none" else votes
    ballot, all_, any_, none, alike = compute(
        "setp.ne.u32 %p1, %a0, 0; vote.sync.ballot.b32 %d0, %p1, 0xffffffff;"
        "vote.sync.all.pred %p2, %p1, -1; selp.b32 %d1, 1, 0, %p2; vote.sync.any.pred %p3, %p1, -1;"
        "selp.b32 %d2, 1, 0, %p3; vote.sync.all.pred %p4, !%p1, -1; selp.b32 %d3, 1, 0, %p4;"
        "vote.sync.uni.pred %p5, %p1, -1; selp.b32 %d4, 1, 0, %p5;",
        [np.array(votes, np.uint32)],
        ["u4"] * 5,
    )
    for i in range(64):
        warp = votes[i // 32 * 32 : i // 32 * 32 + 32]
        assert ballot[i] == sum(vote << lane for lane, vote in enumerate(warp))
        assert (all_[i], any_[i], none[i]) == (all(warp), any(warp), not any(warp))
        assert alike[i] == (len(set(warp)) == 1)


def test_a_shuffle_of_some_lanes_is_refused() -> None:
    with pytest.raises(PtxFault, match="only some lanes"):
        compute("shfl.sync.bfly.b32 %d0, %a0, 1, 31, 0xFFFF;", [np.zeros(32, np.uint32)], ["u4"])


def layout(
    thread_shape: tuple[int, ...], thread_stride: tuple[int, ...], shape: tuple[int, ...], stride: tuple[int, ...]
) -> Layout:
    """A CuTe layout of (thread, value), as CUTLASS writes it."""

    def offset(index: int, extents: tuple[int, ...], strides: tuple[int, ...]) -> int:
        total = 0
        for extent, step in zip(extents, strides, strict=True):
            total += index % extent * step
            index //= extent
        return total

    return lambda thread, value: offset(thread, thread_shape, thread_stride) + offset(value, shape, stride)


# CUTLASS, cute/atom/mma_traits_sm80.hpp, SM80_16x8x16_F32F16F16F32_TN: offsets in M x K, N x K and M x N, column-major.
A_LAYOUT = layout((4, 8), (32, 1), (2, 2, 2), (16, 8, 128))
B_LAYOUT = layout((4, 8), (16, 1), (2, 2), (8, 64))
C_LAYOUT = layout((4, 8), (32, 1), (2, 2), (16, 8))
# cute/atom/copy_traits_sm75.hpp: SM75_U32x4_LDSM_N and SM75_U16x8_LDSM_T, offsets in bits of the rows in lane order.
LDSM_N = layout((32,), (32,), (32, 4), (1, 1024))
LDSM_T = layout((4, 8), (256, 16), (16, 2, 4), (1, 128, 1024))


def in_lanes(matrix: np.ndarray, positions: Layout, values: int) -> np.ndarray:
    """[32, values] elements of a matrix that each lane holds."""
    flat = matrix.reshape(-1, order="F")
    return np.array([[flat[positions(lane, value)] for value in range(values)] for lane in range(32)])


@pytest.mark.parametrize(("kind", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_mma_has_cutlass_fragments(kind: str, dtype: type) -> None:
    """Two warps with different matrices; d is a register of c."""
    rng = np.random.default_rng(0)
    registers: list[list[np.ndarray]] = []
    expected = []
    for _ in range(2):
        a, b = rng.normal(size=(16, 16)).astype(dtype), rng.normal(size=(16, 8)).astype(dtype)
        c = rng.normal(size=(16, 8)).astype(np.float32)
        words = [in_lanes(m, p, n).view(np.uint32) for m, p, n in ((a, A_LAYOUT, 8), (b.T, B_LAYOUT, 4))]
        registers.append([*words[0].T, *words[1].T, *in_lanes(c, C_LAYOUT, 4).view(np.uint32).T])
        exact = a.astype(np.float64) @ b.astype(np.float64) + c
        expected.append(in_lanes(exact.astype(np.float32), C_LAYOUT, 4))
    inputs = [np.ascontiguousarray(np.concatenate(pair)) for pair in zip(*registers, strict=True)]
    results = compute(
        "mov.b32 %d0, %a6; mov.b32 %d1, %a7; mov.b32 %d2, %a8; mov.b32 %d3, %a9;"
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2, %a3}},"
        "{%a4, %a5}, {%d0, %d1, %d2, %d3};",
        inputs,
        ["f4"] * 4,
    )
    np.testing.assert_allclose(np.stack(results, axis=1), np.concatenate(expected), rtol=2e-7)


@pytest.mark.parametrize(("modifier", "positions"), [("", LDSM_N), (".trans", LDSM_T)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_has_cutlass_fragments(modifier: str, positions: Layout, count: int) -> None:
    """Rows 80 bytes apart, so that a row taken from a wrong lane's address shows."""
    x = np.random.default_rng(1).integers(0, 2**16, (32, 8), dtype=np.uint16)
    y = np.zeros((32, count), np.uint32)
    rows = "".join(f"ld.global.u32 %r2, [%rd2+{4 * i}]; st.shared.u32 [%r3+{4 * i}], %r2;" for i in range(4))
    names = ", ".join(f"%r{4 + i}" for i in range(count))
    stores = "".join(f"st.global.u32 [%rd4+{4 * i}], %r{4 + i};" for i in range(count))
    report = run_text(
        "mul.wide.u32 %rd2, %r0, 16; add.s64 %rd2, %rd0, %rd2; mov.u32 %r3, shared; mad.lo.u32 %r3, %r0, 80, %r3;"
        f"{rows}"
        f"bar.warp.sync -1; ldmatrix.sync.aligned.m8n8.x{count}{modifier}.shared.b16 {{{names}}}, [%r3];"
        f"mul.wide.u32 %rd4, %r0, {4 * count}; add.s64 %rd4, %rd1, %rd4; {stores} ret;",
        {"x": x, "y": y},
        shared_bytes=32 * 80,
    )
    bits = np.unpackbits(x.view(np.uint8).reshape(-1), bitorder="little")
    held = [[bits[positions(lane, value)] for value in range(32 * count)] for lane in range(32)]
    np.testing.assert_array_equal(np.packbits(held, axis=1, bitorder="little").view(np.uint32), y)
    assert report.bank_conflicts == 0  # 80 bytes: eight rows in eight different banks


def test_bank_conflicts_of_ldmatrix() -> None:
    """Rows 128 bytes apart share a bank: eight wavefronts for each of four matrices instead of one."""
    x = np.zeros(1, np.uint32)
    report = run_text(
        "mov.u32 %r3, shared; mad.lo.u32 %r3, %r0, 128, %r3;"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r3]; ret;",
        {"x": x},
        shared_bytes=32 * 128,
    )
    assert report.bank_conflicts == 28


def test_matrix_instructions_are_counted_by_warp() -> None:
    fragment = "{%r1, %r1, %r1, %r1}"
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    text = f"mov.b32 %r1, 0; {mma} {fragment}, {fragment}, {{%r1, %r1}}, {fragment}; ret;"
    assert run_text(text, {"x": np.zeros(1)}, threads=96, grid=(5, 2, 3)).mma == 90
