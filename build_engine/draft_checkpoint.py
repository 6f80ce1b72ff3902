"""EAGLE drafts as they are published: a folder of one decoder layer (spec: quantization_and_speculation.md 4.1).

Its tensors are fc [H, 2 H], input_norm1 and input_norm2 [H] and the layer layers.0, of 16 bits or int4 for GPTQ or
Marlin, in safetensors or in a file of torch.save. Embedding, head and RoPE are the base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from build_engine.checkpoint import Checkpoint, Codes, LazyTensor
from build_engine.gptq_checkpoint import open_gptq_tensors
from build_engine.hf_checkpoint import (
    INTEGER,
    NUMBER,
    gptq_format,
    json_field,
    open_shards,
    read_json,
    refuse_unsupported,
)
from build_engine.safetensors_file import INTEGER_SUFFIXES
from edge.config import DraftConfig, ModelConfig, neutral_mup
from edge.errors import EdgeError, UsageError
from edge.torch_file import load_torch_file

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INPUT_NORMS = ("input_norm1.weight", "input_norm2.weight")
ATTENTION_NORM = "layers.0.input_layernorm.weight"
PRUNED_HEAD = "draft.lm_head.weight"  # the base's rows that the draft has
_MUP = ("scale_emb", "scale_depth", "dim_model_base")
_TORCH_TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


@dataclass(frozen=True)
class DraftCheckpoint:
    """A draft on disk and what it is a draft of; `tensors` has its own names."""

    path: Path
    config: DraftConfig
    tensors: Mapping[str, LazyTensor]


def open_draft(folder: Path, base: Checkpoint) -> DraftCheckpoint:
    """Check names, shapes and configuration against the base; reads no weights. EdgeError names what does not fit."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json; give the folder of an EAGLE draft model")
    path = folder / "config.json"
    values = read_json(path)
    config = _parse_config(values, base.config, path)
    gptq = gptq_format(values, path)
    has_safetensors = any(folder.glob("*.safetensors"))
    found = open_shards(folder, gptq) if has_safetensors else _read_torch(folder)
    found = {name.removeprefix("model."): tensor for name, tensor in found.items()}
    if eagle3 := next((name for name in found if name.startswith("midlayer.") or name in ("d2t", "t2d")), None):
        raise EdgeError(f"{folder}: tensor {eagle3} is of an EAGLE-3 draft, which is not supported; use an EAGLE-2 one")
    found = {name: tensor for name, tensor in found.items() if not name.startswith("embed_tokens.")}
    _drop_zero_bias(found, folder)
    shapes = dict(_expected_shapes(config, base.config))
    if gptq is not None:
        found = open_gptq_tensors(found, gptq, shapes, folder)
    config = _without_missing_norms(config, found, folder)
    return DraftCheckpoint(folder, config, _select(found, dict(_expected_shapes(config, base.config)), folder))


def with_base(draft: DraftCheckpoint, base: Checkpoint, ids: np.ndarray | None) -> Checkpoint:
    """The draft's tensors beside those of the base that it uses; ids [V'] int32: the rows of the head that it has."""
    head = base.tensors[EMBEDDING if base.config.tie_word_embeddings else HEAD]
    if ids is not None:
        head = _rows_of(head, ids)
    tensors = {**draft.tensors, EMBEDDING: base.tensors[EMBEDDING], head.name: head}
    config = draft.config.layer_config(base.config)
    return Checkpoint(draft.path, "draft", config, tensors, text=None, generation={})


