"""Ternary matrices and checkpoints whose codes and scales are known, stored fake-quantised as BitCPM4 is."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from build_engine.checkpoint import Checkpoint, LazyTensor
from edge.config import ModelConfig
from tests.synthetic import (
    gguf_name,
    hf_config,
    llama_cpp_rows,
    random_weights,
    tiny_config,
    write_gguf_checkpoint,
)

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}

# Blocks of TQ1_0 and TQ2_0 have 256 inputs.
WIDE = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=1)


@dataclass(frozen=True)
class Sample:
    """values [N, K] in a checkpoint's type; codes [N, K] in 0, 1, 2; scales [N, K / group] float32."""

    values: np.ndarray
    codes: np.ndarray
    scales: np.ndarray


def ternary_sample(rng: np.random.Generator, shape: tuple[int, int], group: int, dtype: np.dtype) -> Sample:
    """Random codes, three of ten 0, half of those as -0.0; neighbouring groups have different scales."""
    rows, inputs = shape
    signs = rng.choice([-1, 0, 1], p=[0.35, 0.3, 0.35], size=shape).astype(np.float32)
    steps = 2 * rng.integers(0, 60, (rows, inputs // group)) + np.arange(inputs // group) % 2
    scales = ((130 + steps) / np.float32(8192)).astype(np.float32)  # eight bits: exact in all three types
    if dtype == np.float32:
        scales = scales + np.float32(2.0**-30)
    values = (signs.reshape(rows, -1, group) * scales[..., None]).reshape(shape)
    values = np.where((signs == 0) & rng.integers(0, 2, shape, dtype=bool), np.float32(-0.0), values)
    return Sample(values.astype(dtype), (signs + 1).astype(np.uint8), scales)


def lazy(name: str, values: np.ndarray, stored_as: str = "F32") -> LazyTensor:
    """A tensor in memory."""
    return LazyTensor(name, values.shape, values.dtype, stored_as, lambda rows: values[rows])


def checkpoint_of(config: ModelConfig, weights: dict[str, np.ndarray]) -> Checkpoint:
    """A checkpoint in memory."""
    tensors = {name: lazy(name, values) for name, values in weights.items()}
    return Checkpoint(Path("made"), "safetensors", config, tensors, None, {})


def ternary_weights(
    config: ModelConfig, groups: dict[str, int] | None = None, dtype: str = "bfloat16", seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, Sample]]:
    """All weights by name, and the samples among them. groups: part of a name -> inputs with one scale, else a row."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    samples: dict[str, Sample] = {}
    for name, values in random_weights(config, seed).items():
        weights[name] = values.astype(DTYPES[dtype])
        if name.endswith("_proj.weight"):
            group = next((size for part, size in (groups or {}).items() if part in name), values.shape[1])
            samples[name] = ternary_sample(rng, values.shape, group, DTYPES[dtype])
            weights[name] = samples[name].values
    return weights, samples


def write_ternary_checkpoint(
    folder: Path, config: ModelConfig, groups: dict[str, int] | None = None, dtype: str = "bfloat16"
) -> Path:
    """`ternary_weights` as a Hugging Face folder; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config, dtype)))
    save_file(ternary_weights(config, groups, dtype)[0], folder / "model.safetensors", {"format": "pt"})
    return folder


def write_ternary_gguf(path: Path, kind: str, groups: dict[str, int]) -> tuple[Path, dict[str, Sample]]:
    """A GGUF of WIDE with projections stored as `kind`, the embedding as F16; and the samples by name."""
    weights, samples = ternary_weights(WIDE, groups, "float16")
    stored = {"token_embd.weight": ("F16", weights["model.embed_tokens.weight"])}
    for name, sample in samples.items():
        values = sample.values.astype(np.float32)
        heads = {"q_proj": WIDE.num_attention_heads, "k_proj": WIDE.num_key_value_heads}.get(name.split(".")[-2])
        values = values if heads is None else llama_cpp_rows(values, heads)
        stored[gguf_name(name)] = (kind, gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]))
    return write_gguf_checkpoint(path, WIDE, stored=stored), samples


def with_ternary_projections(checkpoint: Checkpoint) -> Checkpoint:
    """The self-test's model with ternary projections, their scales a power of two for each row: exact in float16."""
    rng = np.random.default_rng(5)
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            signs = rng.integers(-1, 2, tensor.shape).astype(np.float32)
            tensors[name] = lazy(name, signs * np.exp2(rng.integers(-5, -3, (len(signs), 1))).astype(np.float32))
    return replace(checkpoint, tensors=tensors)
