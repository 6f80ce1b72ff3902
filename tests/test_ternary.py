"""Ternary weights are found, bit for bit, where they are, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engine import weight_rows
from build_engine.checkpoint import LazyTensor, open_checkpoint
from build_engine.ternary import Mixed, TernaryReport, candidate_groups, find_ternary, is_ternary, recover, requantize
from edge.errors import EdgeError, UsageError
from tests.synthetic import gguf_name, random_weights, tiny_config, write_gguf_checkpoint
from tests.ternary_samples import (
    DTYPES,
    WIDE,
    Sample,
    checkpoint_of,
    lazy,
    ternary_sample,
    ternary_weights,
    write_ternary_gguf,
)

INPUTS = (64, 96, 100, 512, 1024, 1536)
NAME = "model.layers.0.self_attn.o_proj.weight"


def read_codes(tensor: LazyTensor) -> tuple[np.ndarray, np.ndarray]:
    assert tensor.codes is not None and (tensor.codes.bits, tensor.codes.zero) == (2, 1)
    return tensor.codes.read(slice(None))


def recover_one(sample: Sample | np.ndarray, stored_as: str = "BF16") -> LazyTensor:
    values = sample.values if isinstance(sample, Sample) else sample
    config = tiny_config(num_hidden_layers=1)
    checkpoint = checkpoint_of(config, ternary_weights(config)[0])
    checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, NAME: lazy(NAME, values, stored_as)})
    return recover(checkpoint).checkpoint.tensors[NAME]


# Recovery


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(list(DTYPES)), inputs=st.sampled_from(INPUTS), seed=st.integers(0, 9999))
def test_codes_and_scales_come_back_bit_for_bit(data: st.DataObject, dtype: str, inputs: int, seed: int) -> None:
    group = data.draw(st.sampled_from(candidate_groups(inputs)))
    rng = np.random.default_rng(seed)
    sample = ternary_sample(rng, (data.draw(st.integers(1, 9)), inputs), group, DTYPES[dtype])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_rows, "CHUNK_BYTES", 4 * inputs * data.draw(st.integers(1, 4)))
        tensor = recover_one(sample)
    codes, scales = read_codes(tensor)
    assert tensor.codes is not None and tensor.codes.group == group
    np.testing.assert_array_equal(codes, sample.codes)
    np.testing.assert_array_equal(scales, sample.scales)
    assert (codes.dtype, scales.dtype) == (np.uint8, np.float32)
    rows = slice(1, 3)
    np.testing.assert_array_equal(tensor.codes.read(rows)[0], sample.codes[rows])


def test_groups_are_tried_from_the_row_down() -> None:
    assert candidate_groups(1024) == [1024, 512, 256, 128, 64, 32]
    assert candidate_groups(4096) == [4096, 2048, 1024, 512, 256, 128, 64, 32]
    assert candidate_groups(1536) == [1536, 768, 384, 256, 192, 128, 64, 32]  # an eighth of a row is 192
    assert candidate_groups(100) == [100, 50]


def test_the_report_says_what_was_found() -> None:
    sample = ternary_sample(np.random.default_rng(0), (7, 128), 64, DTYPES["bfloat16"])
    values = sample.values.copy()
    values[2, :64] = 0
    found = find_ternary(lazy(NAME, values))
    scales = np.delete(sample.scales.reshape(-1), 4)
    zeros = float((values == 0).mean())
    assert found == TernaryReport(64, False, zeros, (float(scales.min()), float(scales.max())), empty_groups=1)
    one = np.where(sample.codes == 2, 0.5, np.where(sample.codes == 0, -0.5, 0)).astype(np.float16)
    whole = find_ternary(lazy(NAME, one))
    assert isinstance(whole, TernaryReport) and whole.is_whole_tensor and whole.group == 128
    assert whole.scales == (0.5, 0.5)


def test_a_group_of_zeros_has_a_positive_scale() -> None:
    sample = ternary_sample(np.random.default_rng(1), (3, 128), 32, DTYPES["bfloat16"])
    values, expected = sample.values.copy(), sample.scales.copy()
    values[0, 32:96] = 0
    expected[0, 1:3] = expected[0, 0]  # the scale before
    values[1, :32] = -0.0
    expected[1, 0] = 1  # there is none
    values[2] = 0
    expected[2] = 1
    codes, scales = read_codes(recover_one(values))
    np.testing.assert_array_equal(scales, expected)
    assert (codes[1, :32] == 1).all() and (codes[2] == 1).all()


# What is not ternary


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), dtype=st.sampled_from(list(DTYPES)), up=st.booleans())
def test_one_weight_that_is_off_by_a_bit_is_found(seed: int, dtype: str, up: bool) -> None:
    rng = np.random.default_rng(seed)
    sample = ternary_sample(rng, (6, 128), 128, DTYPES[dtype])
    values = sample.values.copy()
    row, column = int(rng.integers(6)), int(rng.integers(128))
    unsigned = np.uint16 if values.itemsize == 2 else np.uint32
    scale = sample.scales[row].astype(values.dtype)
    values.view(unsigned)[row, column] = int(scale.view(unsigned)[0]) + (1 if up else -1)
    found = find_ternary(lazy(NAME, values))
    assert isinstance(found, Mixed) and (found.row, found.first, found.group) == (row, column // 32 * 32, 32)
    assert sorted(found.magnitudes) == sorted([float(scale[0]), float(values[row, column])])
    with pytest.raises(EdgeError, match=rf"o_proj\.weight is not ternary: .* of row {row} hold the magnitudes"):
        recover_one(values)


def test_dense_and_latent_weights_are_refused_with_two_of_their_magnitudes() -> None:
    latent = np.random.default_rng(3).standard_normal((8, 64)).astype(ml_dtypes.bfloat16)
    found = find_ternary(lazy(NAME, latent))
    assert isinstance(found, Mixed)
    group = np.abs(latent[found.row, found.first : found.first + found.group].astype(float))
    assert set(found.magnitudes) <= set(group.tolist()) and found.magnitudes[0] != found.magnitudes[1]
    with pytest.raises(EdgeError, match=r"choose --weights w4a16, or --requantize bf16 if these are the unquantised"):
        recover_one(latent)


def test_nearly_all_zeros_are_refused() -> None:
    values = np.zeros((40, 64), np.float16)
    values[0] = 0.5
    with pytest.raises(EdgeError, match=r"o_proj\.weight is 97\.5% zeros, .* --weights exact"):
        recover_one(values)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_other_tensors_must_not_be_ternary(name: str) -> None:
    config = tiny_config(num_hidden_layers=1, tie_word_embeddings=False)
    weights, _ = ternary_weights(config)
    recover(checkpoint_of(config, weights))
    weights["model.layers.0.input_layernorm.weight"] = np.ones(64, np.float32)  # as they are before training
    recover(checkpoint_of(config, weights))
    weights[name] = np.resize(np.array([0.25, 0, -0.25], np.float32), weights[name].shape)
    with pytest.raises(EdgeError, match=rf"tensor {name} is ternary .*names do not fit the weights"):
        recover(checkpoint_of(config, weights))


def test_a_damaged_weight_is_named() -> None:
    sample = ternary_sample(np.random.default_rng(1), (3, 64), 64, DTYPES["float16"])
    sample.values[2, 5] = np.nan
    with pytest.raises(EdgeError, match=r"o_proj\.weight holds nan at row 2, column 5"):
        recover_one(sample)


def test_the_first_layer_decides_what_a_checkpoint_is() -> None:
    config = tiny_config()
    weights, _ = ternary_weights(config)
    assert is_ternary(checkpoint_of(config, weights))
    assert not is_ternary(checkpoint_of(config, random_weights(config)))
    zeros = weights | {name: np.zeros_like(values) for name, values in weights.items()}
    assert not is_ternary(checkpoint_of(config, zeros))
    weights["model.layers.0.mlp.down_proj.weight"] = random_weights(config)["model.layers.0.mlp.down_proj.weight"]
    assert not is_ternary(checkpoint_of(config, weights))


# GGUF


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_gguf_codes_are_the_stored_ones(tmp_path: Path, kind: str) -> None:
    path, samples = write_ternary_gguf(tmp_path / "model.gguf", kind, {"down_proj": 256})
    checkpoint = open_checkpoint(path)
    assert is_ternary(checkpoint)
    for name, tensor in checkpoint.tensors.items():
        assert (tensor.codes is not None) == (name in samples)
    for name, sample in samples.items():
        codes, scales = read_codes(checkpoint.tensors[name])
        np.testing.assert_array_equal(codes, sample.codes)
        np.testing.assert_array_equal(scales, np.repeat(sample.scales, scales.shape[1] // sample.scales.shape[1], 1))
    down = "model.layers.0.mlp.down_proj.weight"
    found = recover(checkpoint)
    assert found.reports[down].group == 256 and found.checkpoint.tensors[down].shape[1] == 512
    assert all(report.group == 256 for report in found.reports.values())


def test_blocks_of_one_scale_are_a_row(tmp_path: Path) -> None:
    path, samples = write_ternary_gguf(tmp_path / "model.gguf", "TQ2_0", {})
    found = recover(open_checkpoint(path))
    for name, sample in samples.items():
        codes, scales = read_codes(found.checkpoint.tensors[name])
        assert found.reports[name].group == sample.values.shape[1]
        np.testing.assert_array_equal(codes, sample.codes)
        np.testing.assert_array_equal(scales, sample.scales)


def test_a_block_may_have_no_scale_or_a_negative_one(tmp_path: Path) -> None:
    path, samples = write_ternary_gguf(tmp_path / "model.gguf", "TQ2_0", {})
    name = "model.layers.0.mlp.gate_proj.weight"
    sample = samples[name]
    blocks = gguf.quants.quantize(sample.values.astype(np.float32), gguf.GGMLQuantizationType.TQ2_0)
    blocks[0, -2:] = 0
    blocks[1, -1] ^= 0x80
    path = write_gguf_checkpoint(
        tmp_path / "odd.gguf", WIDE, quant="TQ2_0", stored={gguf_name(name): ("TQ2_0", blocks)}
    )
    tensor = open_checkpoint(path).tensors[name]
    codes, scales = read_codes(tensor)
    assert (scales > 0).all() and (codes[0] == 1).all()
    np.testing.assert_array_equal(codes[1], 2 - sample.codes[1])
    np.testing.assert_array_equal((codes - 1.0) * scales, tensor.read(slice(None)))

    blocks[5, 0] = 0xFF
    path = write_gguf_checkpoint(
        tmp_path / "bad.gguf", WIDE, quant="TQ2_0", stored={gguf_name(name): ("TQ2_0", blocks)}
    )
    with pytest.raises(EdgeError, match=rf"tensor {name} holds a code that is not -1, 0 or 1"):
        read_codes(open_checkpoint(path).tensors[name])


def test_q4_0_is_no_source_of_ternary_weights(tmp_path: Path) -> None:
    path, samples = write_ternary_gguf(tmp_path / "model.gguf", "Q4_0", {})
    checkpoint = open_checkpoint(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = checkpoint.tensors[name].read(slice(None)) / samples[name].scales
    assert {-1.0, 0.0, 0.875} <= set(np.round(stored, 3).reshape(-1).tolist())  # the sentence is true
    assert not is_ternary(checkpoint)
    with pytest.raises(EdgeError, match=r"q_proj\.weight is stored as Q4_0, .* 7/8 .* use a TQ2_0 or TQ1_0 file"):
        recover(checkpoint)


# Unquantised weights


def round_in(dtype: np.dtype, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows [K] by numbers of this type, one after another; the mean is a float32 sum's."""
    codes, scales = [], []
    for row in weights.astype(dtype):
        scale = dtype.type(np.float32(np.mean([abs(float(w)) for w in row])))
        quotients = [float(dtype.type(w) / scale) for w in row]
        codes.append([1 + max(-1, min(1, round(q))) for q in quotients])  # round: ties to even
        scales.append([float(scale)])
    return np.array(codes, np.uint8), np.array(scales, np.float32)


