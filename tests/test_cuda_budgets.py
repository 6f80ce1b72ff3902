"""The compiled kernels keep to their budgets, and code that does not is noticed."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bench.static import MODELS
from edge.config import SparseConfig
from edge.errors import EdgeError
from plugins.build.budgets import (
    BUDGETS,
    MEASURED,
    Bar,
    Budget,
    Budgets,
    Costs,
    budget_of,
    check,
    load_budgets,
    measure,
    render,
)
from plugins.build.cost import BOARDS, LIMITS, Cost, cost, hot_loop, occupancy, pipe_cycles
from plugins.build.nvrtc import ARCHITECTURES, compile_module, cubin
from plugins.build.registry import kernels_for, product_launches
from plugins.build.sass import Instruction, KernelCode, read_cubin
from plugins.build.wheels import wheel_file
from plugins.launch import Kernel, Launch

HEADER = '#include "plugins/simt/device.h"\n'


@pytest.fixture(scope="module")
def costs() -> Costs:
    return measure(product_launches().values())


# ---- the product -------------------------------------------------------------------------------------------


def test_every_kernel_keeps_to_its_budget_and_the_bars(costs: Costs) -> None:
    assert "\n".join(check(costs, load_budgets())) == ""


def test_every_kernel_is_there_for_every_architecture(costs: Costs) -> None:
    assert {tuple(by_architecture) for by_architecture in costs.values()} == {ARCHITECTURES}
    sources = {launch.kernel.source for launch in product_launches().values()}
    root = BUDGETS.parents[1]
    assert sources == {str(path.relative_to(root)) for path in root.glob("*/*.cu")}


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_of_any_bundle_spills(architecture: str) -> None:
    """The product's launches are examples; these are all that an export may contain."""
    formats = [(bits, group) for bits in (2, 4) for group in (0, 32, 64, 128)]
    sources: dict[str, set[Kernel]] = {}
    for config, element, low_bits in product(MODELS.values(), ("half", "bf16"), formats):
        sparse = replace(config, sparse=SparseConfig())
        for kv_element, head in ((element, low_bits), ("uint8_t", (8, 0))):
            for kernel in kernels_for(sparse, element, kv_element, low_bits, head):
                sources.setdefault(kernel.source, set()).add(kernel)
    for kernels in sources.values():
        code = read_cubin(cubin(sorted(kernels, key=lambda kernel: kernel.symbol), architecture)).values()
        assert {c.name: (c.spills, c.stack) for c in code if c.spills or c.stack} == {}


# ---- planted regressions -----------------------------------------------------------------------------------

STACK = """
struct Arguments { const int* x; int* y; int n; };
DEVICE void f(const Arguments& a) {
  int counts[16] = {};
  for (int i = 0; i < a.n; ++i) counts[a.x[32 * i + threadIdx.x] % 16] += i;  // which one is known at run time only
#pragma unroll
  for (int i = 0; i < 16; ++i) a.y[32 * i + threadIdx.x] = counts[i];
}
KERNEL(planted, 32, 1, Arguments, (f))
"""
SPILL = """
struct Arguments { const float* x; float* y; int n; };
DEVICE void f(const Arguments& a) {
  float sums[64];  // more than the 40 registers that six blocks leave
#pragma unroll
  for (int j = 0; j < 64; ++j) sums[j] = a.x[j * 256 + threadIdx.x];
  for (int i = 0; i < a.n; ++i) {
    const float x = a.x[i];
#pragma unroll
    for (int j = 0; j < 64; ++j) sums[j] = sums[j] * x + sums[63 - j];
  }
#pragma unroll
  for (int j = 0; j < 64; ++j) a.y[64 * threadIdx.x + j] = sums[j];
}
KERNEL(planted, 256, 6, Arguments, (f))
"""


def compiled(source: str, architecture: str) -> KernelCode:
    (code,) = read_cubin(compile_module(HEADER + source, architecture, "cubin")).values()
    return code


