"""Random checkpoints in the shapes of MiniCPM4, streamed to disk: Hugging Face safetensors and GGUF.

Speed does not depend on what the weights say, so random ones measure the real thing without a download. `ternary`
weights are those that training with BitCPM4's quantiser leaves in the projections (spec: 1.1), a scale a row.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np

from build_engine.checkpoint import expected_shapes
from edge.config import ModelConfig

_ROWS = 4096  # rows drawn at a time


def _random_rows(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The tensor's float32 values in row chunks; the same name gives the same values. Norms are ones."""
    if len(shape) == 1:
        yield np.ones(shape, np.float32)
        return
    generator = np.random.default_rng(list(name.encode()))
    for start in range(0, shape[0], _ROWS):
        rows = min(_ROWS, shape[0] - start)
        yield generator.standard_normal((rows, *shape[1:]), dtype=np.float32) * np.float32(0.02)


def _ternary_rows(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """`_random_rows`, in the projections rounded to -s, 0 or s by the mean magnitude s of each row, as bfloat16."""
    for rows in _random_rows(name, shape):
        if "_proj." in name:
            scales = np.abs(rows).mean(1, keepdims=True)
            stored = scales.astype(ml_dtypes.bfloat16).astype(np.float32)
            yield np.clip(np.rint(rows / scales), -1, 1) * stored
        else:
            yield rows


def write_safetensors(folder: Path, config: ModelConfig, *, ternary: bool = False) -> Path:
    """A Hugging Face folder of bfloat16 weights without a tokenizer."""
    draw = _ternary_rows if ternary else _random_rows
    folder.mkdir(parents=True, exist_ok=True)
    header, offset = {}, 0
    for name, shape in expected_shapes(config):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in expected_shapes(config):
            for rows in draw(name, shape):
                file.write(rows.astype(ml_dtypes.bfloat16).tobytes())
    (folder / "config.json").write_text(json.dumps(_hf_config(config)))
    return folder


def write_safetensors_once(folder: Path, config: ModelConfig, *, ternary: bool = False) -> Path:
    """`write_safetensors`, unless an earlier run has."""
    return folder if (folder / "config.json").exists() else write_safetensors(folder, config, ternary=ternary)


def _hf_config(c: ModelConfig) -> dict[str, object]:
    same = [field for field in vars(c) if field not in ("head_dim", "eos_token_ids", "long_rope", "sparse")]
    return {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "hidden_act": "silu",
        "eos_token_id": list(c.eos_token_ids),
        **{name: getattr(c, name) for name in same},
    }


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        plain = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        return plain[name.removesuffix(".weight")] + ".weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(path: Path, config: ModelConfig, *, ternary: bool = False) -> Path:
    """The same weights as a llama.cpp file without a vocabulary: every matrix in Q4_0 (4.5 bits a weight), or ternary
    projections in TQ2_0 (2.06 bits) and the embedding, which is the head too, in Q8_0.

    The rows of q and k stay in Hugging Face's order: which permutation of random rows it is changes no speed.
    """
    c = config
    writer = gguf.GGUFWriter(str(path), "minicpm")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_embedding_scale(c.scale_emb)
    writer.add_residual_scale(c.residual_scale)
    writer.add_logit_scale(c.logit_divisor)
    writer.add_tokenizer_model("no_vocab")
    kinds = gguf.GGMLQuantizationType
    for name, shape in expected_shapes(c):
        values = np.concatenate(list((_ternary_rows if ternary else _random_rows)(name, shape)))
        if len(shape) == 1:
            writer.add_tensor(_gguf_name(name), values)
        else:
            kind = (kinds.TQ2_0 if "_proj." in name else kinds.Q8_0) if ternary else kinds.Q4_0
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def prepare(folder: Path, config: ModelConfig, *, ternary: bool = False) -> tuple[Path, Path]:
    """The safetensors folder and the llama.cpp file of one shape in `folder`, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / ("ternary" if ternary else "checkpoint")
    model = folder / ("tq2_0.gguf" if ternary else "q4_0.gguf")
    write_safetensors_once(checkpoint, config, ternary=ternary)
    if not model.exists():
        write_gguf(model.with_suffix(".partial"), config, ternary=ternary).rename(model)
    return checkpoint, model
