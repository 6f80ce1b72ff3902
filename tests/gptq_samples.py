"""Int4 checkpoints made from known codes and scales, packed for GPTQ and for Marlin by the letter of the spec."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from edge.config import ModelConfig
from tests.synthetic import random_weights, write_hf_checkpoint

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@dataclass(frozen=True)
class Int4Layer:
    """codes [N, K] uint8; scales [N, groups] float16."""

    codes: np.ndarray
    scales: np.ndarray

    def values(self) -> np.ndarray:
        """[N, K] float32, one weight at a time as the format defines it."""
        group = self.codes.shape[1] // self.scales.shape[1]
        scales = np.repeat(self.scales.astype(np.float32), group, axis=1)
        return (self.codes.astype(np.float32) - np.float32(8)) * scales


def random_layer(rng: np.random.Generator, n: int, k: int, group: int) -> Int4Layer:
    """Scales that give outputs of about the size of the inputs."""
    scales = rng.uniform(0.5, 1.5, (n, 1 if group == -1 else k // group)) * k**-0.5 / 5
    return Int4Layer(rng.integers(0, 16, (n, k), np.uint8), scales.astype(np.float16))


def quantization_config(group: int, **changes: Any) -> dict[str, Any]:
    """What AutoGPTQ and its heirs write; a change to ... leaves the field out."""
    said = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "static_groups": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }
    return {key: value for key, value in (said | changes).items() if value is not ...}


def write_gptq_folder(
    folder: Path,
    config: ModelConfig,
    group: int,
    *,
    marlin: bool = False,
    lm_head: bool = False,
    shards: int = 1,
    tokenizer: bool = False,
    **changes: Any,
) -> dict[str, Int4Layer]:
    """A Hugging Face folder of int4 layers -> the layers by name; `changes` are of quantization_config."""
    write_hf_checkpoint(folder, config, dtype="float16", tokenizer=tokenizer)
    said = quantization_config(group, lm_head=lm_head, **changes)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))

    rng = np.random.default_rng(7)
    plain = {name: array.astype(np.float16) for name, array in random_weights(config).items()}
    layers = {}
    for name in list(plain):
        if (name.startswith("model.layers.") and plain[name].ndim == 2) or (lm_head and name == "lm_head.weight"):
            layers[name.removesuffix(".weight")] = random_layer(rng, *plain.pop(name).shape, group)
    tensors = plain | (marlin_tensors(layers) if marlin else gptq_tensors(layers, said.get("checkpoint_format")))
    (folder / "model.safetensors").unlink()
    if shards > 1:
        _save_shards(folder, tensors, shards)
    else:
        save_file(tensors, folder / ("model_gptq.safetensors" if marlin else "model.safetensors"))
    return layers


def _save_shards(folder: Path, tensors: Mapping[str, np.ndarray], shards: int) -> None:
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: array for name, array in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def gptq_tensors(layers: Mapping[str, Int4Layer], checkpoint_format: str | None = "gptq") -> dict[str, np.ndarray]:
    """Spec 3.1."""
    tensors = {}
    for name, layer in layers.items():
        (n, k), groups = layer.codes.shape, layer.scales.shape[1]
        zero = 8 if checkpoint_format == "gptq_v2" else 7
        tensors |= {
            f"{name}.qweight": pack_words(layer.codes.T.reshape(k // 8, 8, n).swapaxes(1, 2)),
            f"{name}.scales": np.ascontiguousarray(layer.scales.T),
            f"{name}.qzeros": pack_words(np.full((groups, n // 8, 8), zero, np.uint8)),
            f"{name}.g_idx": np.array([i // (k // groups) for i in range(k)], np.int32),
        }
    return tensors


def marlin_tensors(layers: Mapping[str, Int4Layer]) -> dict[str, np.ndarray]:
    """Spec 3.2 and 3.3: fused rows, no qzeros, no g_idx."""
    fused: dict[str, list[Int4Layer]] = {}
    for name, layer in layers.items():
        leaf = name.rpartition(".")[2]
        fused.setdefault(name.removesuffix(leaf) + FUSED.get(leaf, leaf), []).append(layer)
    tensors = {}
    for name, parts in fused.items():
        codes = np.concatenate([part.codes for part in parts])
        scales = np.concatenate([part.scales for part in parts])
        tensors[f"{name}.qweight"] = marlin_words(codes)
        tensors[f"{name}.scales"] = marlin_scales(scales)
    return tensors


def marlin_words(codes: np.ndarray) -> np.ndarray:
    """[N, K] -> int32 [K / 16, 2 N]."""
    n, k = codes.shape
    permutation = []
    for lane in range(32):
        eights = []
        for block in range(2):
            for row in (2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4) + 8, 2 * (lane % 4) + 9):
                eights.append(16 * row + lane // 4 + 8 * block)
        for tile in range(4):
            permutation += [eights[i] + 256 * tile for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    tiles = codes.T.reshape(k // 16, 16, n // 16, 16).transpose(0, 2, 1, 3)
    permuted = tiles.reshape(-1, 1024)[:, permutation]
    return pack_words(permuted.reshape(k // 16, 2 * n, 8))


def marlin_scales(scales: np.ndarray) -> np.ndarray:
    """[N, groups] -> [groups, N]."""
    permutation = [i + 8 * j for i in range(8) for j in range(8)]
    if scales.shape[1] == 1:
        permutation = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return scales.T.reshape(-1, len(permutation))[:, permutation].reshape(scales.shape[::-1])


def pack_words(codes: np.ndarray) -> np.ndarray:
    """[..., 8] -> int32 [...], the first code in the lowest bits."""
    words = np.zeros(codes.shape[:-1], np.uint32)
    for i in range(8):
        words |= codes[..., i].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def edit_tensors(folder: Path, edit: Any, file: str = "model.safetensors") -> None:
    """Apply `edit` to a file's tensors by name, and write them back."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / file)
