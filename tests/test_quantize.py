"""Quantised weights: error bounds, values that come back exactly, byte layouts, and the operators that use them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gguf
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

import plugins
from build_engine import lowering, weight_rows
from build_engine.checkpoint import Checkpoint, LazyTensor
from build_engine.formats import WeightFormat, make_target
from build_engine.quantize import GROUP_SIZES, QuantizedRows, pack_nibbles, quantize_affine, quantize_symmetric
from build_engine.weights_file import WeightsFile
from edge.errors import EdgeError
from plugins.ort.library import register
from tests.synthetic import tiny_config

FLOATS = st.one_of(
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, 1e-45, -3e-44, 1.2e-38, 65504.0, -1e30, 1e30]),
)
WEIGHTS = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.sampled_from([1, 31, 32, 64, 100])), elements=FLOATS)
SCHEMES = ("symmetric", "affine", "int8 head")


def quantize(scheme: str, weight: np.ndarray, group: int) -> QuantizedRows:
    if scheme == "affine":
        return quantize_affine(weight, group)
    return quantize_symmetric(weight, group, bits=8 if scheme == "int8 head" else 4)


@settings(max_examples=80, deadline=None)
@given(weight=WEIGHTS, group=st.sampled_from(GROUP_SIZES), scheme=st.sampled_from(SCHEMES))
def test_no_value_moves_by_more_than_half_a_step(weight: np.ndarray, group: int, scheme: str) -> None:
    q = quantize(scheme, weight, group)
    rows, groups = len(weight), -(-weight.shape[1] // group)
    assert q.codes.shape == (rows, groups, group)
    assert q.codes.dtype == np.uint8
    assert q.codes.max() <= (255 if scheme == "int8 head" else 15)
    assert q.scales.shape == q.minima.shape == (rows, groups)
    assert q.scales.dtype == q.minima.dtype == np.float32
    assert (q.scales > 0).all()
    padded = np.pad(weight, ((0, 0), (0, groups * group - weight.shape[1]))).reshape(rows, groups, group)
    error = np.abs(q.dequantize().reshape(padded.shape).astype(np.float64) - padded)
    largest = np.abs(padded).max(axis=-1, keepdims=True)
    # Beside half a step: the rounding of float32 itself, and of a scale below its smallest normal number.
    assert (error <= 0.5001 * q.scales[..., None] + 1e-6 * largest + 2e-44).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), columns=st.sampled_from([32, 128, 576]), exponent=st.integers(-6, 3))
@pytest.mark.parametrize(("name", "scheme"), [("Q4_1", "affine"), ("Q8_0", "int8 head")])
def test_ggml_values_come_back_exactly(name: str, scheme: str, seed: int, columns: int, exponent: int) -> None:
    kind = gguf.GGMLQuantizationType[name]
    random = np.random.default_rng(seed).standard_normal((4, columns)).astype(np.float32) * np.float32(2.0**exponent)
    stored = gguf.quants.quantize(random, kind)
    values = gguf.quants.dequantize(stored, kind)
    q = quantize(scheme, values, 32)
    np.testing.assert_allclose(q.dequantize(), values, rtol=0, atol=3e-7 * np.abs(values).max())
    blocks = stored.reshape(4, columns // 32, -1)
    if name == "Q8_0":  # float16 scale, 32 signed codes
        assert np.array_equal(q.codes.astype(int) - 128, blocks[..., 2:].view(np.int8))
    else:  # float16 scale and minimum, then codes 0..15 in the low nibbles and 16..31 in the high ones
        codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
        assert np.array_equal(q.codes, codes)


def test_nibbles_are_packed_as_onnx_packs_them() -> None:
    codes = np.arange(32, dtype=np.uint8).reshape(2, 16) % 16
    packed = pack_nibbles(codes)
    assert packed[0, :3].tolist() == [0x10, 0x32, 0x54]
    tensor = TensorProto(data_type=TensorProto.UINT4, dims=codes.shape, raw_data=packed.tobytes())
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.uint8), codes)


# ---- the lowered operators


def lower_linear(folder: Path, weights: list[np.ndarray], weight_format: WeightFormat, role: str) -> onnx.ModelProto:
    """`edge.Linear` over stacked weights [N_i, K], lowered for ONNX Runtime; its data lie in `folder`."""
    tensors = {
        f"w{i}": LazyTensor(f"w{i}", w.shape, w.dtype, "F32", lambda rows, w=w: w[rows]) for i, w in enumerate(weights)
    }
    checkpoint = Checkpoint(folder, "safetensors", tiny_config(), tensors, None, {})
    node = helper.make_node("Linear", ["x"], ["y"], "linear", domain="edge", weights=list(tensors), role=role)
    shapes = [("x", weights[0].shape[1]), ("y", sum(len(w) for w in weights))]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", width]) for name, width in shapes)
    graph = helper.make_graph([node], "linear", [x], [y])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edge", 1)]
    model = helper.make_model(graph, functions=plugins.functions(), opset_imports=opsets, ir_version=10)
    with WeightsFile(folder / "weights") as file:
        return lowering.lower(model, checkpoint, make_target("onnxruntime", weight_format), weight_format, file)


def run(folder: Path, model: onnx.ModelProto, x: np.ndarray, kernels: bool) -> np.ndarray:
    """The kernels round activations to int8; the function keeps float32."""
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    options = ort.SessionOptions()
    if kernels:
        register(options)
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def stored_values(q: QuantizedRows, scheme: str) -> np.ndarray:
    """What the bundle holds: an asymmetric group's offset, minimum + 8 scale, is kept in float16."""
    if scheme == "affine":
        offsets = (q.minima + 8 * q.scales).astype(np.float16).astype(np.float32)
        q = QuantizedRows(q.codes, q.scales, offsets - 8 * q.scales)
    return q.dequantize()


