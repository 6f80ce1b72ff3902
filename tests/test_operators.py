"""Operators of domain `edge`: the numpy meaning, the ONNX function and every compiled kernel agree with float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from plugins.linear.meaning import ZEROS, argmax, linear, weights
from plugins.linear.pack import GROUPS, chunk_inputs, pack_codes, pack_scales
from plugins.rms_norm.meaning import add_rms_norm, rms_norm
from plugins.swiglu.meaning import swiglu
from tests.operators import HOW, KERNELS, Feeds, one_node, session


def row_model(op_type: str, feeds: Feeds, outputs: tuple[str, ...], **attributes: Any) -> bytes:
    """One of the operators whose inputs and outputs all have one float type."""
    inputs = tuple((name, array.dtype.name, array.ndim) for name, array in feeds.items())
    return one_node(op_type, inputs, tuple((name, inputs[0][1]) for name in outputs), **attributes)


@dataclass(frozen=True)
class RowOperator:
    """inputs(rng, rows, width) -> feeds; meaning and exact (float64) map the feeds to the list of outputs."""

    inputs: Callable[[np.random.Generator, int, int], Feeds]
    outputs: tuple[str, ...]
    attributes: dict[str, float]
    meaning: Callable[[Feeds], list[np.ndarray]]
    exact: Callable[[Feeds], list[np.ndarray]]


def _spread(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Rows whose magnitudes differ by orders."""
    return rng.standard_normal((rows, width)) * 10 ** rng.uniform(-2, 2, (rows, 1))


def _norm64(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


def _add_norm64(f: Feeds) -> list[np.ndarray]:
    total = f["hidden"] + 0.2857738 * f["branch"]
    return [total, _norm64(total, f["weight"])]


def _swiglu64(f: Feeds) -> list[np.ndarray]:
    gate, up = np.split(f["gate_up"], 2, axis=-1)
    return [gate / (1 + np.exp(-gate)) * up]


ROW_OPERATORS = {
    "RMSNorm": RowOperator(
        lambda rng, rows, width: {"x": _spread(rng, rows, width), "weight": 1 + 0.1 * rng.standard_normal(width)},
        ("y",),
        {"epsilon": 1e-5},
        lambda f: [rms_norm(f["x"], f["weight"], 1e-5)],
        lambda f: [_norm64(f["x"], f["weight"])],
    ),
    "AddRMSNorm": RowOperator(
        lambda rng, rows, width: {
            "hidden": _spread(rng, rows, width),
            "branch": _spread(rng, rows, width),
            "weight": 1 + 0.1 * rng.standard_normal(width),
        },
        ("total", "y"),
        {"scale": 0.2857738, "epsilon": 1e-5},
        lambda f: list(add_rms_norm(f["hidden"], f["branch"], f["weight"], 0.2857738, 1e-5)),
        _add_norm64,
    ),
    "SwiGLU": RowOperator(
        lambda rng, rows, width: {"gate_up": _spread(rng, rows, 2 * width) / 10},
        ("y",),
        {},
        lambda f: [swiglu(f["gate_up"])],
        _swiglu64,
    ),
}


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 150), seed=st.integers(0, 999))
@pytest.mark.parametrize("op_type", ROW_OPERATORS)
def test_row_operators_agree_with_float64(op_type: str, rows: int, width: int, seed: int) -> None:
    op = ROW_OPERATORS[op_type]
    feeds = {k: v.astype(np.float32) for k, v in op.inputs(np.random.default_rng(seed), rows, width).items()}
    exact = op.exact({k: v.astype(np.float64) for k, v in feeds.items()})
    model = row_model(op_type, feeds, op.outputs, **op.attributes)
    results = {how: session(how, model).run(None, feeds) for how in HOW}
    for how, outputs in (results | {"meaning": op.meaning(feeds)}).items():
        for got, want in zip(outputs, exact, strict=True):
            # ONNX Runtime's Sigmoid stops at -18: what silu should still lose below that, the function keeps.
            np.testing.assert_allclose(got, want, rtol=3e-6, atol=2e-4 if how == "function" else 1e-5, err_msg=how)


@pytest.mark.parametrize("op_type", ROW_OPERATORS)
def test_row_operators_in_float16(op_type: str) -> None:
    op = ROW_OPERATORS[op_type]
    feeds = {k: v.astype(np.float16) for k, v in op.inputs(np.random.default_rng(1), 7, 48).items()}
    exact = op.exact({k: v.astype(np.float64) for k, v in feeds.items()})
    function = session("function", row_model(op_type, feeds, op.outputs, **op.attributes)).run(None, feeds)
    for how, outputs in {"function": function, "meaning": op.meaning(feeds)}.items():
        for got, want in zip(outputs, exact, strict=True):
            assert got.dtype == np.float16
            np.testing.assert_allclose(got, want, rtol=3e-3, atol=1e-3, err_msg=how)


