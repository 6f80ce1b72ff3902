"""edge.TileLinear: packing, numpy meaning, ONNX function and every compiled kernel against products in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.tile_linear.meaning import tile_linear
from plugins.tile_linear.pack import pack_tiles, unpack_tiles
from tests.operators import HOW, KERNELS, one_node, session

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EPSILON = np.finfo(np.float32).eps


def sample(rows: int, n: int, k: int, dtype: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x [rows, k] and weights [n, k], of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)) * np.exp2(rng.integers(-9, 9, (rows, 1)))
    weights = rng.standard_normal((n, k)) * np.exp2(rng.integers(-5, 5, (n, 1)))
    return x.astype(np.float32), weights.astype(TYPES[dtype])


def run(how: str, x: np.ndarray, weights: np.ndarray, dtype: str) -> np.ndarray:
    inputs = (("x", "float32", 2), ("weights", dtype, 3))
    model = one_node("TileLinear", inputs, (("y", "float32"),), n=len(weights))
    tiles = pack_tiles(weights)
    if dtype != "bfloat16":
        return session(how, model).run(None, {"x": x, "weights": tiles})[0]
    return run_with_bfloat16(how, model, x, tiles)


def run_with_bfloat16(how: str, model: bytes, x: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """numpy has no such type: ONNX Runtime is told of it by number."""
    import onnxruntime as ort
    from onnx import TensorProto

    binding = session(how, model).io_binding()
    binding.bind_cpu_input("x", x)
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tiles.view(np.uint16), TensorProto.BFLOAT16)
    binding.bind_ortvalue_input("weights", value)
    binding.bind_output("y")
    binding.synchronize_inputs()
    session(how, model).run_with_iobinding(binding)
    return binding.get_outputs()[0].numpy()


def check(how: str, rows: int, n: int, k: int, dtype: str, seed: int = 0) -> None:
    x, weights = sample(rows, n, k, dtype, seed)
    wanted = tile_linear(x, pack_tiles(weights), n)
    bound = EPSILON * k * (np.abs(x).astype(np.float64) @ np.abs(weights.astype(np.float64)).T)
    worst = np.abs(run(how, x, weights, dtype) - wanted) - bound
    assert (worst <= 1e-30).all(), (how, float(worst.max()))


@given(n=st.integers(1, 70), k=st.integers(1, 40), dtype=st.sampled_from(sorted(TYPES)), seed=st.integers(0, 99))
def test_packing_loses_nothing(n: int, k: int, dtype: str, seed: int) -> None:
    _, weights = sample(1, n, k, dtype, seed)
    tiles = pack_tiles(weights)
    assert tiles.shape == (-(-n // 16), k, 16) and tiles.dtype == weights.dtype
    assert np.array_equal(unpack_tiles(tiles, n), weights)
    assert not unpack_tiles(tiles, 16 * len(tiles))[n:].any()
    np.testing.assert_allclose(
        tile_linear(np.eye(k, dtype=np.float32), tiles, n), weights.astype(np.float64).T, rtol=0, atol=0
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 5, 8, 9, 13, 16, 17, 24, 25, 64, 65, 130]),
    n=st.integers(1, 300),
    k=st.integers(1, 700),
    dtype=st.sampled_from(sorted(TYPES)),
    seed=st.integers(0, 999),
)
def test_it_agrees_with_float64(rows: int, n: int, k: int, dtype: str, seed: int) -> None:
    for how in HOW:
        check(how, rows, n, k, dtype, seed)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_a_real_size(how: str, dtype: str) -> None:
    check(how, 70, 2080, 1024, dtype)


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_a_row_does_not_depend_on_those_beside_it(how: str, dtype: str) -> None:
    """So a token is the same number by number, whether it is decoded alone, verified in a tree or batched."""
    x, weights = sample(130, 115, 600, dtype)
    together = run(how, x, weights, dtype)
    for first, count in ((0, 1), (1, 2), (3, 5), (8, 8), (16, 9), (60, 30), (100, 30)):
        alone = run(how, x[first : first + count], weights, dtype)
        assert np.array_equal(alone, together[first : first + count]), (first, count)


@pytest.mark.parametrize("how", KERNELS)
def test_what_is_no_number_stays_in_its_row_and_column(how: str) -> None:
    x, weights = sample(11, 40, 50, "float32")
    x[4, 7], weights[33, 9] = np.nan, np.inf
    x[:, 9] = np.abs(x[:, 9]) + 1
    y = run(how, x, weights, "float32")
    assert np.isnan(y[4]).all() and np.isinf(np.delete(y, 4, 0)[:, 33]).all()
    assert np.isfinite(np.delete(np.delete(y, 4, 0), 33, 1)).all()