def launch_of(threads: int, shared_bytes: int = 0) -> Launch:
    return Launch(Kernel("planted.cu", "planted", "Arguments", threads), (1, 1, 1), (None,), shared_bytes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source,threads,words", [(STACK, 32, "a stack of"), (SPILL, 256, "of local memory")])
def test_stack_and_spills_are_reported(source: str, threads: int, words: str, architecture: str) -> None:
    measured = cost(compiled(source, architecture), launch_of(threads))
    budgets = Budgets({}, {"planted": {architecture: budget_of(measured)}})
    problems = check({"planted": {architecture: measured}}, budgets)
    assert any(words in problem and f"planted on {architecture}" in problem for problem in problems)


COST = Cost(
    kernel="k",
    architecture="sm_87",
    registers=64,
    spills=0,
    stack=0,
    shared=1024,
    ctas_per_sm=4,
    limit="registers",
    has_loop=True,
    instructions=300,
    hmma=64,
    ldsm=4,
    ldgsts=8,
    pipes={"issue": 300, "tensor": 512},
    stalls=700,
    read_bytes=2048,
    once_bytes=1024,
)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"registers": 65}, "65 registers a thread, 64 are allowed"),
        ({"ctas_per_sm": 3}, "3 blocks fit on an SM (limited by registers), 4 are required"),
        ({"ctas_per_sm": 0}, "not one block fits"),
        ({"hmma": 63}, "63 HMMA in the hot loop, 64 are expected"),
        ({"ldsm": 5}, "5 LDSM"),
        ({"ldgsts": 0}, "0 LDGSTS"),
        ({"instructions": 301}, "4.703 instructions per HMMA, 4.69 are allowed"),
        ({"spills": 2}, "2 loads and stores of local memory"),
        ({"stack": 16}, "a stack of 16 bytes"),
    ],
)
def test_each_excess_is_a_sentence(change: dict[str, int], words: str) -> None:
    budgets = Budgets({}, {"k": {"sm_87": budget_of(COST)}})
    assert check({"k": {"sm_87": COST}}, budgets) == []
    (problem, *_) = check({"k": {"sm_87": replace(COST, **change)}}, budgets)  # type: ignore[arg-type]
    assert problem.startswith("k on sm_87: ") and words in problem


def test_improvements_pass_and_unknown_kernels_do_not() -> None:
    budget = {"sm_87": budget_of(COST)}
    better = replace(COST, registers=40, ctas_per_sm=6, instructions=280)
    assert check({"k": {"sm_87": better}}, Budgets({}, {"k": budget})) == []
    assert "no budget" in check({"new": {"sm_87": COST}}, Budgets({}, {}))[0]
    assert "is no kernel of the product" in check({}, Budgets({}, {"gone": budget}))[0]


def test_bars() -> None:
    def missed(bar: Bar) -> list[str]:
        return check({"k": {"sm_87": COST}}, Budgets({"b": bar}, {"k": {"sm_87": budget_of(COST)}}))

    assert missed(Bar(("k*",), "sm_87", instructions_per_hmma=4.69)) == []
    assert "4.69 instructions per HMMA, more than 4.68" in missed(Bar(("k",), "sm_87", instructions_per_hmma=4.68))[0]
    # 1024 bytes at 204.8 GB/s, 16 SMs of 4 partitions at 1.3 GHz: 416 cycles; the tensor pipe has 512.
    assert missed(Bar(("k",), "sm_87", memory_bound_ratio=0.8125)) == []
    (problem,) = missed(Bar(("k",), "sm_87", memory_bound_ratio=0.82))
    assert "0.81 times" in problem and "(tensor)" in problem
    assert "no kernel of the product is called q*" in missed(Bar(("k", "q*"), "sm_87"))[0]


