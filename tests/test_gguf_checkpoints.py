"""GGUF checkpoints against the gguf library's writer, llama.cpp's logits and a real file."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engine.checkpoint import Checkpoint, open_checkpoint
from edge.config import LongRope
from edge.errors import EdgeError
from tests.synthetic import (
    gguf_name,
    llama_cpp_rows,
    random_weights,
    tiny_config,
    tiny_llama_config,
    write_gguf_checkpoint,
    write_hf_checkpoint,
)

LONG_ROPE = LongRope(tuple(1 + 0.5 * i for i in range(8)), tuple(1 + 0.7 * i for i in range(8)), 4096)
# Hidden and FFN sizes that blocks of 256 divide.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}


def read_all(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: tensor.read(slice(None)) for name, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize(("quant", "dtype"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_gguf_holds_the_same_model_as_hf(tmp_path: Path, quant: str, dtype: Any) -> None:
    for arch, config in (
        ("minicpm", tiny_config(long_rope=LONG_ROPE, tie_word_embeddings=False)),
        ("llama", tiny_llama_config(head_dim=32)),
    ):
        hf = open_checkpoint(write_hf_checkpoint(tmp_path / arch, config, dtype="float32"))
        path = write_gguf_checkpoint(tmp_path / f"{arch}.gguf", config, quant=quant, arch=arch)
        checkpoint = open_checkpoint(path)
        tensors = read_all(checkpoint)
        assert checkpoint.format == "gguf" and checkpoint.text is None and set(tensors) == set(hf.tensors)
        for name, expected in read_all(hf).items():
            rounded = expected.astype(dtype) if expected.ndim > 1 else expected
            assert np.array_equal(tensors[name], rounded), name
        if arch == "llama":
            assert checkpoint.config == config
        factors = checkpoint.config.long_rope.long_factor if checkpoint.config.long_rope else ()
        assert np.allclose(factors, LONG_ROPE.long_factor if arch == "minicpm" else (), rtol=1e-6)


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_1", "TQ1_0", "TQ2_0"])
def test_quantised_tensors_are_dequantised_by_rows(tmp_path: Path, quant: str) -> None:
    config = tiny_config(**WIDE)
    checkpoint = open_checkpoint(write_gguf_checkpoint(tmp_path / "m.gguf", config, quant=quant))
    step = {"Q8_0": 0.01, "Q4_0": 0.13, "Q4_1": 0.13}.get(quant)
    for name, expected in random_weights(config).items():
        tensor = checkpoint.tensors[name]
        whole = tensor.read(slice(None))
        assert whole.dtype == tensor.dtype == np.float32 and tensor.shape == expected.shape
        assert np.array_equal(tensor.read(slice(17, 90)), whole[17:90])
        if expected.ndim > 1 and step is not None:
            assert tensor.stored_as == quant
            assert np.abs(whole - expected).max() < step * np.abs(expected).max()


@pytest.mark.parametrize("quant", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_survive_exactly(tmp_path: Path, quant: str) -> None:
    """One scale a row, as BitCPM4's rows have (spec: quantization_and_speculation.md 1.4)."""
    rng = np.random.default_rng(0)
    ternary = rng.integers(-1, 2, (256, 256)) * (2.0 ** rng.integers(-8, 0, (256, 1))).astype(np.float32)
    stored = gguf.quants.quantize(llama_cpp_rows(ternary, 4), gguf.GGMLQuantizationType[quant])
    replaced = {"blk.0.attn_q.weight": (quant, stored)}
    path = write_gguf_checkpoint(tmp_path / "m.gguf", tiny_config(**WIDE), stored=replaced)
    tensor = open_checkpoint(path).tensors["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(tensor.read(slice(None)), ternary) and tensor.stored_as == quant


@pytest.mark.parametrize(("quant", "block_bytes"), [("Q4_K", 144), ("Q6_K", 210)])
def test_k_quants_are_read_by_rows_in_hf_order(tmp_path: Path, quant: str, block_bytes: int) -> None:
    raw = np.random.default_rng(1).integers(0, 60, (256, block_bytes), dtype=np.uint8)
    path = write_gguf_checkpoint(
        tmp_path / "m.gguf",
        tiny_config(**WIDE),
        stored={"blk.0.attn_q.weight": (quant, raw), "blk.0.attn_output.weight": (quant, raw)},
    )
    tensors = open_checkpoint(path).tensors
    decoded = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[quant])
    assert np.array_equal(tensors["model.layers.0.self_attn.o_proj.weight"].read(slice(5, 9)), decoded[5:9])
    in_hf_order = tensors["model.layers.0.self_attn.q_proj.weight"].read(slice(None))
    assert np.array_equal(llama_cpp_rows(in_hf_order, 4), decoded)


