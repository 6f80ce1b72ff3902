"""Independent forward passes to compare with: transformers in float32, fed from the files and not by our readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from edge.config import ModelConfig

State = dict[str, torch.Tensor]


def read_safetensors(folder: Path) -> State:
    """Every tensor of a Hugging Face folder, widened to float32."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}


def granite(config: ModelConfig, state: State) -> PreTrainedModel:
    """MiniCPM4 as a Granite: the muP scales become its multipliers, the weights stay as they are."""
    model = GraniteForCausalLM(
        GraniteConfig(
            **_shared(config),
            head_dim=config.head_dim,
            embedding_multiplier=config.scale_emb,
            residual_multiplier=config.scale_depth / config.num_hidden_layers**0.5,
            logits_scaling=config.hidden_size / config.dim_model_base,
            attention_multiplier=config.head_dim**-0.5,
        )
    )
    return _fill(model, state, config.tie_word_embeddings)


def folded_llama(config: ModelConfig, state: State) -> PreTrainedModel:
    """MiniCPM4 as an untied Llama: the muP scales are multiplied into the weights beside them."""
    embedding = state["model.embed_tokens.weight"]
    head = state.get("lm_head.weight", embedding)
    folded = state | {
        "model.embed_tokens.weight": embedding * config.scale_emb,
        "lm_head.weight": head / (config.hidden_size / config.dim_model_base),
    }
    for name in state:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            folded[name] = state[name] * (config.scale_depth / config.num_hidden_layers**0.5)
    shared = _shared(config) | {"tie_word_embeddings": False}
    return _fill(LlamaForCausalLM(LlamaConfig(**shared, head_dim=config.head_dim)), folded, tied=False)


def llama_from_gguf(path: Path, config: ModelConfig) -> PreTrainedModel:
    """A Llama filled with the dequantised tensors of a GGUF file, tied embedding."""
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        *block, role, _ = tensor.name.split(".")
        if role in ("attn_q", "attn_k"):
            # llama.cpp interleaves the two halves of every head; transformers rotates them as halves.
            values = values.reshape(-1, config.head_dim // 2, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        state[f"{prefix}{names[role]}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
    model = LlamaForCausalLM(LlamaConfig(**_shared(config), head_dim=config.head_dim))
    return _fill(model, state, tied=True)


def reference_logits(model: PreTrainedModel, ids: Sequence[int]) -> np.ndarray:
    """Logits [len(ids), vocab] float32 of one sequence."""
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).logits[0].numpy()


def reference_loss(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of ids[1:]."""
    with torch.inference_mode():
        batch = torch.tensor([list(ids)])
        return float(model(batch, labels=batch).loss)


def greedy_tokens(model: PreTrainedModel, ids: Sequence[int], count: int) -> list[int]:
    """`count` tokens after `ids`, the likeliest every time; end tokens do not stop it."""
    with torch.inference_mode():
        out = model.generate(torch.tensor([list(ids)]), do_sample=False, max_new_tokens=count, min_new_tokens=count)
    return out[0, len(ids) :].tolist()


def _shared(c: ModelConfig) -> dict[str, Any]:
    """The configuration fields that Llama and Granite have in common."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.long_rope is not None:
        original = c.long_rope.original_max_position_embeddings
        rope = {
            "rope_type": "longrope",
            "rope_theta": c.rope_theta,
            "short_factor": list(c.long_rope.short_factor),
            "long_factor": list(c.long_rope.long_factor),
            "original_max_position_embeddings": original,
            # spec: infllmv2.md 2
            "attention_factor": (1 + np.log(max(1.0, c.max_position_embeddings / original)) / np.log(original)) ** 0.5,
        }
    return {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }


def _fill(model: PreTrainedModel, state: State, tied: bool) -> PreTrainedModel:
    """Load every weight; a name too many or too few is an error."""
    if tied:
        state = state | {"lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state, strict=True)
    return model.eval()
