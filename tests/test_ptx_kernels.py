"""Small CUDA kernels, compiled by both NVRTCs and interpreted: the language of plugins/simt, errors in its assembly."""

from __future__ import annotations

import re
from functools import cache

import ml_dtypes
import numpy as np
import pytest

from plugins.build.nvrtc import compile_module
from plugins.launch import Argument, Kernel, Launch
from plugins.simt import Report
from plugins.simt.interpreter import PtxFault, execute
from tests.asm_mutations import MUTATIONS, mutate

# sm_87 is compiled by CUDA 12.6 (PTX 8.5), sm_86 by CUDA 13.
ARCHITECTURES = ("sm_87", "sm_86")
SOURCE = r"""
#include "plugins/simt/device.h"

// Pairs and floats: every function of numbers.h.
struct NumbersArguments { const uint32_t* a; const uint32_t* b; const float* f; uint32_t* pairs; float* floats; };
template <class T>
DEVICE void numbers(const NumbersArguments& s) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t a = s.a[i], b = s.b[i];
  const float f = s.f[i];
  const float2 u = unpack<T>(a);
  uint32_t* p = s.pairs + 7 * i;
  p[0] = add<T>(a, b);
  p[1] = subtract<T>(a, b);
  p[2] = multiply<T>(a, b);
  p[3] = multiply_add<T>(a, b, twice(from_float<T>(f)));
  p[4] = pack<T>(f, u.x);
  p[5] = twice(from_float<T>(f));
  p[6] = ptx::lop3<(0xF0 & 0xCC) | 0xAA>(a, 0x000f000fu, b);
  float* o = s.floats + 6 * i;
  o[0] = u.x + to_float(from_float<T>(f));
  o[1] = ptx::exp2(f);
  o[2] = ptx::log2(fabsf(f));
  o[3] = f / u.y;
  o[4] = sqrtf(fabsf(u.y));
  o[5] = expf(f);
}

// Integers, bits, votes and shuffles of CUDA C++.
struct IntegersArguments { const int* x; const uint4* v; int* out; int* counts; float factor; int n; };
DEVICE void run_integers(const IntegersArguments& s) {
  const int i = blockIdx.y * gridDim.x * blockDim.x + blockIdx.x * blockDim.x + threadIdx.x, x = i < s.n ? s.x[i] : 0;
  int steps = 0;  // Collatz: trip counts differ by thread
  for (unsigned v = static_cast<unsigned>(x) % 100 + 1; v != 1; v = v % 2 ? 3 * v + 1 : v / 2) steps++;
  int sum = steps;
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  const unsigned odd = __ballot_sync(~0u, steps % 2);
  int prefix = steps;
  for (int d = 1; d < 8; d *= 2) {
    const int before = __shfl_up_sync(~0u, prefix, d, 8);
    if (threadIdx.x % 8 >= d) prefix += before;
  }
  if (__any_sync(~0u, x == 5)) atomicAdd(s.counts, 1);
  if (x > 0) atomicMax(s.counts + 1, x);
  if (i >= s.n) return;
  const uint4 v = ptx::load_once(s.v + i);
  int* o = s.out + 10 * i;
  o[0] = steps;
  o[1] = sum;
  o[2] = __popc(odd);
  o[3] = prefix;
  o[4] = __ffs(x) * 1000 + __clz(x);
  o[5] = __byte_perm(v.x, v.y, 0x7531) ^ v.w;
  o[6] = x / 7 + x % 13 + min(x, s.n) + max(x, -3);
  o[7] = __float2int_rn(x * s.factor) + static_cast<int>(x * s.factor);
  o[8] = x / (s.n + 1) + static_cast<unsigned>(x) / 10u % 3u;
  o[9] = static_cast<int>(static_cast<int64_t>(x) * v.z >> 20);
}

// y [16, 8] = x [rows, 32 tiles] w, 4-bit codes w + 8, two columns a word: copies, ldmatrix, lop3, mma of one warp.
struct TileArguments { const half* x; const uint32_t* w; float* y; int rows, tiles; };
DEVICE void run_tile(const TileArguments& s) {
  SHARED_MEMORY(shared);
  const int lane = threadIdx.x;
  auto load = [&](int t) {
    unsigned char* stage = shared + t % 2 * 1536;
    if (t < s.tiles) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int chunk = lane + 32 * j, row = chunk / 4;
        const half* from = s.x + (row < s.rows ? row : 0) * s.tiles * 32 + t * 32 + chunk % 4 * 8;
        ptx::copy_async(stage + chunk * 16, from, row < s.rows);
      }
      ptx::copy_async(stage + 1024 + lane * 16, s.w + (t * 32 + lane) * 4);
    }
    ptx::commit_copies();
  };
  float sums[4] = {};
  load(0);
  for (int t = 0; t < s.tiles; ++t) {
    load(t + 1);
    ptx::wait_copies<1>();
    __syncthreads();
    const unsigned char* stage = shared + t % 2 * 1536;
    uint32_t codes[4];
    ptx::ldmatrix_transposed(codes, stage + 1024 + lane * 16);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t a[4], b[2];
      ptx::ldmatrix(a, stage + (lane % 16) * 64 + (2 * k + lane / 16) * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        b[i] = subtract<half>(ptx::lop3<(0xF0 & 0xCC) | 0xAA>(codes[2 * k + i], 0x000f000fu, 0x64006400u), 0x64086408u);
      ptx::mma<half>(sums, a, b[0], b[1], sums);
    }
    __syncthreads();
  }
  ptx::wait_copies<0>();
#pragma unroll
  for (int i = 0; i < 4; ++i) s.y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

KERNEL(numbers_half, 64, 1, NumbersArguments, (numbers<half>))
KERNEL(numbers_bf16, 64, 1, NumbersArguments, (numbers<bf16>))
KERNEL(integers, 64, 1, IntegersArguments, (run_integers))
KERNEL(tile, 32, 1, TileArguments, (run_tile))
"""


