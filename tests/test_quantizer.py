"""`edge quantize` as a library: its forward pass against the executor, what it fits, refuses and needs."""

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

from build_engine.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.quantizer import forward, gptq, memory, run, write
from build_engine.quantizer.calibrate import calibration_sequences
from build_engine.quantizer.place import partial_path
from build_engine.quantizer.run import QuantizeOptions, quantize_checkpoint
from edge.config import ModelConfig, SparseConfig
from edge.engine import open_engine
from edge.errors import EdgeError, UsageError
from edge.plan import EngineOptions
from plugins.rms_norm.meaning import rms_norm
from tests.quantizer_samples import OPTIONS, fitted, layered_checkpoint, long_rope, sample_sequences, shards
from tests.synthetic import tiny_config, tiny_llama_config, write_gguf_checkpoint, write_hf_checkpoint
from tests.ternary_samples import write_ternary_checkpoint
from tests.text import english_text

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
    return layered_checkpoint(tmp_path_factory.mktemp("quantizer"))


@pytest.fixture(scope="module")
def sequences(source: Checkpoint) -> np.ndarray:
    return sample_sequences(source)


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
