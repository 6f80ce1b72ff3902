"""The quantised checkpoint on disk: GPTQ tensors (spec: quantization_and_speculation.md 3.1) in safetensors shards."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from build_engine.checkpoint import Checkpoint, LazyTensor
from build_engine.quantize import pack_nibbles, unpack_nibbles
from build_engine.quantizer.forward import LINEARS, layer_tensors, row_chunks
from build_engine.quantizer.gptq import Int4Matrix
from edge.config import ModelConfig, neutral_mup
from edge.errors import EdgeError

REPORT = "quantization_report.json"
_ZEROS_WORD = 0x77777777  # eight zeros of 8, each stored less one
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int32": "I32"}
# Files of a Hugging Face folder that say nothing about the weights.
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.py",
    "LICENSE*",
)


def pack_gptq(matrix: Int4Matrix) -> dict[str, np.ndarray]:
    """[N, K] -> qweight [K/8, N] int32, qzeros [K/g, N/8] int32, scales [K/g, N] float16, g_idx [K] int32."""
    rows, inputs = matrix.codes.shape
    groups = matrix.scales.shape[1]
    return {
        "qweight": np.ascontiguousarray(pack_nibbles(matrix.codes).view(np.int32).T),
        "qzeros": np.full((groups, rows // 8), _ZEROS_WORD, np.int32),
        "scales": np.ascontiguousarray(matrix.scales.T),
        "g_idx": np.arange(inputs, dtype=np.int32) // np.int32(inputs // groups),
    }


def unpack_gptq(qweight: np.ndarray, scales: np.ndarray) -> Int4Matrix:
    """The inverse of `pack_gptq`."""
    codes = unpack_nibbles(np.ascontiguousarray(qweight.T).view(np.uint8))
    return Int4Matrix(codes, np.ascontiguousarray(scales.T))


def require_packable(checkpoint: Checkpoint, group: int) -> None:
    """EdgeError names a matrix that is quantised already or that groups of this size do not divide."""
    for index in range(checkpoint.config.num_hidden_layers):
        for name in layer_tensors(index).values():
            tensor = checkpoint.tensors[name]
            rows, inputs = tensor.shape
            if tensor.codes is not None:
                raise EdgeError(
                    f"{checkpoint.path}: tensor {name} is stored in {tensor.codes.bits} bits already; "
                    "export the checkpoint as it is"
                )
            if inputs % group:
                raise EdgeError(
                    f"tensor {name} has {inputs} input features, not a multiple of group size {group}; choose a "
                    "smaller --group-size (32, 64 or 128)"
                )
            if rows % 8:
                raise EdgeError(f"tensor {name} has {rows} rows, but GPTQ files pack them by 8; export it instead")


def output_bytes(checkpoint: Checkpoint, group: int) -> int:
    """Bytes of the shards that will be written."""
    linears = {name for index in range(checkpoint.config.num_hidden_layers) for name in layer_tensors(index).values()}
    total = 0
    for name, tensor in checkpoint.tensors.items():
        size = int(np.prod(tensor.shape))
        if name not in linears:
            total += size * tensor.dtype.itemsize
            continue
        rows, inputs = tensor.shape
        total += size // 2 + inputs // group * (2 * rows + rows // 2) + 4 * inputs
    return total


def shard_name(index: int, layers: int) -> str:
    """Shard 0..layers-1 is a decoder layer's linears; the last, `layers`, holds everything else."""
    return f"model-{index + 1:05}-of-{layers + 1:05}.safetensors"


def write_layer(folder: Path, index: int, config: ModelConfig, matrices: Mapping[str, Int4Matrix]) -> None:
    """The linears of one decoder layer as a shard; it appears complete or not at all."""
    tensors: dict[str, np.ndarray | LazyTensor] = {}
    for name, tensor in layer_tensors(index).items():
        stem = tensor.removesuffix("weight")
        tensors |= {stem + part: array for part, array in pack_gptq(matrices[name]).items()}
    write_shard(folder / shard_name(index, config.num_hidden_layers), tensors)