@pytest.mark.parametrize("op_type", ROW_OPERATORS)
def test_row_operators_in_the_onnx_reference_evaluator(op_type: str) -> None:
    op = ROW_OPERATORS[op_type]
    feeds = {k: v.astype(np.float32) for k, v in op.inputs(np.random.default_rng(2), 3, 20).items()}
    evaluator = ReferenceEvaluator(onnx.load_from_string(row_model(op_type, feeds, op.outputs, **op.attributes)))
    for got, want in zip(evaluator.run(None, feeds), op.meaning(feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", KERNELS)
def test_swiglu_kernel_holds_its_accuracy_over_the_whole_range(how: str) -> None:
    gate = np.linspace(-150, 150, 30001, dtype=np.float32)
    feeds = {"gate_up": np.concatenate([gate, np.ones_like(gate)])[None]}
    (got,) = session(how, row_model("SwiGLU", feeds, ("y",))).run(None, feeds)
    wide = gate.astype(np.float64)
    np.testing.assert_allclose(got[0], wide / (1 + np.exp(-wide)), rtol=1e-6, atol=1e-35)


# Packed weights


def packed_model(op_type: str, feeds: Feeds, element: int, outputs: tuple[tuple[str, str], ...], **sizes: int) -> bytes:
    """PackedLinear or PackedHead on x cast from float32 to `element`; what it gives in that type is cast back."""
    inputs = tuple((name, array.dtype.name, array.ndim) for name, array in feeds.items())
    model = onnx.load_from_string(one_node(op_type, inputs, outputs, **sizes))
    (node,) = model.graph.node
    node.input[0] = "x_typed"
    before = [helper.make_node("Cast", ["x"], ["x_typed"], to=element)]
    after = []
    if op_type == "PackedLinear":
        node.output[0] = "y_typed"
        after = [helper.make_node("Cast", ["y_typed"], ["y"], to=TensorProto.FLOAT)]
    nodes = [*before, node, *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def packed_feeds(rng: np.random.Generator, n: int, k: int, bits: int, group: int) -> tuple[Feeds, np.ndarray]:
    """Packed random codes and scales, and the matrix [n, k] float64 that they stand for; no x yet."""
    codes = rng.integers(0, 3 if bits == 2 else 1 << bits, (n, k)).astype(np.uint8)
    shape, dtype = ((n, k // group), np.float16) if group else ((n,), np.float32)
    scales = rng.standard_normal(shape).astype(dtype)
    packed = {"weights": pack_codes(codes, bits), "scales": pack_scales(scales, k, bits)}
    return packed, weights(codes, scales, bits)


@settings(max_examples=6, deadline=None)
@given(n=st.integers(1, 40), chunks=st.integers(1, 3), seed=st.integers(0, 999))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", ZEROS)
def test_packed_weights_unpack_to_the_values_they_stand_for(
    bits: int, group: int, n: int, chunks: int, seed: int
) -> None:
    k = chunks * chunk_inputs(bits, group)
    packed, dense = packed_feeds(np.random.default_rng(seed), n, k, bits, group)
    assert n < 9 or (packed["weights"] < 0).any()  # the top bit is one of rows 8 to 15
    feeds = {"x": np.eye(k, dtype=np.float32), **packed}
    outputs = (("y", "float32"),)
    model = packed_model("PackedLinear", feeds, TensorProto.FLOAT, outputs, bits=bits, group=group, n=n, k=k)
    (got,) = session("function", model).run(None, feeds)
    np.testing.assert_array_equal(got.T, dense.astype(np.float32))


ELEMENTS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@pytest.mark.parametrize("element", ELEMENTS)
def test_packed_linear_rounds_once(element: str) -> None:
    """Whole numbers of x, whose sums float32 holds: what is left is the output's own rounding."""
    rng, n, k, dtype = np.random.default_rng(5), 37, 256, np.dtype(ELEMENTS[element])
    codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
    scales = 2.0 ** rng.integers(-3, 3, (n, k // 64))
    x = rng.integers(-8, 9, (5, k)).astype(np.float32)
    feeds = {"x": x, "weights": pack_codes(codes, 4), "scales": pack_scales(scales, k, 4)}
    typed = helper.np_dtype_to_tensor_dtype(dtype)
    model = packed_model("PackedLinear", feeds, typed, (("y", "float32"),), bits=4, group=64, n=n, k=k)
    want = linear(x, codes, scales, 4).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(session("function", model).run(None, feeds)[0], want)
    # The evaluator divides negative whole numbers downwards, ONNX Runtime towards zero: none must have a rest.
    np.testing.assert_array_equal(ReferenceEvaluator(onnx.load_from_string(model)).run(None, feeds)[0], want)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 64), (4, 128)])
def test_packed_head_keeps_float32_and_finds_the_first_of_the_largest(element: str, bits: int, group: int) -> None:
    rng, n, k = np.random.default_rng(bits), 330, 256
    codes = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    codes[200:] = codes[70:200]  # every largest logit of these rows comes twice
    scales = np.full((n, k // group) if group else n, 2.0**-6, np.float32)
    x = rng.integers(-8, 9, (9, k)).astype(np.float32)
    feeds = {"x": x, "weights": pack_codes(codes, bits), "scales": pack_scales(scales, k, bits)}
    if group == 0:
        feeds["scales"][5] = np.inf  # times a weight or an x of 0: NaN, which is never the largest
        x[3, :] = 0
    typed = helper.np_dtype_to_tensor_dtype(np.dtype(ELEMENTS[element]))
    outputs = (("logits", "float32"), ("token", "int32"))
    model = packed_model("PackedHead", feeds, typed, outputs, bits=bits, group=group, n=n, k=k)
    logits, token = session("function", model).run(None, feeds)
    assert (logits.dtype, token.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(token, argmax(logits))
    finite = np.delete(np.arange(n), 5) if group == 0 else np.arange(n)
    np.testing.assert_array_equal(logits[:, finite], linear(x, codes, scales, bits)[:, finite])
    assert np.isnan(logits[3, 5]) == (group == 0)