@settings(max_examples=20, deadline=None)
@given(heads=st.sampled_from([1, 2, 4]), half=st.integers(1, 12), data=st.data())
def test_query_rows_come_in_hf_order(
    tmp_path_factory: pytest.TempPathFactory, heads: int, half: int, data: st.DataObject
) -> None:
    config = tiny_config(num_attention_heads=heads, num_key_value_heads=1, head_dim=2 * half)
    path = write_gguf_checkpoint(tmp_path_factory.mktemp("g") / "m.gguf", config, quant="F16")
    tensor = open_checkpoint(path).tensors["model.layers.0.self_attn.q_proj.weight"]
    start = data.draw(st.integers(0, tensor.shape[0]))
    rows = slice(start, data.draw(st.integers(start, tensor.shape[0])))
    expected = random_weights(config)[tensor.name].astype(np.float16)
    assert np.array_equal(tensor.read(rows), expected[rows])


def forward(checkpoint: Checkpoint, ids: list[int]) -> np.ndarray:
    """The dense forward pass in float64 (spec: infllmv2.md 2)."""
    config, weights = checkpoint.config, {n: a.astype(np.float64) for n, a in read_all(checkpoint).items()}
    d, length = config.head_dim, len(ids)
    assert config.long_rope is not None
    inverse = config.rope_theta ** (-np.arange(0, d, 2) / d) / config.long_rope.short_factor
    angles = np.arange(length)[:, None, None] * inverse

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weights[f"{name}.weight"]

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : d // 2], x[..., d // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    h = weights["model.embed_tokens.weight"][ids] * config.scale_emb
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        x = norm(h, at + "input_layernorm")
        q, k, v = (linear(x, f"{at}self_attn.{p}_proj").reshape(length, -1, d) for p in "qkv")
        k, v = (np.repeat(y, config.group_size, 1) for y in (rotate(k), v))
        scores = np.einsum("thd,shd->hts", rotate(q), k) / np.sqrt(d)
        p = np.where(np.tri(length, dtype=bool), np.exp(scores), 0)
        attended = np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v).reshape(length, -1)
        h = h + config.residual_scale * linear(attended, at + "self_attn.o_proj")
        x = norm(h, at + "post_attention_layernorm")
        gate = linear(x, at + "mlp.gate_proj")
        up = gate / (1 + np.exp(-gate)) * linear(x, at + "mlp.up_proj")
        h = h + config.residual_scale * linear(up, at + "mlp.down_proj")
    return linear(norm(h, "model.norm") / config.logit_divisor, "model.embed_tokens")


def test_minicpm_gguf_means_what_llama_cpp_computes(tmp_path: Path) -> None:
    """llama.cpp's logits (float32 KV cache) for this very file pin row order, muP scales and rope factors."""
    path = write_gguf_checkpoint(tmp_path / "m.gguf", tiny_config(long_rope=LONG_ROPE))
    logits = forward(open_checkpoint(path), [(7 * i * i + 3 * i) % 320 for i in range(40)])[-1]
    assert np.allclose(logits[:8], [0.646, 3.1147, 0.3761, 0.8807, 0.0497, 0.2174, -1.196, 2.2106], atol=2e-4)
    assert logits.argmax() == 204


def test_minicpm_gguf_scales(tmp_path: Path) -> None:
    config = tiny_config(scale_emb=10.0, scale_depth=1.6, dim_model_base=16.0)
    path = write_gguf_checkpoint(tmp_path / "m.gguf", config)
    found = open_checkpoint(path).config
    assert (found.scale_emb, found.scale_depth, found.dim_model_base) == (10.0, pytest.approx(1.6), 16.0)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"minicpm.logit_scale", b"minicpm.other_scale"))
    with pytest.raises(EdgeError, match=r"key minicpm\.logit_scale is missing"):
        open_checkpoint(path)
    # Files from before the three keys existed mean MiniCPM's constants.
    path.write_bytes(re.sub(rb"minicpm\.(logit|residual|embedding)_scale", rb"minicpm.\1_other", whole))
    old = open_checkpoint(path).config
    assert (old.scale_emb, old.scale_depth, old.dim_model_base) == (12.0, 1.4, 256.0)


ONES = np.ones(8, np.float32)


