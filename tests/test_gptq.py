"""GPTQ's arithmetic against its definition, and its words as files have them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engine.quantizer import gptq, run, write
from edge.errors import EdgeError
from tests.quantizer_samples import activations, fitted


def definition(weight: np.ndarray, scales: np.ndarray, hessian: np.ndarray, damping: float) -> np.ndarray:
    """Codes by the definition: an explicit inverse, from which one input after another is eliminated; float64.

    The inputs come in the order of their size in the Hessian.
    """
    inputs = weight.shape[1]
    steps = np.repeat(scales.astype(np.float64), inputs // scales.shape[1], axis=1)
    inverse = np.linalg.inv(hessian + damping * np.mean(np.diag(hessian)) * np.eye(inputs))
    left, codes = weight.astype(np.float64), np.zeros(weight.shape, np.uint8)
    for k in sorted(range(inputs), key=lambda k: -hessian[k, k]):
        codes[:, k] = np.clip(np.rint(left[:, k] / steps[:, k]) + 8, 0, 15)
        error = left[:, k] - (codes[:, k] - 8.0) * steps[:, k]
        left -= np.outer(error, inverse[k] / inverse[k, k])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[k] = inverse[:, k] = 0
    return codes


@pytest.mark.parametrize(("inputs", "group"), [(32, 32), (64, 32), (320, 64), (384, 128)])
def test_gptq_is_its_definition(inputs: int, group: int) -> None:
    """Also over several blocks of inputs, and one that is not whole."""
    rng = np.random.default_rng(inputs)
    weight = rng.standard_normal((48, inputs), dtype=np.float32)
    x = activations(rng, 3 * inputs, inputs)
    hessian = run.mean_outer_product([x[:50], x[50:]])
    np.testing.assert_allclose(hessian, 2 / len(x) * x.astype(np.float64).T @ x, rtol=1e-4, atol=1e-5)
    scales = gptq.group_scales("w", weight, group)
    codes = fitted(weight, scales, hessian).codes
    wrong = codes != definition(weight, scales, hessian, 0.01)
    # A near tie that float32 decides the other way changes the rest of its row; whole rows must agree elsewhere.
    assert wrong.any(axis=1).mean() < 0.2
    nearest = gptq.round_to_nearest(weight, scales).codes
    assert (codes != nearest).mean() > 0.1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([32, 96, 160]), st.sampled_from([1e-3, 0.01, 0.1]))
def test_the_factor_is_the_inverse_and_the_hessian_stays(seed: int, inputs: int, damping: float) -> None:
    hessian = run.mean_outer_product([activations(np.random.default_rng(seed), inputs // 2, inputs)])
    before = hessian.copy()
    order = np.random.default_rng(seed).permutation(inputs)
    factor = gptq.inverse_factor("w", hessian, order, damping).astype(np.float64)
    assert np.array_equal(hessian, before)
    assert np.array_equal(factor, np.triu(factor))
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(inputs)
    np.testing.assert_allclose(factor.T @ factor @ damped[order][:, order], np.eye(inputs), atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_gptq_changes_outputs_less_than_rounding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, x = rng.standard_normal((64, 128), dtype=np.float32), activations(rng, 512, 128)
    hessian = run.mean_outer_product([x])
    scales = gptq.group_scales("w", weight, 32)
    nearest = gptq.round_to_nearest(weight, scales).dequantize()
    values = fitted(weight, scales, hessian).dequantize()
    errors = [gptq.output_error(weight, other, hessian) for other in (values, nearest)]
    for error, other in zip(errors, (values, nearest), strict=True):
        direct = np.linalg.norm(x @ (weight - other).T) / np.linalg.norm(x @ weight.T)
        assert error == pytest.approx(direct, rel=1e-3)
    assert errors[0] < errors[1]
    assert gptq.weight_error(weight, values) >= gptq.weight_error(weight, nearest)


@pytest.mark.parametrize("hessian", [np.eye(64), 7 * np.eye(64), np.zeros((64, 64))])
def test_inputs_that_know_nothing_of_each_other_are_rounded(hessian: np.ndarray) -> None:
    weight = np.random.default_rng(0).standard_normal((40, 64), dtype=np.float32)
    scales = gptq.group_scales("w", weight, 32)
    codes = fitted(weight, scales, hessian).codes
    assert np.array_equal(codes, gptq.round_to_nearest(weight, scales).codes)


def test_a_hessian_that_is_none_is_refused() -> None:
    with pytest.raises(EdgeError, match=r"layer 3, down: .* --damping of 0\.01; raise it"):
        gptq.inverse_factor("layer 3, down", -np.eye(4), np.arange(4), 0.01)


def test_scales_are_positive_float16() -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[1, :32] = 1e-9
    scales = gptq.group_scales("w", weight, 32)
    assert scales.dtype == np.float16
    assert (scales > 0).all()
    with pytest.raises(EdgeError, match="tensor w needs an int4 step of 1"):
        gptq.group_scales("w", weight + 1e6, 32)


def test_the_packed_words_are_gptqs() -> None:
    """Word by word as spec: quantization_and_speculation.md 3.1 has them."""
    rng = np.random.default_rng(0)
    matrix = gptq.Int4Matrix(
        rng.integers(0, 16, (16, 64), dtype=np.uint8), rng.uniform(0.1, 1, (16, 2)).astype(np.float16)
    )
    packed = write.pack_gptq(matrix)
    for n in range(16):
        for word in range(8):
            codes = [int(code) for code in matrix.codes[n, 8 * word : 8 * word + 8]]
            expected = sum(code << (4 * i) for i, code in enumerate(codes))
            assert int(packed["qweight"].view(np.uint32)[word, n]) == expected
    assert packed["qzeros"].tolist() == [[0x77777777, 0x77777777]] * 2
    assert np.array_equal(packed["scales"], matrix.scales.T)
    assert packed["g_idx"].tolist() == [0] * 32 + [1] * 32
    assert {name: array.dtype for name, array in packed.items()} == {
        "qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32
    }  # fmt: skip
    back = write.unpack_gptq(packed["qweight"], packed["scales"])
    assert np.array_equal(back.codes, matrix.codes)
    assert np.array_equal(back.scales, matrix.scales)