def read_layer(folder: Path, index: int, config: ModelConfig) -> dict[str, Int4Matrix]:
    """What `write_layer` wrote; EdgeError if it is damaged."""
    path = folder / shard_name(index, config.num_hidden_layers)
    try:
        tensors = load_file(path)
        stems = {name: tensor.removesuffix("weight") for name, tensor in layer_tensors(index).items()}
        return {
            name: unpack_gptq(tensors[stems[name] + "qweight"], tensors[stems[name] + "scales"]) for name in LINEARS
        }
    except (OSError, KeyError, SafetensorError) as error:
        raise EdgeError(f"{path} is missing or damaged ({error}); start anew with --overwrite") from None


def write_rest(folder: Path, checkpoint: Checkpoint) -> None:
    """Embedding, norms and head with the values and types of the checkpoint, and the index over all shards."""
    layers = checkpoint.config.num_hidden_layers
    linears = {name for index in range(layers) for name in layer_tensors(index).values()}
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in linears}
    write_shard(folder / shard_name(layers, layers), rest)
    weight_map = dict.fromkeys(rest, shard_name(layers, layers))
    for index in range(layers):
        for name in layer_tensors(index).values():
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                weight_map[name.removesuffix("weight") + part] = shard_name(index, layers)
    total = sum((folder / shard_name(index, layers)).stat().st_size for index in range(layers + 1))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_shard(path: Path, tensors: Mapping[str, np.ndarray | LazyTensor]) -> None:
    """A safetensors file, streamed: the library would hold an embedding of gigabytes twice."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + int(np.prod(tensor.shape)) * tensor.dtype.itemsize
        dtype = _DTYPES[tensor.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for chunk in _chunks(tensor):
                file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def _chunks(tensor: np.ndarray | LazyTensor) -> Iterator[np.ndarray]:
    if isinstance(tensor, np.ndarray):
        yield tensor
    else:
        yield from (rows for _, rows in row_chunks(tensor))


def write_config(folder: Path, checkpoint: Checkpoint, group: int) -> None:
    """config.json, the source's own if it has one, with the quantization_config that GPTQ readers ask for."""
    path = checkpoint.path / "config.json"
    values = json.loads(path.read_bytes()) if checkpoint.format == "safetensors" else _hf_config(checkpoint.config)
    values["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    write_json(folder / "config.json", values)


def _hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model that came without one; a Llama if its muP scales are neutral, as other tools expect."""
    neutral = neutral_mup(config.num_hidden_layers, config.hidden_size)
    is_llama = config.long_rope is None and all(getattr(config, key) == value for key, value in neutral.items())
    values = config.to_dict()
    values["eos_token_id"] = list(values.pop("eos_token_ids"))
    if (rope := values.pop("long_rope")) is not None:
        values["rope_scaling"] = {"rope_type": "longrope", **rope}
    if (sparse := values.pop("sparse")) is not None:
        values["sparse_config"] = sparse
    if is_llama:
        values = {key: value for key, value in values.items() if key not in neutral}
    return values | {
        "architectures": ["LlamaForCausalLM" if is_llama else "MiniCPMForCausalLM"],
        "model_type": "llama" if is_llama else "minicpm",
        "hidden_act": "silu",
        "torch_dtype": "float16",
    }


def write_text_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Tokenizer, chat template and generation defaults: copies, or made from what a GGUF file holds."""
    if checkpoint.format == "safetensors":
        for path in sorted({path for pattern in _COPIED for path in checkpoint.path.glob(pattern)}):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        return
    text = checkpoint.text
    if text is None:
        return
    (folder / "tokenizer.json").write_text(text.tokenizer_json, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": text.add_bos,
        "bos_token": text.bos_token,
        "eos_token": text.eos_token,
        "chat_template": text.chat_template,
    }
    write_json(folder / "tokenizer_config.json", {key: value for key, value in settings.items() if value is not None})


def write_json(path: Path, values: Any) -> None:
    """One JSON document, replaced whole."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    unfinished.rename(path)
