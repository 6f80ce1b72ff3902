"""Errors in the kernels' own assembly, which only the compiled PTX has, must be noticed by the kernels' own tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from plugins.linear.launch import LinearShape, gemm, gemv
from plugins.simt import interpreter
from plugins.simt.interpreter import PtxFault
from tests import cuda_cases, test_cuda_attention, test_cuda_infllmv2
from tests.asm_mutations import mutate
from tests.test_cuda_linear import check_exact, exact_case


def check_attention() -> None:
    problem = test_cuda_attention.make_problem(1, [(90, 3)], heads=16, kv_heads=1, head_dim=64)
    test_cuda_attention.run_problems("ptx", 0, [(problem, 0)])


def check_gemv() -> None:
    shape = LinearShape(3, 48, 256, 4, 128, "half")
    check_exact("ptx", 0, [exact_case(gemv(shape, 1), shape, 0)])


def check_gemm() -> None:
    shape = LinearShape(20, 48, 512, 4, 128, "half")  # a block has 32 tokens: the last ones do not exist
    check_exact("ptx", 0, [exact_case(gemm(shape, 32), shape, 0)])


def check_scores() -> None:
    test_cuda_infllmv2.test_golden_rows("ptx")


MUTANTS: list[tuple[Callable[[], None], str]] = [
    (check_attention, "mma a1 and a2 swapped"),
    (check_gemv, "mma a1 and a2 swapped"),
    (check_gemv, "lop3 operands swapped"),
    (check_gemm, "mma a1 and a2 swapped"),
    (check_gemm, "lop3 operands swapped"),
    (check_gemm, "wait_group off by one"),
    (check_gemm, "cp.async size ignored"),
    (check_scores, "mma a1 and a2 swapped"),
]


@pytest.mark.parametrize(("check", "mutation"), MUTANTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_errors_in_the_assembly_show(check: Callable[[], None], mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutated = []

    def change(ptx: str) -> str:
        try:
            ptx = mutate(ptx, mutation)
        except ValueError:
            return ptx  # not in this kernel of the check
        mutated.append(mutation)
        return ptx

    def run(route: str, launches: list, buffers: dict[str, np.ndarray], seed: int = 0) -> object:
        return interpreter.run(launches, buffers, transform=change)

    for module in (cuda_cases, test_cuda_attention, test_cuda_infllmv2):
        monkeypatch.setattr(module, "run_route", run)
    with pytest.raises((AssertionError, PtxFault)):
        check()
    assert mutated


@pytest.mark.parametrize("check", dict.fromkeys(check for check, _ in MUTANTS), ids=lambda check: check.__name__)
def test_without_them_the_same_checks_pass(check: Callable[[], None]) -> None:
    check()