def test_update_writes_measured_values_only(tmp_path: Path) -> None:
    before = '# Words.\n[bars.b]\nkernels = ["k"]\narchitecture = "sm_87"\ninstructions_per_hmma = 1\n\n'
    path = tmp_path / "budgets.toml"
    path.write_text(render(f"{before}{MEASURED}\n[gone]\nsm_87 = {{}}\n", {"k": {"sm_87": COST}}))
    assert path.read_text().startswith(before + MEASURED)
    budgets = load_budgets(path)
    assert budgets.bars == {"b": Bar(("k",), "sm_87", instructions_per_hmma=1)}
    assert budgets.kernels == {"k": {"sm_87": Budget(64, 4, 64, 4, 8, instructions_per_hmma=4.69)}}
    with pytest.raises(EdgeError, match="lacks the line"):
        render(before, {})


# ---- occupancy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture,threads,registers,shared,blocks,limit",
    [
        ("sm_87", 128, 174, 0, 2, "registers"),  # 16384 / 5632 = 2 warps a partition, 8 / 4
        ("sm_87", 128, 130, 0, 3, "registers"),  # 16384 / 4352 = 3, 12 / 4
        ("sm_87", 128, 44, 0, 10, "registers"),  # 16384 / 1536 = 10, 40 / 4
        ("sm_87", 128, 32, 48 << 10, 3, "shared"),  # 164 / 49 KiB
        ("sm_86", 128, 32, 48 << 10, 2, "shared"),  # 100 / 49
        ("sm_86", 32, 16, 0, 16, "blocks"),
        ("sm_89", 32, 16, 0, 24, "blocks"),
        ("sm_120", 1024, 32, 0, 1, "warps"),
        ("sm_120", 128, 32, 99 << 10, 1, "shared"),
        ("sm_86", 1024, 128, 0, 0, "registers"),
    ],
)
def test_occupancy_by_hand(
    architecture: str, threads: int, registers: int, shared: int, blocks: int, limit: str
) -> None:
    found = occupancy(architecture, threads, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)


OCCUPANCY = """
#include <cuda_occupancy.h>
extern "C" int blocks(int major, int minor, int shared_per_sm, int threads, int registers, int shared) {
  cudaOccDeviceProp device;
  device.computeMajor = major, device.computeMinor = minor, device.warpSize = 32, device.numSms = 1;
  device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 1536;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = shared_per_sm;
  device.sharedMemPerBlockOptin = shared_per_sm - 1024, device.reservedSharedMemPerBlock = 1024;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF, kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = shared_per_sm - 1024, kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared)) return -1;
  return result.activeBlocksPerMultiprocessor;
}
"""


@pytest.fixture(scope="module")
def nvidia_blocks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """NVIDIA's own occupancy calculator, a header of the runtime's wheel."""
    source = tmp_path_factory.mktemp("occupancy") / "occupancy.cpp"
    source.write_text(OCCUPANCY)
    include = wheel_file("nvidia-cuda-runtime", "nvidia/cu13/include")
    library = source.with_suffix(".so")
    subprocess.run(["g++", "-shared", "-fPIC", f"-I{include}", source, "-o", library], check=True)
    return ctypes.CDLL(str(library)).blocks