def _parse_config(values: dict[str, Any], base: ModelConfig, source: Path) -> DraftConfig:
    """What config.json says, held to the base."""
    refuse_unsupported(values, source)

    def integer(key: str, default: int | None) -> int:
        return int(json_field(values, key, INTEGER, default, source))

    hidden, heads = integer("hidden_size", None), integer("num_attention_heads", None)
    head_dim = integer("head_dim", hidden // max(heads, 1))
    for key, of_draft, of_base in (
        ("hidden_size", hidden, base.hidden_size),
        ("head_dim", head_dim, base.head_dim),
    ):
        if of_draft != of_base:
            raise EdgeError(
                f"{source}: {key} is {of_draft}, but the base model's is {of_base}; use a draft made for it"
            )
    kv_heads, width = integer("num_key_value_heads", heads), integer("intermediate_size", None)
    if min(heads, kv_heads, width) < 1 or heads % kv_heads:
        raise EdgeError(
            f"{source}: {heads} attention heads, {kv_heads} key-value heads and intermediate_size {width} must be "
            "positive, and the first a multiple of the second"
        )
    if (layers := integer("num_hidden_layers", 1)) != 1:
        raise EdgeError(f"{source}: num_hidden_layers is {layers}, but an EAGLE draft has one layer; use such a model")
    _check_mup(values, base, source)
    has_depth = values.get("scale_depth") is not None
    return DraftConfig(
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=float(json_field(values, "rms_norm_eps", NUMBER, 1e-6, source)),
        residual_scale=base.scale_depth / math.sqrt(base.num_hidden_layers + 1) if has_depth else 1.0,
        logit_scale=1 / base.logit_divisor,
    )


def _check_mup(values: dict[str, Any], base: ModelConfig, source: Path) -> None:
    """The scales are in both configurations, and equal, or in neither; without them a base has neutral ones, or 1."""
    neutral = neutral_mup(base.num_hidden_layers, base.hidden_size)
    for key in _MUP:
        of_base, given = getattr(base, key), json_field(values, key, NUMBER, 0, source)
        if values.get(key) is None and not any(math.isclose(of_base, absent) for absent in (neutral[key], 1.0)):
            raise EdgeError(f"{source}: {key} is missing, but the base model's is {of_base:g}; use a draft made for it")
        if values.get(key) is not None and not math.isclose(given, of_base, rel_tol=1e-5):
            raise EdgeError(
                f"{source}: {key} is {given:g}, but the base model's is {of_base:g}; use a draft made for it"
            )


def _read_torch(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of the only file of torch.save in the folder; lists of frequent tokens are none."""
    files = [
        path
        for path in sorted([*folder.glob("*.bin"), *folder.glob("*.pt")])
        if not path.name.startswith(("freq_", "training_args"))
    ]
    if len(files) != 1:
        raise EdgeError(
            f"{folder} has {len(files)} files of weights that could be the draft's; keep one: model.safetensors, or "
            "pytorch_model.bin"
        )
    state = load_torch_file(files[0])
    if not isinstance(state, dict) or not all(isinstance(array, np.ndarray) for array in state.values()):
        raise EdgeError(f"{files[0]} holds something else than tensors by their names; get the draft again")
    tensors = {}
    for name, array in state.items():
        types = (np.int32,) if name.endswith(INTEGER_SUFFIXES) else _TORCH_TYPES
        if array.dtype not in types and name not in ("d2t", "t2d"):
            raise EdgeError(f"{files[0]}: tensor {name} is stored as {array.dtype}, which is no type of weights")
        tensors[name] = LazyTensor(name, array.shape, array.dtype, array.dtype.name, array.__getitem__)
    return tensors


def _drop_zero_bias(found: dict[str, LazyTensor], source: Path) -> None:
    """Drafts may store a bias of fc that training left at zero."""
    bias = found.pop("fc.bias", None)
    if bias is not None and np.any(bias.read(slice(None))):
        raise EdgeError(f"{source}: tensor fc.bias is not zero, but MiniCPM's drafts have no bias; use one without")


def _expected_shapes(draft: DraftConfig, base: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The draft's tensors; norms that it lacks are left out."""
    hidden, width = base.hidden_size, draft.intermediate_size
    attended, kv_rows = draft.num_attention_heads * base.head_dim, draft.num_key_value_heads * base.head_dim
    yield "fc.weight", (hidden, 2 * hidden)
    if draft.has_input_norms:
        yield from ((name, (hidden,)) for name in INPUT_NORMS)
    if draft.has_attention_norm:
        yield ATTENTION_NORM, (hidden,)
    for part, rows in (("q", attended), ("k", kv_rows), ("v", kv_rows)):
        yield f"layers.0.self_attn.{part}_proj.weight", (rows, hidden)
    yield "layers.0.self_attn.o_proj.weight", (hidden, attended)
    yield "layers.0.post_attention_layernorm.weight", (hidden,)
    yield "layers.0.mlp.gate_proj.weight", (width, hidden)
    yield "layers.0.mlp.up_proj.weight", (width, hidden)
    yield "layers.0.mlp.down_proj.weight", (hidden, width)


def _without_missing_norms(config: DraftConfig, found: Mapping[str, LazyTensor], source: Path) -> DraftConfig:
    """Which norms there are decides whether they are used."""
    there = [name for name in INPUT_NORMS if name in found]
    if len(there) == 1:
        missing = next(name for name in INPUT_NORMS if name not in found)
        raise EdgeError(f"{source}: tensor {there[0]} is there, but {missing} is not; download the draft again")
    return replace(config, has_input_norms=bool(there), has_attention_norm=ATTENTION_NORM in found)


def _select(
    found: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]], source: Path
) -> dict[str, LazyTensor]:
    for name, shape in shapes.items():
        if (tensor := found.get(name)) is None:
            raise EdgeError(f"{source}: tensor {name} is missing; download the draft again")
        if tensor.shape != shape:
            raise EdgeError(
                f"{source}: tensor {name} has shape {list(tensor.shape)}, but the configurations of the draft and its "
                f"base ask for {list(shape)}; use a draft made for this base"
            )
    if unknown := next((name for name in found if name not in shapes), None):
        raise EdgeError(f"{source}: tensor {unknown} has no place in an EAGLE draft of one layer; use such a model")
    return {name: found[name] for name in shapes}


def _rows_of(head: LazyTensor, ids: np.ndarray) -> LazyTensor:
    """The rows `ids` of a matrix as a matrix of its own, with their codes if it has some."""

    def read(rows: slice) -> np.ndarray:
        return np.concatenate([head.read(slice(token, token + 1)) for token in ids[rows].tolist()])

    def read_codes(codes: Codes, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        parts = [codes.read(slice(token, token + 1)) for token in ids[rows].tolist()]
        return np.concatenate([part for part, _ in parts]), np.concatenate([scales for _, scales in parts])

    codes = None if head.codes is None else replace(head.codes, read=partial(read_codes, head.codes))
    return replace(head, name=PRUNED_HEAD, shape=(len(ids), *head.shape[1:]), read=read, codes=codes)