def latent_checkpoint(seed: int = 0) -> tuple[dict[str, np.ndarray], LazyTensor]:
    config = tiny_config(num_hidden_layers=1)
    weights = {name: values.astype(ml_dtypes.bfloat16) for name, values in random_weights(config, seed).items()}
    return weights, checkpoint_of(config, weights)


@pytest.mark.parametrize("arithmetic", ["bf16", "fp32"])
def test_latent_weights_are_rounded_as_training_rounds_them(arithmetic: str) -> None:
    weights, checkpoint = latent_checkpoint()
    found = requantize(checkpoint, arithmetic)
    different = total = 0
    for name, report in found.reports.items():
        truth = {kind: round_in(DTYPES[dtype], weights[name]) for kind, dtype in TYPES.items()}
        codes, scales = read_codes(found.checkpoint.tensors[name])
        np.testing.assert_array_equal(codes, truth[arithmetic][0])
        np.testing.assert_allclose(scales, truth[arithmetic][1], rtol=1e-6)
        values = (codes - 1.0) * scales
        np.testing.assert_array_equal(found.checkpoint.tensors[name].read(slice(3, 9)), values[3:9].astype(np.float32))
        latent = weights[name].astype(float)
        assert report.error == pytest.approx(np.linalg.norm(values - latent) / np.linalg.norm(latent))
        assert report.zeros == (codes == 1).mean() and 0.2 < report.zeros < 0.4
        different += int((truth["bf16"][0] != truth["fp32"][0]).sum())
        total += codes.size
    assert found.disagreement == different / total > 0
    assert f"{found.disagreement:.2%} of the codes hang on the arithmetic" in found.describe()