@settings(max_examples=200)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    warps=st.integers(1, 32),
    registers=st.integers(16, 255),
    shared=st.integers(0, 99 << 10),
)
def test_occupancy_is_what_nvidia_computes(
    nvidia_blocks: Callable[..., int], architecture: str, warps: int, registers: int, shared: int
) -> None:
    number = int(architecture.removeprefix("sm_"))
    shared_per_sm = LIMITS[architecture].shared
    theirs = nvidia_blocks(number // 10, number % 10, shared_per_sm, warps * 32, registers, shared)
    assert occupancy(architecture, warps * 32, registers, shared).blocks == theirs


# ---- machine code ------------------------------------------------------------------------------------------

LOOPS = """
struct Arguments { const uint4* x; const uint32_t* s; float* y; int n, m; };
DEVICE void f(const Arguments& a) {
  float sum[4] = {};
#pragma unroll 1
  for (int i = 0; i < a.n; ++i) {
    sum[0] += ptx::exp2(sum[1]);
#pragma unroll 1
    for (int j = 0; j < a.m; ++j) {
      const uint4 w = ptx::load_once(a.x + (i * a.m + j) * 32 + threadIdx.x);
      const uint32_t s = a.s[j * 32 + threadIdx.x];
      const uint32_t r[4] = {w.x, w.y, w.z, w.w};
      ptx::mma<half>(sum, r, s, s, sum);
      ptx::mma<half>(sum, r, w.x, s, sum);
    }
  }
#pragma unroll 1
  for (int i = 0; i < a.m; ++i) sum[2] = sum[2] * sum[2] + a.y[i];
  a.y[threadIdx.x] = sum[0] + sum[1] + sum[2] + sum[3];
}
KERNEL(planted, 32, 1, Arguments, (f))
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_hot_loop_is_the_innermost_with_mma(architecture: str) -> None:
    code = compiled(LOOPS, architecture)
    assert len(code.loops) == 3
    assert [sum(loop.contains(other) for other in code.loops) for loop in code.loops].count(1) == 1
    measured = cost(code, launch_of(32))
    tensor = 2 * (8 if architecture == "sm_87" else 32)
    assert (measured.hmma, measured.once_bytes, measured.read_bytes) == (2, 512, 640)
    assert (measured.pipes["tensor"], measured.pipes["memory"], measured.pipes.get("special", 0)) == (tensor, 20, 0)
    assert 10 < measured.instructions < 40


def test_a_kernel_without_loops_counts_as_a_whole() -> None:
    source = "DEVICE void f(float* y) { y[threadIdx.x] = 1; }\nKERNEL(planted, 32, 1, float*, (f))\n"
    code = compiled(source, "sm_86")
    assert hot_loop(code) is None
    measured = cost(code, launch_of(32))
    assert not measured.has_loop and measured.instructions == sum(i.name != "NOP" for i in code.instructions)


@pytest.mark.parametrize(
    "opcode,architecture,pipe,cycles",
    [
        ("HMMA.16816.F32", "sm_87", "tensor", 8),
        ("HMMA.16816.F32.BF16", "sm_89", "tensor", 32),
        ("HMMA.1688.F32", "sm_86", "tensor", 16),
        ("HMMA.16816.F16", "sm_120", "tensor", 16),
        ("IMMA.16832.S8.S8", "sm_87", "tensor", 8),
        ("FFMA", "sm_87", "fma", 1),
        ("HFMA2", "sm_87", "fma", 1),
        ("HFMA2.BF16_V2", "sm_87", "fma", 2),
        ("HFMA2.BF16", "sm_89", "fma", 2),
        ("IMAD.WIDE", "sm_86", "fma", 2),
        ("IMAD", "sm_120", "fma", 1),
        ("LOP3.LUT", "sm_87", "alu", 2),
        ("PRMT", "sm_120", "alu", 1),
        ("F2FP.PACK_AB", "sm_87", "alu", 2),
        ("MUFU.EX2", "sm_87", "special", 8),
        ("I2F.S8", "sm_87", "special", 8),
        ("LDSM.16.M88.4", "sm_87", "memory", 16),
        ("LDS.128", "sm_87", "memory", 16),
        ("LDGSTS.E.BYPASS.128", "sm_87", "memory", 16),
        ("LDG.E.U8.CONSTANT", "sm_87", "memory", 4),
        ("STG.E.64", "sm_87", "memory", 8),
        ("SHFL.BFLY", "sm_87", "memory", 4),
        ("UIADD3", "sm_87", None, 0),
        ("BRA", "sm_87", None, 0),
    ],
)
def test_pipes(opcode: str, architecture: str, pipe: str | None, cycles: int) -> None:
    found = pipe_cycles([Instruction(0, "", opcode, "", 1)], architecture)
    assert found == ({"issue": 1} if pipe is None else {"issue": 1, pipe: cycles})


def test_dram_cycles() -> None:
    """2 KiB on Orin, 204.8 GB/s shared by 64 partitions at 1.3 GHz (spec: kernel_technology.md 6.4)."""
    assert BOARDS[0].dram_cycles(2048) == pytest.approx(832)
