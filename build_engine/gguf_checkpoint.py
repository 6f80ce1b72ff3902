"""GGUF files of the architectures minicpm and llama, memory-mapped and dequantised by rows."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from build_engine.checkpoint import Checkpoint, Codes, LazyTensor, select_tensors, validate_config
from build_engine.gguf_tokenizer import special_token_ids, text_assets
from edge.config import LongRope, ModelConfig, neutral_mup
from edge.errors import EdgeError

_QUANTISED = (
    GgmlType.Q8_0,
    GgmlType.Q4_0,
    GgmlType.Q4_1,
    GgmlType.Q4_K,
    GgmlType.Q6_K,
    GgmlType.TQ1_0,
    GgmlType.TQ2_0,
)
_TERNARY = (GgmlType.TQ1_0, GgmlType.TQ2_0)
_PLAIN = {
    GgmlType.F32: np.dtype(np.float32),
    GgmlType.F16: np.dtype(np.float16),
    GgmlType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_ROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")


def open_gguf(path: Path) -> Checkpoint:
    """Open one .gguf file; EdgeError names the missing bytes, key or tensor."""
    metadata, stored = _read_file(path)
    config = _config(metadata, stored, path)
    tensors = {}
    for name, tensor in stored.items():
        if name in _ROPE_FACTORS and config.long_rope is not None:
            continue
        tensors[_hf_name(name)] = _lazy_tensor(tensor, config, path)
    text = text_assets(metadata, path)
    if text is not None and (count := len(metadata["tokenizer.ggml.tokens"])) > config.vocab_size:
        raise EdgeError(f"{path}: the tokenizer has {count} tokens but the embedding {config.vocab_size} rows")
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        tensors=select_tensors(tensors, config, path),
        text=text,
        generation={},
    )


class _StrictReader(gguf.GGUFReader):
    """GGUFReader reads past the end of a file without a word, or fails with whatever numpy says."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        end = offset + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise EdgeError(f"its header needs {end} bytes but the file ends after {len(self.data)}")
        return super()._get(offset, dtype, count, override_order)

    def _build_tensors(self, start_offs: int, fields: list[gguf.gguf_reader.ReaderField]) -> None:
        for field in fields:
            _, name, _, dims, ggml_type, offset = field.parts
            block, block_bytes = gguf.GGML_QUANT_SIZES[GgmlType(ggml_type[0])]
            end = start_offs + int(offset[0]) + math.prod(dims.tolist()) // block * block_bytes
            missing = end - len(self.data)
            if missing > 0:
                raise EdgeError(f"tensor {bytes(name).decode()} ends {missing} bytes after the end of the file")
        super()._build_tensors(start_offs, fields)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, gguf.gguf_reader.ReaderTensor]]:
    """Metadata as Python values, and the stored tensors by name."""
    try:
        reader = _StrictReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the reader raises Key-, Value-, Index-, Unicode- and other errors on garbage
        raise EdgeError(f"{path} is truncated or not a GGUF file: {error}; download it again") from error
    if reader.byte_order == "S":
        raise EdgeError(f"{path} is a big-endian GGUF file; convert it for little-endian machines")
    if _number(metadata, "split.count", 0, path) > 1:
        raise EdgeError(f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge")
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _config(metadata: Mapping[str, Any], stored: Mapping[str, Any], path: Path) -> ModelConfig:
    arch = metadata.get("general.architecture")
    if arch not in ("minicpm", "llama"):
        raise EdgeError(f"{path}: architecture {arch} is not supported; supported are minicpm and llama")
    if "rope_freqs.weight" in stored:
        raise EdgeError(f"{path}: tensor rope_freqs.weight is Llama 3's rope scaling, which is not supported")
    if "token_embd.weight" not in stored:
        raise EdgeError(f"{path}: tensor token_embd.weight is missing; download the file again")

    def number(key: str, default: float | None = None) -> Any:
        return _number(metadata, f"{arch}.{key}", default, path)

    hidden, heads = int(number("embedding_length")), int(number("attention.head_count"))
    layers, context = int(number("block_count")), int(number("context_length"))
    if min(hidden, heads, layers) < 1:
        raise EdgeError(f"{path}: embedding_length, head_count and block_count must be positive")
    head_dim = int(number("attention.key_length", hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise EdgeError(f"{path}: {arch}.{key} is {number(key)} but must equal the head size {head_dim}")
    bos, eos = special_token_ids(metadata, path)
    mup: dict[str, Any] = neutral_mup(layers, hidden)
    if arch == "minicpm":
        mup = _mup(metadata, layers, hidden, path)
    config = ModelConfig(
        hidden_size=hidden,
        intermediate_size=int(number("feed_forward_length")),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=int(number("attention.head_count_kv", heads)),
        head_dim=head_dim,
        vocab_size=int(stored["token_embd.weight"].shape[-1]),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=float(number("rope.freq_base", 10000.0)),
        max_position_embeddings=context,
        tie_word_embeddings="output.weight" not in stored,
        bos_token_id=bos,
        eos_token_ids=eos,
        long_rope=_long_rope(metadata, stored, arch, context, path),
        **mup,
    )
    validate_config(config, path)
    factor = number("rope.scaling.attn_factor", 1.0)
    if not math.isclose(factor, config.rope_attention_factor, rel_tol=1e-3):
        raise EdgeError(
            f"{path}: {arch}.rope.scaling.attn_factor is {factor} but the context lengths give "
            f"{config.rope_attention_factor}; only LongRoPE's own factor is supported"
        )
    return config


def _mup(metadata: Mapping[str, Any], layers: int, hidden: int, path: Path) -> dict[str, float]:
    """muP scales from minicpm.embedding_scale, residual_scale (scale_depth/sqrt(layers)) and logit_scale.

    logit_scale is hidden_size/dim_model_base, a divisor. Files older than the keys mean MiniCPM's constants
    (llama.cpp's own fallback for an absent logit_scale is inverted; spec: models_text_and_peers.md 2).
    """
    keys = [f"minicpm.{key}_scale" for key in ("embedding", "residual", "logit")]
    if not any(key in metadata for key in keys):
        return {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256.0}
    embedding, residual, logit = (_number(metadata, key, None, path) for key in keys)
    if logit <= 0:
        raise EdgeError(f"{path}: minicpm.logit_scale is {logit} but must be positive")
    return {
        "scale_emb": float(embedding),
        "scale_depth": _as_decimal(residual * math.sqrt(layers)),
        "dim_model_base": _as_decimal(hidden / logit),
    }


def _long_rope(
    metadata: Mapping[str, Any], stored: Mapping[str, Any], arch: str, context: int, path: Path
) -> LongRope | None:
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    scaled = [key for key in (f"{arch}.rope.scaling.factor", f"{arch}.rope.scale_linear") if key in metadata]
    if kind in ("none", "linear") and all(_number(metadata, key, None, path) in (0, 1) for key in scaled):
        return None
    if kind != "longrope" or arch != "minicpm":
        raise EdgeError(f"{path}: rope scaling {kind} is not supported for {arch}; only minicpm's longrope is")
    for name in _ROPE_FACTORS:
        if name not in stored or stored[name].tensor_type != GgmlType.F32:
            raise EdgeError(f"{path}: rope scaling is longrope but there is no F32 tensor {name}")
    short, long = (tuple(stored[name].data.tolist()) for name in _ROPE_FACTORS)
    original = _number(metadata, f"{arch}.rope.scaling.original_context_length", context, path)
    return LongRope(short, long, int(original))


def _hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name without one is returned as it is."""
    if name in _NAMES:
        return _NAMES[name]
    block, layer, rest = (*name.split(".", 2), "", "")[:3]
    if block == "blk" and rest in _LAYER_NAMES:
        return f"model.layers.{layer}.{_LAYER_NAMES[rest]}"
    return name


def _lazy_tensor(tensor: gguf.gguf_reader.ReaderTensor, config: ModelConfig, path: Path) -> LazyTensor:
    kind = tensor.tensor_type
    data = tensor.data.view(np.ndarray)
    mapping = getattr(tensor.data, "_mmap", None)  # the whole file's, under every tensor's view
    release = partial(mapping.madvise, mmap.MADV_DONTNEED) if mapping is not None else _nothing
    name = _hf_name(tensor.name)
    heads = {
        "q_proj.weight": config.num_attention_heads,
        "k_proj.weight": config.num_key_value_heads,
    }.get(name.rpartition("self_attn.")[2])
    rows = data.__getitem__ if heads is None else _hf_row_order(data, heads, path, tensor.name)
    if kind in _PLAIN:
        dtype = _PLAIN[kind]
        read = partial(_read_plain, rows, dtype)
    elif kind in _QUANTISED:
        dtype = np.dtype(np.float32)
        read = partial(_read_quantised, rows, kind)
    else:
        supported = ", ".join(t.name for t in (*_PLAIN, *_QUANTISED))
        raise EdgeError(f"{path}: tensor {tensor.name} is stored as {kind.name}; supported are {supported}")
    shape = tuple(int(size) for size in reversed(tensor.shape))
    codes = None
    if kind in _TERNARY:
        codes = Codes(2, gguf.GGML_QUANT_SIZES[kind][0], 1, partial(_read_ternary, rows, kind, name))
    return LazyTensor(name, shape, dtype, kind.name, read, release, codes)


def _nothing() -> None:
    """For a tensor that is not mapped."""


def _hf_row_order(data: np.ndarray, heads: int, path: Path, name: str) -> Callable[[slice], np.ndarray]:
    """Rows of q or k in Hugging Face's order.

    llama.cpp rotates neighbouring pairs, so its converters store row (head, half, i) of both architectures at
    (head, i, half).
    """
    count = len(data)
    if count % (2 * heads):
        raise EdgeError(f"{path}: tensor {name} has {count} rows, not a multiple of {heads} heads of even size")
    order = np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return lambda rows: data[order[rows]]


def _read_plain(stored: Callable[[slice], np.ndarray], dtype: np.dtype, rows: slice) -> np.ndarray:
    return stored(rows).view(dtype)


def _read_quantised(stored: Callable[[slice], np.ndarray], kind: GgmlType, rows: slice) -> np.ndarray:
    return gguf.quants.dequantize(stored(rows), kind)


def _read_ternary(
    stored: Callable[[slice], np.ndarray], kind: GgmlType, name: str, rows: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0, 1, 2 and a scale for each 256: what dequantising gives with a scale of 1, and the scale that was there.

    Both formats end their blocks with it, as float16. It may be 0 or negative, as no scale of `Codes` is.
    """
    packed = stored(rows)
    blocks = packed.reshape(len(packed), -1, gguf.GGML_QUANT_SIZES[kind][1]).copy()
    signed = blocks[..., -2:].copy().view(np.float16).astype(np.float32)
    blocks[..., -2:] = np.array([1], np.float16).view(np.uint8)
    signs = gguf.quants.dequantize(blocks.reshape(packed.shape), kind).reshape(*blocks.shape[:2], -1)
    if signs.size and signs.max() > 1:
        raise EdgeError(
            f"tensor {name} holds a code that is not -1, 0 or 1; the weights are damaged: download them again"
        )
    codes = (1 + signs * np.sign(signed)).astype(np.uint8).reshape(len(packed), -1)
    scales = np.abs(signed[..., 0])
    return codes, np.where(scales == 0, np.float32(1), scales)


def _number(metadata: Mapping[str, Any], key: str, default: float | None, path: Path) -> Any:
    value = metadata.get(key, default)
    if value is None:
        raise EdgeError(f"{path}: metadata key {key} is missing; convert the file again")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise EdgeError(f"{path}: metadata key {key} is {value!r:.60} but must be one number for all layers")
    return _as_decimal(value) if isinstance(value, float) else value


def _as_decimal(value: float) -> float:
    """The shortest decimal of float32 width, GGUF's: 9.999999747e-06 was 1e-05 in config.json."""
    return float(str(np.float32(value)))
