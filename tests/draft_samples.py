"""Random EAGLE drafts of the tiny models, written as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file

from edge.config import ModelConfig
from tests.gptq_samples import Int4Layer, gptq_tensors, marlin_tensors, quantization_config, random_layer

Weights = dict[str, np.ndarray]


def draft_config(base: ModelConfig, **changes: Any) -> dict[str, Any]:
    """config.json of a draft with sizes of its own; a change to ... leaves the field out."""
    values = {
        "architectures": ["MiniCPMForCausalLM"],
        "hidden_size": base.hidden_size,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": base.num_attention_heads // 2,
        "num_key_value_heads": 1,
        "head_dim": base.head_dim,
        "rms_norm_eps": 1e-5,
        "scale_emb": base.scale_emb,
        "scale_depth": base.scale_depth,
        "dim_model_base": base.dim_model_base,
        "hidden_act": "silu",
    }
    return {key: value for key, value in (values | changes).items() if value is not ...}


def draft_weights(config: dict[str, Any], seed: int = 3, *, norms: bool = True, attention_norm: bool = True) -> Weights:
    """Float32 weights by their published names."""
    rng = np.random.default_rng(seed)
    hidden, width, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    attended, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes = {
        "fc": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj": (attended, hidden),
        "layers.0.self_attn.k_proj": (kv, hidden),
        "layers.0.self_attn.v_proj": (kv, hidden),
        "layers.0.self_attn.o_proj": (hidden, attended),
        "layers.0.mlp.gate_proj": (width, hidden),
        "layers.0.mlp.up_proj": (width, hidden),
        "layers.0.mlp.down_proj": (hidden, width),
    }
    weights = {
        f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) * np.float32(2 * shape[1] ** -0.5)
        for name, shape in shapes.items()
    }
    names = ["layers.0.post_attention_layernorm"]
    names += ["input_norm1", "input_norm2"] * norms + ["layers.0.input_layernorm"] * attention_norm
    for name in names:
        weights[f"{name}.weight"] = (1 + 0.2 * rng.standard_normal(hidden)).astype(np.float32)
    return weights


def write_draft(
    folder: Path, config: dict[str, Any], weights: Weights, *, file: str = "model.safetensors", dtype: Any = None
) -> Weights:
    """A draft's folder -> its weights as they are stored, widened to float32. dtype: bfloat16 if None."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stored = {name: array.astype(dtype or ml_dtypes.bfloat16) for name, array in weights.items()}
    embedding = np.ones((7, config["hidden_size"]), dtype or ml_dtypes.bfloat16)  # of another size: nobody reads it
    files = {**stored, "embed_tokens.weight": embedding}
    if file.endswith(".safetensors"):
        save_file(files, folder / file)
    else:
        torch_type = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        of = torch_type[embedding.dtype.name]
        torch.save({n: torch.from_numpy(a.astype(np.float32)).to(of) for n, a in files.items()}, folder / file)
    return {name: array.astype(np.float32) for name, array in stored.items()}


def write_int4_draft(
    folder: Path, config: dict[str, Any], weights: Weights, group: int, *, marlin: bool
) -> tuple[Weights, dict[str, Int4Layer]]:
    """The same with all matrices int4 -> the weights that they mean, and the codes."""
    rng = np.random.default_rng(11)
    layers = {
        name.removesuffix(".weight"): random_layer(rng, *array.shape, group)
        for name, array in weights.items()
        if array.ndim == 2
    }
    plain = {name: array.astype(np.float16) for name, array in weights.items() if array.ndim == 1}
    folder.mkdir(parents=True, exist_ok=True)
    said = {"quantization_config": quantization_config(group)}
    (folder / "config.json").write_text(json.dumps(config | said))
    tensors = marlin_tensors(layers) if marlin else gptq_tensors(layers)
    save_file({**plain, **tensors}, folder / ("model_gptq_marlin.safetensors" if marlin else "model.safetensors"))
    values = {f"{name}.weight": layer.values() for name, layer in layers.items()}
    return values | {name: array.astype(np.float32) for name, array in plain.items()}, layers
