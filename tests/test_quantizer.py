"""`edge quantize` as a library: GPTQ against its definition, the forward pass against the executor, resuming."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engine.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.quantizer import calibrate, forward, gptq, memory, run, write
from build_engine.quantizer.calibrate import SAMPLE, calibration_sequences
from build_engine.quantizer.place import partial_path
from build_engine.quantizer.run import QuantizeOptions, quantize_checkpoint
from edge.config import LongRope, ModelConfig, SparseConfig
from edge.engine import open_engine
from edge.errors import EdgeError, UsageError
from edge.plan import EngineOptions
from plugins.rms_norm.meaning import rms_norm
from tests.synthetic import tiny_config, tiny_llama_config, write_gguf_checkpoint, write_hf_checkpoint
from tests.ternary_samples import write_ternary_checkpoint
from tests.text import english_text

OPTIONS = QuantizeOptions(group_size=32)


def activations(rng: np.random.Generator, tokens: int, inputs: int) -> np.ndarray:
    """Inputs that depend on one another and differ in size, as real ones do."""
    mixing = rng.standard_normal((inputs, inputs)) * rng.uniform(0.1, 2, inputs)
    return (rng.standard_normal((tokens, inputs)) @ mixing / np.sqrt(inputs)).astype(np.float32)


def fitted(weight: np.ndarray, scales: np.ndarray, hessian: np.ndarray) -> gptq.Int4Matrix:
    order = gptq.input_order(hessian)
    return gptq.gptq(weight, scales, gptq.inverse_factor("w", hessian, order, 0.01), order)


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


def long_rope(original: int) -> LongRope:
    return LongRope(tuple(1 + 0.1 * i for i in range(8)), tuple(1 + 1.5 * i for i in range(8)), original)


MODELS: dict[str, ModelConfig] = {
    "muP, tied": tiny_config(),
    "muP, untied": tiny_config(tie_word_embeddings=False, scale_emb=3.0),
    "a Llama": tiny_llama_config(),
    "LongRoPE's short list": tiny_config(long_rope=long_rope(128), max_position_embeddings=256),
    "LongRoPE's long list": tiny_config(long_rope=long_rope(64), max_position_embeddings=256),
    "one KV head": tiny_config(num_key_value_heads=1),
    "sparse, as long as it is dense": tiny_config(sparse=SparseConfig()),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_is_the_executors(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "checkpoint", MODELS[name]))
    config, length = checkpoint.config, 100
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, length), dtype=np.int32)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportOptions(weights=WeightFormat("exact")))
    engine = open_engine(bundle, EngineOptions(context=256))
    states = np.empty((*ids.shape, config.hidden_size), np.float32)
    forward.embed(checkpoint, ids, states)
    rope = forward.rope_of_length(config, length)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    for sequence, hidden in zip(ids, states, strict=True):
        for index in range(config.num_hidden_layers):
            hidden = forward.load_layer(checkpoint, index).forward(hidden, rope)
        normed = rms_norm(hidden, forward.read_float32(checkpoint.tensors["model.norm.weight"]), config.rms_norm_eps)
        logits = normed / np.float32(config.logit_divisor) @ forward.read_float32(checkpoint.tensors[head]).T
        np.testing.assert_allclose(logits, engine.logits(sequence.tolist(), length), atol=1e-4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("quantizer") / "checkpoint"
    config = tiny_config(num_hidden_layers=3, long_rope=long_rope(64), max_position_embeddings=256)
    return open_checkpoint(write_hf_checkpoint(folder, config, tokenizer=True))


@pytest.fixture(scope="module")
def sequences(source: Checkpoint) -> np.ndarray:
    return calibration_sequences(source, SAMPLE.read_text(encoding="utf-8"), samples=6, length=48)


def counted(inputs: np.ndarray, method: str) -> np.ndarray:
    """Rows of one sequence [L, K] as a method counts them, with 5 positions of prefix."""
    if method == "gptq":
        return inputs
    if method == "omit":
        return inputs[5:]
    usual = np.linalg.norm(inputs[5:]) / np.sqrt(len(inputs) - 5)
    return np.stack([row * min(1, usual / np.linalg.norm(row)) if i < 5 else row for i, row in enumerate(inputs)])


@pytest.mark.parametrize("method", ["gptq", "omit", "scale"])
def test_every_linear_is_fitted_to_what_it_reads(
    method: str, source: Checkpoint, sequences: np.ndarray, tmp_path: Path
) -> None:
    """Codes follow from inputs that the quantised layers before give, the first positions as P-GPTQ counts them."""
    options = replace(OPTIONS, method="gptq", skip_tokens=5)
    if method != "gptq":
        options = replace(options, method="pgptq", prefix=method)
    report = quantize_checkpoint(source, tmp_path / "out", options, sequences)
    quantized = open_checkpoint(tmp_path / "out")
    config, rope = source.config, forward.rope_of_length(source.config, 48)
    states = np.empty((*sequences.shape, config.hidden_size), np.float32)
    forward.embed(source, sequences, states)
    for index in range(config.num_hidden_layers):
        original, layer = forward.load_layer(source, index), forward.load_layer(quantized, index)
        inputs: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "qkv": layer.attention_input,
            "o": lambda hidden, layer=layer: layer.attended(hidden, rope),
            "gate_up": lambda hidden, layer=layer: layer.mlp_input(
                layer.after_attention(hidden, layer.attended(hidden, rope))
            ),
            "down": lambda hidden, layer=layer: layer.gated(
                layer.after_attention(hidden, layer.attended(hidden, rope))
            ),
        }
        for stage, names in forward.STAGES.items():
            x = np.concatenate([counted(inputs[stage](hidden), method) for hidden in states])
            hessian = run.mean_outer_product([x])
            for name in names:
                weight = original.weights[name]
                scales = gptq.group_scales(name, weight, 32)
                expected = fitted(weight, scales, hessian).dequantize()
                # The Hessian was summed in another order, which may turn near ties.
                assert np.mean(layer.weights[name] != expected) < 0.02, (index, name)
                reported = next(item for item in report.linears if (item.layer, item.linear) == (index, name))
                measured = np.linalg.norm(x @ (weight - layer.weights[name]).T) / np.linalg.norm(x @ weight.T)
                assert reported.output_error == pytest.approx(measured, rel=1e-3)
                assert reported.output_error < reported.rtn_output_error
        states = np.stack([layer.forward(hidden, rope) for hidden in states])


def test_rounding_needs_no_text_and_keeps_everything_else(source: Checkpoint, tmp_path: Path) -> None:
    report = quantize_checkpoint(source, tmp_path / "out", replace(OPTIONS, method="rtn"), None)
    quantized = open_checkpoint(tmp_path / "out")
    assert quantized.config == source.config
    assert quantized.text == source.text
    for name, tensor in source.tensors.items():
        values = forward.read_float32(tensor)
        if "_proj" in name:
            values = gptq.round_to_nearest(values, gptq.group_scales(name, values, 32)).dequantize()
        else:
            assert quantized.tensors[name].dtype == tensor.dtype
        assert np.array_equal(forward.read_float32(quantized.tensors[name]), values), name
    assert {(item.output_error, item.weight_error == item.rtn_weight_error) for item in report.linears} == {
        (None, True)
    }
    assert json.loads((tmp_path / "out" / write.REPORT).read_text()) == json.loads(json.dumps(report.to_dict()))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "static_groups": True,
        "checkpoint_format": "gptq", "lm_head": False,
    }  # fmt: skip


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != write.REPORT}


def quantize_until(stop: int, source: Checkpoint, out: Path, sequences: np.ndarray | None, **settings: Any) -> None:
    """Interrupted as by Ctrl-C when step `stop` begins."""

    def progress(done: int, total: int, name: str) -> None:
        if done == stop:
            raise KeyboardInterrupt

    options = settings.pop("options", OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, options, sequences, progress=progress, **settings)


@pytest.mark.parametrize("stop", [4, 7, 11])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    stop: int, source: Checkpoint, sequences: np.ndarray, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    quantize_checkpoint(source, whole, OPTIONS, sequences)
    quantize_until(stop, source, out, sequences)
    assert not out.exists()
    with pytest.raises(UsageError, match=r"interrupted run; add --resume to finish it or --overwrite"):
        quantize_checkpoint(source, out, OPTIONS, sequences)
    quantize_until(stop, source, out, sequences, resume=True)
    with pytest.raises(UsageError, match=r"begun with another damping \(0\.01, now 0\.02\)"):
        quantize_checkpoint(source, out, replace(OPTIONS, damping=0.02), sequences, resume=True)
    with pytest.raises(UsageError, match=r"begun with another calibration"):
        quantize_checkpoint(source, out, OPTIONS, sequences[:5], resume=True)
    report = quantize_checkpoint(source, out, OPTIONS, sequences, resume=True)
    assert len(report.linears) == 21
    assert shards(out) == shards(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_a_run_without_a_finished_layer_leaves_nothing(
    source: Checkpoint, sequences: np.ndarray, tmp_path: Path
) -> None:
    quantize_until(3, source, tmp_path / "out", sequences)
    assert list(tmp_path.iterdir()) == []
    quantize_checkpoint(source, tmp_path / "out", OPTIONS, sequences, resume=True)  # nothing to resume is fine


def test_another_checkpoint_does_not_go_on(source: Checkpoint, sequences: np.ndarray, tmp_path: Path) -> None:
    quantize_until(4, source, tmp_path / "out", sequences)
    other = open_checkpoint(write_hf_checkpoint(tmp_path / "other", source.config, seed=1, tokenizer=True))
    with pytest.raises(UsageError, match="begun with another checkpoint"):
        quantize_checkpoint(other, tmp_path / "out", OPTIONS, sequences, resume=True)


def test_damage_in_what_was_finished_is_named(source: Checkpoint, sequences: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_until(8, source, out, sequences)
    shard = partial_path(out) / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(EdgeError, match=r"model-00001-of-00004\.safetensors is missing or damaged .* --overwrite"):
        quantize_checkpoint(source, out, OPTIONS, sequences, resume=True)
    quantize_checkpoint(source, out, OPTIONS, sequences, overwrite=True)
    assert not partial_path(out).exists()


def test_only_its_own_results_are_replaced(source: Checkpoint, tmp_path: Path) -> None:
    rounding = replace(OPTIONS, method="rtn")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="exists"):
            quantize_checkpoint(source, tmp_path / "mine", rounding, None, overwrite=overwrite)
    quantize_checkpoint(source, tmp_path / "out", rounding, None)
    with pytest.raises(UsageError, match="already exists"):
        quantize_checkpoint(source, tmp_path / "out", rounding, None)
    quantize_until(4, source, tmp_path / "out", None, options=replace(rounding, group_size=64), overwrite=True)
    assert open_checkpoint(tmp_path / "out").tensors["model.layers.0.self_attn.q_proj.weight"].codes.group == 32
    quantize_checkpoint(source, tmp_path / "out", replace(rounding, group_size=64), None, overwrite=True, resume=True)
    assert open_checkpoint(tmp_path / "out").tensors["model.layers.0.self_attn.q_proj.weight"].codes.group == 64
    assert (tmp_path / "mine" / "letter.txt").read_text() == "precious"


WRONG: dict[str, tuple[Callable[[Checkpoint, Path], Checkpoint], dict[str, Any], str]] = {
    "a group that does not divide": (
        lambda source, folder: open_checkpoint(
            write_hf_checkpoint(folder / "checkpoint", tiny_config(hidden_size=96, head_dim=24))
        ),
        {"group_size": 64},
        "q_proj.weight has 96 input features, not a multiple of group size 64",
    ),
    "rows that do not pack": (
        lambda source, folder: open_checkpoint(
            write_hf_checkpoint(folder / "checkpoint", tiny_config(head_dim=10, num_attention_heads=32))
        ),
        {},
        "k_proj.weight has 20 rows, but GPTQ files pack them by 8",
    ),
    "ternary": (
        lambda source, folder: open_checkpoint(write_ternary_checkpoint(folder / "checkpoint", tiny_config())),
        {},
        "checkpoint is ternary, and int4 would only make it larger; export it as it is",
    ),
    "int4 already": (
        lambda source, folder: (
            quantize_checkpoint(source, folder / "int4", replace(OPTIONS, method="rtn"), None),
            open_checkpoint(folder / "int4"),
        )[1],
        {},
        "is stored in 4 bits already",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_checkpoints_that_cannot_be_int4_are_refused(name: str, source: Checkpoint, tmp_path: Path) -> None:
    make, changes, words = WRONG[name]
    checkpoint = make(source, tmp_path)
    with pytest.raises(EdgeError, match=words):
        quantize_checkpoint(checkpoint, tmp_path / "out", replace(OPTIONS, method="rtn", **changes), None)
    assert not (tmp_path / "out").exists()
    assert not partial_path(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "awq"}, "choose one of pgptq, gptq, rtn"),
        ({"group_size": 48}, r"\(32, 64, 128\)"),
        ({"prefix": "drop"}, "choose scale or omit"),
        ({"damping": 0.0}, "between 0 and 1"),
        ({"skip_tokens": -1}, "--skip-tokens is -1"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        QuantizeOptions(**changes)


def with_weight(source: Checkpoint, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Checkpoint:
    """`source` with one tensor changed, in memory."""
    values = change(forward.read_float32(source.tensors[name]))
    changed = replace(source.tensors[name], dtype=values.dtype, read=values.__getitem__)
    return replace(source, tensors={**source.tensors, name: changed})


@pytest.mark.parametrize("method", ["gptq", "pgptq"])
def test_inputs_that_are_all_zero_are_no_damage(
    method: str, source: Checkpoint, sequences: np.ndarray, tmp_path: Path
) -> None:
    """A pruned up_proj: down reads nothing but zeros, and is rounded to the nearest."""
    checkpoint = with_weight(source, "model.layers.1.mlp.up_proj.weight", np.zeros_like)
    report = quantize_checkpoint(checkpoint, tmp_path / "out", replace(OPTIONS, method=method), sequences)
    down = next(item for item in report.linears if (item.layer, item.linear) == (1, "mlp.down_proj"))
    assert down.output_error == 0
    assert down.weight_error == down.rtn_weight_error > 0
    up = open_checkpoint(tmp_path / "out").tensors["model.layers.1.mlp.up_proj.weight"]
    assert not up.read(slice(None)).any()


@pytest.mark.filterwarnings("error")
def test_activations_beyond_float32_are_one_sentence(source: Checkpoint, sequences: np.ndarray, tmp_path: Path) -> None:
    """And no warnings of numpy beside it."""
    checkpoint = with_weight(source, "model.layers.1.input_layernorm.weight", lambda values: values * np.float32(1e25))
    with pytest.raises(EdgeError, match="layer 1: the calibration text drives activations beyond float32"):
        quantize_checkpoint(checkpoint, tmp_path / "out", OPTIONS, sequences)


def test_a_folder_in_the_way_is_nobody_elses_to_clear(source: Checkpoint, tmp_path: Path) -> None:
    """`OUT.partial` that no run of ours left keeps its files, whatever the options."""
    mine = partial_path(tmp_path / "out")
    (mine / "letters").mkdir(parents=True)
    (mine / "letter.txt").write_text("precious")
    for choice in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match=r"out\.partial, where .* holds something else; move it away"):
            quantize_checkpoint(source, tmp_path / "out", replace(OPTIONS, method="rtn"), None, **choice)
    assert (mine / "letter.txt").read_text() == "precious"
    shutil.rmtree(mine)
    mine.write_text("precious")
    with pytest.raises(UsageError, match="holds something else"):
        quantize_checkpoint(source, tmp_path / "out", replace(OPTIONS, method="rtn"), None)
    mine.unlink()
    mine.mkdir()
    (mine / "state.json.tmp").write_text("{")  # of a run that was killed at once
    quantize_checkpoint(source, tmp_path / "out", replace(OPTIONS, method="rtn"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_weight_that_is_no_number_is_named(source: Checkpoint, sequences: np.ndarray, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    values = np.array(source.tensors[name].read(slice(None)))
    values[3, 5] = np.nan
    damaged = replace(source.tensors[name], read=values.__getitem__)
    checkpoint = replace(source, tensors={**source.tensors, name: damaged})
    with pytest.raises(EdgeError, match=r"layers\.1\.mlp\.up_proj\.weight holds nan at row 3, column 5"):
        quantize_checkpoint(checkpoint, tmp_path / "out", OPTIONS, sequences)
    assert not (tmp_path / "out").exists()


def test_memory_is_kept_and_what_cannot_fit_is_refused(tmp_path: Path) -> None:
    """The states of all sequences are 8 MiB and go to disk when they must; numpy reports what it allocates."""
    config = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64)
    source = open_checkpoint(write_hf_checkpoint(tmp_path / "checkpoint", config))
    sequences = np.random.default_rng(0).integers(0, config.vocab_size, (64, 128), dtype=np.int32)
    working = memory.working_bytes(config, 128)
    states = 4 * sequences.size * config.hidden_size
    with pytest.raises(EdgeError, match=r"but --memory is .* MiB; raise --memory or lower --length"):
        quantize_checkpoint(source, tmp_path / "out", OPTIONS, sequences, memory=memory.BASE + working - 1)
    peaks = {}
    for name, limit in {"disk": memory.BASE + working, "memory": memory.BASE + working + states}.items():
        tracemalloc.start()
        quantize_checkpoint(source, tmp_path / name, OPTIONS, sequences, memory=limit)
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peaks[name] < limit - memory.BASE
    assert peaks["disk"] > 0.4 * working, "the estimate is far from what is needed"
    assert peaks["memory"] - peaks["disk"] == pytest.approx(states, rel=0.2)
    assert shards(tmp_path / "disk") == shards(tmp_path / "memory")


def test_a_disk_without_room_is_refused_first(source: Checkpoint, tmp_path: Path) -> None:
    huge = replace(source.tensors["model.norm.weight"], shape=(1 << 50,))
    checkpoint = replace(source, tensors={**source.tensors, "model.norm.weight": huge})
    with pytest.raises(EdgeError, match=r"needs .* GiB on disk but .* GiB are free; make room"):
        quantize_checkpoint(checkpoint, tmp_path / "out", replace(OPTIONS, method="rtn"), None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "arch"),
    [
        (tiny_llama_config(), "llama"),
        (tiny_config(tie_word_embeddings=False, bos_token_id=None), "minicpm"),
        (tiny_config(long_rope=long_rope(64), max_position_embeddings=256), "minicpm"),
    ],
)
def test_a_gguf_becomes_a_folder_that_says_the_same(
    config: ModelConfig, arch: str, source: Checkpoint, tmp_path: Path
) -> None:
    gguf = open_checkpoint(write_gguf_checkpoint(tmp_path / "model.gguf", config, quant="Q8_0", arch=arch))
    checkpoint = replace(gguf, text=source.text)  # our writer of GGUF files puts no vocabulary in
    quantize_checkpoint(checkpoint, tmp_path / "out", replace(OPTIONS, method="rtn"), None)
    quantized = open_checkpoint(tmp_path / "out")
    assert quantized.config == gguf.config
    assert quantized.text == source.text
    name = "model.embed_tokens.weight"
    assert np.array_equal(forward.read_float32(quantized.tensors[name]), forward.read_float32(gguf.tensors[name]))


def test_sequences_cover_the_text_and_begin_like_prompts(source: Checkpoint) -> None:
    text = "".join(f"word{i} " for i in range(2000))
    ids = calibration_sequences(source, text, samples=10**6, length=33)
    assert ids.shape[1] == 33
    assert (ids[:, 0] == source.config.bos_token_id).all()
    few = calibration_sequences(source, text, samples=5, length=33)
    places = [int(np.flatnonzero((ids == sequence).all(axis=1))[0]) for sequence in few]
    assert places == [len(ids) * i // 5 for i in range(5)]
    short = calibration_sequences(source, "the fox", samples=4, length=512)
    assert short.shape[0] == 1
    assert 2 < short.shape[1] < 10
    with pytest.raises(UsageError, match="holds no tokens"):
        calibration_sequences(source, "", samples=4, length=512)
    with pytest.raises(UsageError, match=r"has no tokenizer .* --method rtn"):
        calibration_sequences(replace(source, text=None), text, samples=4, length=512)


def test_a_long_text_is_read_in_excerpts(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many sequences from all over it as of a text that is tokenised whole."""
    text = "".join(f"word{i} " for i in range(40_000))
    whole = calibration_sequences(source, text, samples=8, length=33)
    monkeypatch.setattr(calibrate, "_WHOLE", 1000)
    parts = calibrate._excerpts(text, 8, 528)
    assert [len(part) for part in parts] == [528] * 8
    starts = [text.index(part) for part in parts]
    assert starts[0] == 0 and starts[-1] == len(text) - 528 and min(np.diff(starts)) > 10_000
    assert calibration_sequences(source, text, samples=8, length=33).shape == whole.shape == (8, 33)