TYPES = {"bf16": "bfloat16", "fp32": "float32"}


def test_a_weight_of_half_the_scale_is_zero_only_where_the_arithmetic_is_the_trainings() -> None:
    """The mean, 0.9985, is 1 in bfloat16, so that 1/2 over it is no more than the half that rounds to 0."""
    config = tiny_config(num_hidden_layers=1)
    weights, _ = latent_checkpoint()
    row = np.full(64, 1.0, np.float32)
    row[0], row[12:] = 0.5, 1 + 2**-7
    weights[NAME] = np.tile(row, (64, 1)).astype(ml_dtypes.bfloat16)
    checkpoint = checkpoint_of(config, weights)
    codes = {a: read_codes(requantize(checkpoint, a).checkpoint.tensors[NAME])[0][0, 0] for a in ("bf16", "fp32")}
    assert codes == {"bf16": 1, "fp32": 2}


def test_groups_can_be_requantised_too() -> None:
    weights, checkpoint = latent_checkpoint()
    found = requantize(checkpoint, "bf16", group=32)
    codes, scales = read_codes(found.checkpoint.tensors[NAME])
    by_group = weights[NAME].reshape(-1, 32)
    expected = round_in(DTYPES["bfloat16"], by_group)
    np.testing.assert_array_equal(codes.reshape(-1, 32), expected[0])
    np.testing.assert_allclose(scales.reshape(-1, 1), expected[1], rtol=1e-6)


@pytest.mark.parametrize("group", [-1, 16, 48])
def test_groups_that_no_operator_has_are_refused_before_the_work(group: int) -> None:
    config = tiny_config(hidden_size=64, head_dim=16)
    checkpoint = checkpoint_of(config, random_weights(config))
    with pytest.raises(
        UsageError, match=rf"knows no groups of {group}; choose a --group-size of 32, 64, 128, 256, or 0"
    ):
        requantize(checkpoint, "bf16", group)


def test_what_cannot_be_requantised_says_why() -> None:
    _, checkpoint = latent_checkpoint()
    with pytest.raises(UsageError, match=r"unknown --requantize 'int8'; choose bf16 or fp32"):
        requantize(checkpoint, "int8")
    with pytest.raises(UsageError, match=r"--group-size 128 does not divide the 64 inputs of tensor .*q_proj"):
        requantize(checkpoint, "bf16", group=128)
    with pytest.raises(UsageError, match=r"q_proj\.weight is quantised already, .* leave out --requantize"):
        requantize(checkpoint_of(checkpoint.config, ternary_weights(checkpoint.config)[0]), "bf16")