@cache
def module(architecture: str) -> str:
    return compile_module(SOURCE, architecture, "ptx").decode()


def launch(
    text: str,
    body: str,
    threads: int,
    grid: tuple[int, int, int],
    arguments: tuple[Argument, ...],
    buffers: dict[str, np.ndarray],
    shared_bytes: int = 0,
) -> Report:
    kernel = Kernel("", body, "", threads)
    return execute([Launch(kernel, grid, arguments, shared_bytes)], buffers, {kernel: text})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "dtype"), [("half", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_numbers(architecture: str, name: str, dtype: type) -> None:
    """Sums, differences and products of 16-bit numbers are exact in float64; tests of rounding ties are elsewhere."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(192, 2)).astype(dtype) for _ in range(2))
    f = rng.normal(size=192).astype(np.float32)
    buffers = {"a": a.view(np.uint32), "b": b.view(np.uint32), "f": f}
    buffers |= {"pairs": np.zeros((192, 7), np.uint32), "floats": np.zeros((192, 6), np.float32)}
    report = launch(module(architecture), f"numbers<{name}>", 64, (3, 1, 1), tuple(buffers), buffers)
    x, y, third = (v.astype(np.float64) for v in (a, b, f.astype(dtype)[:, None]))
    expected = [x + y, x - y, x * y, x * y + third, np.stack([f, x[:, 0]], axis=1), np.stack([f, f], axis=1)]
    for i, values in enumerate(expected):
        got = np.ascontiguousarray(buffers["pairs"][:, i]).view(dtype).reshape(-1, 2)
        np.testing.assert_array_equal(got, values.astype(np.float32).astype(dtype) if i > 3 else values.astype(dtype))
    words, others = a.view(np.uint32)[:, 0], b.view(np.uint32)[:, 0]
    np.testing.assert_array_equal(buffers["pairs"][:, 6], (words & 0x000F000F) | others)
    u = a.astype(np.float32)
    magnitude = np.abs(f).astype(np.float64)
    floats = buffers["floats"].T
    np.testing.assert_array_equal(floats[0], u[:, 0] + f.astype(dtype).astype(np.float32))
    np.testing.assert_allclose(floats[1:3], [np.exp2(f.astype(np.float64)), np.log2(magnitude)], rtol=1e-7)
    np.testing.assert_array_equal(floats[3:5], [f / u[:, 1], np.sqrt(np.abs(u[:, 1]))])
    np.testing.assert_allclose(floats[5], np.exp(f.astype(np.float64)), rtol=3e-7)
    assert report.read == {"a": 768, "b": 768, "f": 768, "pairs": 0, "floats": 0}
    assert (report.written["pairs"], report.written["floats"]) == (192 * 28, 192 * 24)


def collatz(x: int) -> int:
    v, steps = x % 2**32 % 100 + 1, 0
    while v != 1:
        v, steps = 3 * v + 1 if v % 2 else v // 2, steps + 1
    return steps


def signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_integers_and_warps(architecture: str) -> None:
    n, factor = 460, np.float32(1 / 3)
    rng = np.random.default_rng(1)
    x = rng.integers(-1000, 1000, n).astype(np.int32)
    x[[0, 70, 300]] = 5
    v = rng.integers(0, 2**31, (n, 4)).astype(np.uint32)
    buffers = {"x": x, "v": v, "out": np.zeros((n, 10), np.int32), "counts": np.zeros(2, np.int32)}
    report = launch(
        module(architecture), "integers", 64, (4, 2, 1), ("x", "v", "out", "counts", factor, np.int32(n)), buffers
    )
    padded = np.append(x, np.zeros(512 - n, np.int32)).tolist()
    steps = np.array([collatz(value) for value in padded])
    sums = np.repeat(steps.reshape(-1, 32).sum(axis=1), 32)
    odd = np.repeat((steps % 2).reshape(-1, 32).sum(axis=1), 32)
    prefix = np.cumsum(steps.reshape(-1, 8), axis=1).reshape(-1)
    rows = np.stack([steps, sums, odd, prefix], axis=1)[:n]
    np.testing.assert_array_equal(buffers["out"][:, :4], rows)
    for i, value in enumerate(padded[:n]):
        bits, words = value % 2**32, v[i].tolist()
        scaled = float(np.float32(value) * factor)
        wide = (words[1] << 32 | words[0]).to_bytes(8, "little")
        quotient, remainder = int(value / 7), value - int(value / 13) * 13
        assert buffers["out"][i, 4:].tolist() == [
            ((bits & -bits).bit_length()) * 1000 + 32 - bits.bit_length(),
            signed(int.from_bytes(wide[1::2], "little") ^ words[3]),
            quotient + remainder + min(value, n) + max(value, -3),
            round(scaled) + int(scaled),
            int(value / (n + 1)) + bits // 10 % 3,
            signed(value * words[2] >> 20),
        ], i
    warps_with_five = (np.array(padded).reshape(-1, 32) == 5).any(axis=1).sum()
    assert buffers["counts"].tolist() == [32 * warps_with_five, x.max()]
    assert report.read["v"] == 16 * n


def run_tile(text: str, rows: int = 11, tiles: int = 3) -> tuple[np.ndarray, np.ndarray, Report]:
    """-> what the kernel wrote and what it should have written; small integers, so all sums are exact."""
    rng = np.random.default_rng(2)
    x = rng.integers(-4, 5, (rows, 32 * tiles)).astype(np.float16)
    codes = rng.integers(0, 16, (32 * tiles, 8)).astype(np.uint16)
    y = np.full((16, 8), np.nan, np.float32)
    buffers = {"x": x, "w": codes.view(np.uint32), "y": y}
    report = launch(text, "tile", 32, (1, 1, 1), ("x", "w", "y", np.int32(rows), np.int32(tiles)), buffers, 3072)
    expected = np.zeros((16, 8), np.float32)
    expected[:rows] = x.astype(np.float32) @ (codes.astype(np.float32) - 8)
    return y, expected, report


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tile_of_mma_ldmatrix_lop3_and_copies(architecture: str) -> None:
    y, expected, report = run_tile(module(architecture))
    np.testing.assert_array_equal(y, expected)
    assert report.read == {"x": 11 * 96 * 2, "w": 96 * 16, "y": 0}
    assert (report.written["y"], report.mma) == (512, 6)


@pytest.mark.parametrize("name", MUTATIONS)
def test_errors_in_the_assembly_show(name: str) -> None:
    """Every planted error changes the result or is a fault."""
    try:
        y, expected, _ = run_tile(mutate(module("sm_87"), name))
    except PtxFault:
        return
    assert not np.array_equal(y, expected)


def test_a_mutation_that_changes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing in this PTX"):
        mutate("ret;", "wait_group off by one")


def test_faults_name_the_source_line() -> None:
    """x is a row too short: the copy that reaches past it is told by thread, buffer and line of ptx.h."""
    text = module("sm_87")
    buffers = {"x": np.zeros((10, 32), np.float16), "w": np.zeros(128, np.uint32), "y": np.zeros(128, np.float32)}
    message = re.compile(r"tile, thread 8 of block \(0, 0, 0\): global read .* of 'x', .*cp\.async.*\(ptx\.h:\d+\)")
    with pytest.raises(PtxFault, match=message):
        launch(text, "tile", 32, (1, 1, 1), ("x", "w", "y", np.int32(11), np.int32(1)), buffers, 3072)
    with pytest.raises(PtxFault, match=r"shared write of 16 bytes at byte 1024; the launch gives a block 1024 bytes"):
        launch(text, "tile", 32, (1, 1, 1), ("x", "w", "y", np.int32(10), np.int32(1)), buffers, 1024)


def test_arguments_must_fill_the_struct() -> None:
    buffers = {"x": np.zeros(1), "y": np.zeros(1)}
    with pytest.raises(Exception, match="the launch's arguments take 16 bytes, the kernel's struct 32"):
        launch(module("sm_87"), "tile", 32, (1, 1, 1), ("x", "y"), buffers)