def test_sequences_stay_within_the_models_positions(source: Checkpoint) -> None:
    text, most = "the fox " * 2000, source.config.max_position_embeddings
    assert calibration_sequences(source, text, samples=2, length=most).shape == (2, most)
    with pytest.raises(UsageError, match=rf"--length {most + 1} is beyond the {most} positions"):
        calibration_sequences(source, text, samples=2, length=most + 1)


def test_a_text_shorter_than_what_is_skipped_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    ids = calibration_sequences(source, "the", samples=4, length=512)
    with pytest.raises(UsageError, match="leave nothing after the 4 of --skip-tokens"):
        quantize_checkpoint(source, tmp_path / "out", OPTIONS, ids)


def test_files_beside_the_weights_come_along(tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path / "checkpoint", tiny_config(), tokenizer=True)
    beside = {"generation_config.json": '{"temperature": 0.5}', "modeling_minicpm.py": "pass", "vocab.txt": "a"}
    for name, text in beside.items():
        (folder / name).write_text(text)
    shutil.copyfile(folder / "model.safetensors", folder / "unrelated.bin")
    quantize_checkpoint(open_checkpoint(folder), tmp_path / "out", replace(OPTIONS, method="rtn"), None)
    for name, text in beside.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not (tmp_path / "out" / "unrelated.bin").exists()


