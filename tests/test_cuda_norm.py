"""CUDA kernels of the norms, SwiGLU, the embedding and the rotation table, by every route, against their meanings.

Where a float32 intermediate may differ in its last bits (the order of a sum, exp2 against exp), outputs are held
between the meanings of an intermediate a little smaller and a little larger: the meaning's roundings are monotone, so
nothing else is allowed. Everything else is compared bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge.errors import EdgeError
from plugins.embedding.launch import scaled_rows as launch_rows
from plugins.embedding.meaning import scaled_rows
from plugins.rms_norm.launch import add_rms_norm as launch_add_norm
from plugins.rms_norm.launch import rms_norm as launch_norm
from plugins.rms_norm.meaning import add_rms_norm, rms_norm
from plugins.rope.launch import rope_table as launch_rope
from plugins.rope.meaning import rope_table, rope_tables
from plugins.swiglu.launch import swiglu as launch_swiglu
from plugins.swiglu.meaning import swiglu
from plugins.vectors import ELEMENTS
from tests.cuda_cases import Case, run_cases
from tests.cuda_routes import ROUTES, SEEDS, run_route
from tests.test_rope import FACTORS_128K, config_128k, run_tables

EPSILON, SCALE = 1e-5, 0.2857738
# One vector of 16 bytes, less than a warp of them, a ragged warp, whole blocks, and several vectors a thread.
NORM_SHAPES = ((3, 8), (130, 64), (3, 1000), (3, 1024), (2, 4096), (1, 16384))
COUNTING = ("race", "ptx")  # routes that count bytes


def spread(rng: np.random.Generator, rows: int, width: int, dtype: np.dtype) -> np.ndarray:
    """Rows whose magnitudes differ by orders."""
    return (rng.standard_normal((rows, width)) * 10 ** rng.uniform(-2, 2, (rows, 1))).astype(dtype)


def same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    return got.dtype == want.dtype and got.tobytes() == want.tobytes()


def norm_between(x: np.ndarray, weight: np.ndarray, got: np.ndarray) -> bool:
    """Whether `got` is rms_norm(x, weight) for a root within 1e-6 of the exact one."""
    wide = x.astype(np.float64)
    exact = 1 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
    ends = [
        (x.astype(np.float32) * (exact * factor).astype(np.float32)).astype(x.dtype) * weight
        for factor in (1 - 1e-6, 1 + 1e-6)
    ]
    return bool(((np.minimum(*ends) <= got) & (got <= np.maximum(*ends))).all())


def mostly_equal(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.count_nonzero(got != want) <= 0.01 * got.size + 1)


def norm_cases(element: str) -> list[Case]:
    dtype, cases = ELEMENTS[element], []
    for rows, hidden in NORM_SHAPES:
        rng = np.random.default_rng(hidden)
        x, branch = spread(rng, rows, hidden, dtype), spread(rng, rows, hidden, dtype)
        weight = (1 + 0.1 * rng.standard_normal(hidden)).astype(dtype)
        y = {"y": ((rows, hidden), dtype)}
        cases += [
            Case(f"norm {hidden}", launch_norm(rows, hidden, element, EPSILON), {"x": x, "weight": weight}, y),
            Case(
                f"add {hidden}",
                launch_add_norm(rows, hidden, element, SCALE, EPSILON),
                {"hidden": x, "branch": branch, "weight": weight},
                y | {"total": ((rows, hidden), dtype)},
            ),
        ]
    return cases


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ROUTES)
def test_norms(route: str, element: str) -> None:
    cases = norm_cases(element)
    for seed in SEEDS[route]:
        for case, result in zip(cases, run_cases(route, cases, seed), strict=True):
            inputs, y = case.inputs, result.outputs["y"]
            x, meant = inputs.get("x"), None
            if x is None:
                x, meant = add_rms_norm(inputs["hidden"], inputs["branch"], inputs["weight"], SCALE, EPSILON)
                assert same_bits(result.outputs["total"], x), case.name
            else:
                meant = rms_norm(x, inputs["weight"], EPSILON)
            assert norm_between(x, inputs["weight"], y), case.name
            assert mostly_equal(y, meant), case.name
            if route in COUNTING:  # every activation is read once
                assert result.read == dict.fromkeys(inputs, x.nbytes), case.name
                assert result.written == dict.fromkeys(result.outputs, x.nbytes), case.name


def test_total_may_be_the_residual_stream_itself() -> None:
    rng = np.random.default_rng(5)
    x, branch = (spread(rng, 2, 1024, ELEMENTS["bf16"]) for _ in range(2))
    weight = np.ones(1024, ELEMENTS["bf16"])
    launch = launch_add_norm(2, 1024, "bf16", SCALE, EPSILON)
    arguments = tuple("y" if a == "y" else "total" if a == "hidden" else a for a in launch.arguments)
    buffers = {"total": x.copy(), "branch": branch, "weight": weight, "y": np.zeros_like(x)}
    run_route("race", [replace(launch, arguments=arguments)], buffers)
    assert same_bits(buffers["total"], add_rms_norm(x, branch, weight, SCALE, EPSILON)[0])


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ROUTES)
def test_swiglu(route: str, element: str) -> None:
    dtype, cases = ELEMENTS[element], []
    for rows, width in ((1, 8), (3, 1000), (130, 64), (2, 4096)):
        gate_up = spread(np.random.default_rng(width), rows, 2 * width, dtype)
        gate_up[0, :width] = np.linspace(-120, 120, width)
        cases.append(
            Case(f"{width}", launch_swiglu(rows, width, element), {"gate_up": gate_up}, {"y": ((rows, width), dtype)})
        )
    for seed in SEEDS[route]:
        for case, result in zip(cases, run_cases(route, cases, seed), strict=True):
            gate_up, y = case.inputs["gate_up"], result.outputs["y"]
            gate, up = np.split(gate_up, 2, axis=-1)
            wide = gate.astype(np.float32)
            with np.errstate(over="ignore"):
                silu = wide / (1 + np.exp(-wide))
            ends = [(silu * np.float32(factor)).astype(dtype) * up for factor in (1 - 1e-5, 1 + 1e-5)]
            assert ((np.minimum(*ends) <= y) & (y <= np.maximum(*ends))).all(), case.name
            assert mostly_equal(y, swiglu(gate_up)), case.name
            if route in COUNTING:
                assert (result.read["gate_up"], result.written["y"]) == (gate_up.nbytes, y.nbytes)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ROUTES)
def test_scaled_rows(route: str, element: str) -> None:
    dtype, cases = ELEMENTS[element], []
    rng = np.random.default_rng(3)
    for width, scale in ((8, 12.0), (1000, 1.0), (2048, 12.3)):
        table = spread(rng, 50, width, dtype)
        index = np.array([49, 0, -1, 7, 7, 50, 2**31 - 1, 3], np.int32)
        launch = launch_rows(len(index), width, element, scale, 50)
        inputs = {"table": table, "index": index}
        cases.append(Case(f"{width}", launch, inputs, {"y": ((len(index), width), dtype)}))
    launch = launch_rows(50, 2048, element, 1 / 16, 50, indexed=False)
    cases.append(Case("in order", launch, {"table": table}, {"y": (table.shape, dtype)}))
    scales = (12.0, 1.0, 12.3, 1 / 16)
    for case, scale, result in zip(cases, scales, run_cases(route, cases, SEEDS[route][-1]), strict=True):
        want = scaled_rows(case.inputs["table"], case.inputs.get("index"), scale)
        got = result.outputs["y"]
        assert np.array_equal(np.isnan(got), np.isnan(want)), case.name
        assert same_bits(got[~np.isnan(got)], want[~np.isnan(want)]), case.name


def test_an_embedding_is_scaled_and_ids_outside_show() -> None:
    table = np.array([[1, 2], [3, 4]], np.float16)
    got = scaled_rows(table, np.array([1, 2, -1, 0], np.int32), 12)
    np.testing.assert_array_equal(got, [[36, 48], [np.nan] * 2, [np.nan] * 2, [12, 24]])


def rope_case(positions: np.ndarray, lengths: list[int] | None, half: int, factor: float = 1.0) -> Case:
    """`lengths`: the switch lengths of sequences of 1, 2, 3, ... tokens and the rest."""
    short = FACTORS_128K[:half]
    tables = rope_tables(10000.0, short, [2 * f for f in short])
    inputs = {"positions": positions, "inverse_short": tables.inverse_short, "frequency": tables.frequency}
    if lengths is not None:
        starts = [min(b * (b + 1) // 2, len(positions)) for b in range(len(lengths))] + [len(positions)]
        inputs["query_start"] = np.array(starts, np.int32)
        inputs["switch_length"] = np.array(lengths, np.int32)
        inputs["inverse_long"] = tables.inverse_long
    launch = launch_rope(len(positions), half, len(lengths or [1]), 32768 if lengths else None, factor)
    shape = ((len(positions), half), np.dtype(np.float32))
    return Case(f"{half} {lengths}", launch, inputs, {"cos": shape, "sin": shape})


def check_rope(case: Case, outputs: dict[str, np.ndarray]) -> None:
    x, half = case.inputs, len(case.inputs["frequency"])
    short = FACTORS_128K[:half]
    tables, factor = rope_tables(10000.0, short, [2 * f for f in short]), float(case.launch.arguments[-1])
    starts = x.get("query_start", np.array([0, len(x["positions"])]))
    want = rope_table(x["positions"], starts, x.get("switch_length"), tables, 32768, factor)
    for name, table in zip(("cos", "sin"), want, strict=True):
        assert np.abs(outputs[name] - table).max() <= 2e-7 * factor, (case.name, name)


@pytest.mark.parametrize("route", ROUTES)
def test_rope_table(route: str) -> None:
    rng = np.random.default_rng(1)
    far = np.concatenate([[0, 1, 2, 262143], rng.integers(0, 262144, 200)]).astype(np.int32)
    cases = [
        rope_case(far, None, 64),
        rope_case(far[3:12], [32768, 32769, 5, 200000], 32, 1.25),
        rope_case(far[3:4], [40000], 3),
    ]
    for seed in SEEDS[route]:
        for case, result in zip(cases, run_cases(route, cases, seed), strict=True):
            check_rope(case, result.outputs)


@pytest.mark.long
def test_rope_table_at_every_position() -> None:
    case = rope_case(np.arange(262144, dtype=np.int32), None, 64)
    (result,) = run_cases("fast", [case])
    check_rope(case, result.outputs)


def test_rope_meaning_is_the_graphs() -> None:
    positions = np.array([0, 1, 999, 32767, 32768, 131071], np.int32)
    tables = rope_tables(10000.0, FACTORS_128K, FACTORS_128K)
    got = rope_table(positions, np.array([0, 6]), None, tables, 32768, 1.0)
    for mine, graphs in zip(got, run_tables(config_128k(), positions=positions), strict=True):
        np.testing.assert_allclose(mine, graphs, rtol=0, atol=3e-7)


@pytest.mark.parametrize("hidden", [0, 12, 16392])
def test_shapes_that_no_kernel_has_are_refused(hidden: int) -> None:
    with pytest.raises(EdgeError, match=f"hidden size {hidden}"):
        launch_norm(1, hidden, "half", 1e-5)