@pytest.mark.parametrize(
    ("name", "stored", "complaint"),
    [
        ("rope_freqs.weight", ("F32", ONES), "rope_freqs.weight is Llama 3's rope scaling"),
        ("rope_factors_long.weight", ("F32", ONES), "rope_factors_long.weight has no place"),
        ("blk.0.attn_q.bias", ("F32", ONES), "blk.0.attn_q.bias has no place"),
        ("blk.7.attn_norm.weight", ("F32", ONES), "layers.7.input_layernorm.weight has no place"),
        ("blk.1.ffn_norm.weight", ("F32", ONES), r"post_attention_layernorm.weight has shape \[8\]"),
        ("blk.1.ffn_up.weight", ("Q5_0", np.zeros((128, 44), np.uint8)), "ffn_up.weight is stored as Q5_0"),
    ],
)
def test_gguf_tensors_must_be_the_models(tmp_path: Path, name: str, stored: Any, complaint: str) -> None:
    path = write_gguf_checkpoint(tmp_path / "m.gguf", tiny_config(), stored={name: stored})
    with pytest.raises(EdgeError, match=complaint):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (b"minicpm", b"qwencpm", "architecture qwencpm is not supported; supported are minicpm and llama"),
        (b"minicpm.block_count", b"minicpm.bXock_count", "key minicpm.block_count is missing"),
        (b"blk.0.attn_k.weight", b"blk.0.attn_X.weight", "layers.0.self_attn.k_proj.weight is missing"),
        (b"longrope", b"yarnrope", "rope scaling yarnrope is not supported for minicpm"),
        (b"rope_factors_long", b"rope_factors_Xong", "no F32 tensor rope_factors_long.weight"),
    ],
)
def test_gguf_metadata_is_checked(tmp_path: Path, old: bytes, new: bytes, complaint: str) -> None:
    path = write_gguf_checkpoint(tmp_path / "m.gguf", tiny_config(long_rope=LONG_ROPE))
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(EdgeError, match=complaint):
        open_checkpoint(path)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf_checkpoint(tmp_path_factory.mktemp("gguf") / "whole.gguf", tiny_config(), quant="Q8_0")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_gguf_names_the_file(tiny_gguf: Path, data: st.DataObject) -> None:
    whole = tiny_gguf.read_bytes()
    damaged = tiny_gguf.with_name("damaged.gguf")
    cut = data.draw(st.integers(0, len(whole) - 1))
    damaged.write_bytes(whole[:cut])
    with pytest.raises(EdgeError, match=re.escape(str(damaged))):
        open_checkpoint(damaged)
    at, patch = data.draw(st.integers(0, 3000)), data.draw(st.binary(min_size=1, max_size=8))
    damaged.write_bytes(whole[:at] + patch + whole[at + data.draw(st.sampled_from([0, len(patch)])) :])
    try:  # some patches leave a sound file, but none may raise anything else
        open_checkpoint(damaged)
    except EdgeError as error:
        assert str(damaged) in str(error)


def test_truncated_gguf_counts_the_missing_bytes(tiny_gguf: Path) -> None:
    cut = tiny_gguf.with_name("cut.gguf")
    last = max(gguf.GGUFReader(tiny_gguf).tensors, key=lambda t: t.data_offset)
    cut.write_bytes(tiny_gguf.read_bytes()[: int(last.data_offset + last.n_bytes) - 5])
    with pytest.raises(EdgeError, match=f"tensor {last.name} ends 5 bytes after the end of the file"):
        open_checkpoint(cut)


def test_smollm2_reads_only_the_rows_asked_for(smollm2: Checkpoint) -> None:
    config, tensors = smollm2.config, smollm2.tensors
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (576, 30, 64)
    assert (config.vocab_size, config.eos_token_ids) == (49152, (2, 0))
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-5, 1e5, True)
    assert (config.residual_scale, config.logit_divisor) == (pytest.approx(1), 1)
    assert {t.stored_as for t in tensors.values()} == {"Q4_1", "Q8_0", "F32"}
    tracemalloc.start()
    rows = tensors["model.embed_tokens.weight"].read(slice(20_000, 20_016))
    q_rows = tensors["model.layers.3.self_attn.q_proj.weight"].read(slice(60, 70))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.shape == (16, 576) and q_rows.shape == (10, 576) and peak < 1 << 20

    # Q4_1 by hand: 32 weights are fp16 scale, fp16 minimum, 16 bytes of low then high nibbles. In this file
    # row 5 of blk.0.attn_v.weight (360 bytes a row) begins here:
    blocks = np.memmap(smollm2.path, np.uint8, "r", 34014016 + 5 * 360, (18, 20))
    scale, minimum = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
    v_row = tensors["model.layers.0.self_attn.v_proj.weight"].read(slice(5, 6))
    assert np.array_equal(v_row[0], (codes * scale + minimum).reshape(-1))


def test_gguf_names_are_llama_cpps() -> None:
    """The writer the other tests rely on uses gguf's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MINICPM, 2)
    for name in random_weights(tiny_config(tie_word_embeddings=False)):
        assert table.get_name(name, try_suffixes=(".weight",)) == gguf_name(name)