def token_error(values: np.ndarray, exact: np.ndarray) -> float:
    """Mean over tokens of the relative error of the residual stream [S, L, H]."""
    return float(np.mean(np.linalg.norm(values - exact, axis=-1) / np.linalg.norm(exact, axis=-1)))


def test_real_weights_give_closer_activations_on_text_they_were_not_fitted_to(
    smollm2: Checkpoint, tmp_path: Path
) -> None:
    """Two layers of SmolLM2: what comes out of them on other prose, beside what exact weights give."""
    layers = 2
    config = replace(smollm2.config, num_hidden_layers=layers, scale_depth=layers**0.5)
    names = {name for name, _ in expected_shapes(config)}
    cut = replace(smollm2, config=config, tensors={n: t for n, t in smollm2.tensors.items() if n in names})
    text = english_text()
    fitted_to = calibration_sequences(cut, text[-200_000:], samples=8, length=128)
    held_out = calibration_sequences(cut, text[:20_000], samples=2, length=128)
    rope = forward.rope_of_length(config, 128)

    def outputs(checkpoint: Checkpoint) -> np.ndarray:
        states = np.empty((*held_out.shape, config.hidden_size), np.float32)
        forward.embed(checkpoint, held_out, states)
        for index in range(layers):
            layer = forward.load_layer(checkpoint, index)
            states = np.stack([layer.forward(hidden, rope) for hidden in states])
        return states

    exact, errors = outputs(cut), {}
    for method in ("rtn", "gptq", "pgptq"):
        options = QuantizeOptions(method, group_size=64)
        quantize_checkpoint(cut, tmp_path / method, options, None if method == "rtn" else fitted_to)
        errors[method] = token_error(outputs(open_checkpoint(tmp_path / method)), exact)
    assert errors["gptq"] < 0.9 * errors["rtn"], errors
    assert errors["pgptq"] < 0.9 * errors["rtn"], errors