FORMATS = {
    "symmetric": ({"symmetric": True}, "body"),
    "affine": ({"symmetric": False}, "body"),
    "int8 head": ({"head": "int8"}, "head"),
}


@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 9999), group=st.sampled_from(GROUP_SIZES), scheme=st.sampled_from(SCHEMES))
def test_lowered_matmul_equals_the_dequantised_one(data: st.DataObject, seed: int, group: int, scheme: str) -> None:
    rng = np.random.default_rng(seed)
    # Symmetric groups may end in padding, asymmetric ones may not (see below).
    width = group * data.draw(st.integers(1, 5)) if scheme == "affine" else data.draw(st.integers(1, 400))
    rows = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    weights = [rng.standard_normal((n, width), dtype=np.float32) + np.float32(0.3) for n in rows]
    x = rng.standard_normal((data.draw(st.integers(1, 9)), width), dtype=np.float32)
    overrides, role = FORMATS[scheme]
    quantized = [quantize(scheme, w, group) for w in weights]
    dense = np.concatenate([stored_values(q, scheme)[:, :width] for q in quantized]).astype(np.float64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = lower_linear(folder, weights, WeightFormat(group_size=group, **overrides), role)
        exact, rounded = (run(folder, model, x, kernels) for kernels in (False, True))
    assert [node.op_type for node in model.graph.node] == [
        "BlockLinearOffsets" if scheme == "affine" else "BlockLinear"
    ]
    size = np.abs(x).sum(axis=1, keepdims=True)
    assert (np.abs(exact - x @ dense.T) <= 3e-6 * size + 1e-6).all()
    # Truth that owes nothing to our dequantisation: every weight is at most half a step away.
    steps = np.concatenate([np.repeat(q.scales, group, axis=1)[:, :width] for q in quantized])
    bound = 0.5001 * np.abs(x) @ steps.T + 1e-4
    assert (np.abs(exact - x @ np.concatenate(weights).T) <= bound).all()
    # int8 activations: each is within amax / 254 of its value.
    noise = np.abs(x).max(axis=1, keepdims=True) / 254 * np.abs(dense).sum(axis=1) + 3e-6 * size
    assert (np.abs(rounded - x @ dense.T) <= 1.01 * noise).all()


def test_asymmetric_groups_must_divide_the_input(tmp_path: Path) -> None:
    weights = [np.ones((4, 100), np.float32)]
    with pytest.raises(EdgeError, match="100 input features are not a multiple of group size 64"):
        lower_linear(tmp_path, weights, WeightFormat(group_size=64), "body")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_read_in_chunks_give_the_same_bytes(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [np.random.default_rng(i).standard_normal((n, 64), dtype=np.float32) for i, n in enumerate([7, 1, 10])]
    overrides, role = FORMATS[scheme]
    files = []
    for chunk_rows in (100, 3):
        monkeypatch.setattr(weight_rows, "CHUNK_BYTES", 4 * 64 * chunk_rows)
        lower_linear(tmp_path, weights, WeightFormat(**overrides), role)
        files.append((tmp_path / "weights").read_bytes())
    assert files[0] == files[1]
