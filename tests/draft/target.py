"""The target SmolLM2-135M-Instruct in torch, many texts at once: what it writes, and its hidden states.

In bfloat16 where only the draft learns from it; in float32, and tested against transformers, where acceptance is
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from build_engine.checkpoint import Checkpoint, open_checkpoint
from edge.config import ModelConfig
from tests.reference import llama_from_gguf
from tests.synthetic import smollm2_gguf_path

TOP_K = 50  # of sampled tokens
DROP_EVERY = 8  # steps between removals of finished rows


@dataclass(frozen=True)
class Text:
    """One text of the target: `ids` [T], the final norm's outputs `states` [T, H] float16, `first` written token.

    The last token may be an end token; ids[first:] were written by the target.
    """

    ids: Tensor
    states: Tensor
    first: int


@dataclass(frozen=True)
class Layer:
    """Weights of a layer, matrices that share an input side by side."""

    norm1: Tensor
    qkv: Tensor
    out: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Target:
    """`embedding` is the head too."""

    config: ModelConfig
    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor


def open_target() -> tuple[Checkpoint, PreTrainedModel]:
    """The checkpoint with its tokenizer, and its weights, dequantised, in transformers (float32)."""
    path = smollm2_gguf_path()
    checkpoint = open_checkpoint(path)
    return checkpoint, llama_from_gguf(path, checkpoint.config)


def batched_target(config: ModelConfig, model: PreTrainedModel, dtype: torch.dtype) -> Target:
    """The weights of `model` as `dtype`."""
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}

    def layer(p: str) -> Layer:
        def joined(*names: str) -> Tensor:
            return torch.cat([state[f"{p}.{name}.weight"] for name in names])

        return Layer(
            norm1=state[f"{p}.input_layernorm.weight"],
            qkv=joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            out=joined("self_attn.o_proj"),
            norm2=state[f"{p}.post_attention_layernorm.weight"],
            gate_up=joined("mlp.gate_proj", "mlp.up_proj"),
            down=joined("mlp.down_proj"),
        )

    layers = tuple(layer(f"model.layers.{i}") for i in range(config.num_hidden_layers))
    return Target(config, state["model.embed_tokens.weight"], layers, state["model.norm.weight"])


@dataclass
class Rows:
    """Texts being written: `pool` [layers, 2, B, Hkv, S, d], `pads` [B] unused places on the left, `length` in use."""

    pool: Tensor
    pads: Tensor
    length: int

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.pool, self.pads = self.pool[:, :, rows], self.pads[rows]


@torch.inference_mode()
def step(target: Target, rows: Rows, ids: Tensor) -> Tensor:
    """Append `ids` [B, T] to every row; the final norm's output [B, T, H]."""
    c, (batch, count) = target.config, ids.shape
    places = torch.arange(rows.length, rows.length + count)
    seen = torch.arange(rows.length + count)
    # Places left of a text see themselves only: a softmax over nothing would be nan.
    mask = (seen <= places[:, None]) & (seen >= rows.pads[:, None, None]) | (seen == places[:, None])
    mask = mask[:, None]
    if count == 1:
        mask = mask.expand(-1, 1, c.group_size, -1)
    cos, sin = rotary(places - rows.pads[:, None], c)
    h = F.embedding(ids, target.embedding)
    for i, layer in enumerate(target.layers):
        x = F.rms_norm(h, h.shape[-1:], layer.norm1, c.rms_norm_eps)
        heads = F.linear(x, layer.qkv).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        q, k, v = heads.split([c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads], 1)
        rows.pool[i, 0, :, :, rows.length : len(seen)] = rotate(k, cos, sin)
        rows.pool[i, 1, :, :, rows.length : len(seen)] = v
        k, v = rows.pool[i, 0, :, :, : len(seen)], rows.pool[i, 1, :, :, : len(seen)]
        q = rotate(q, cos, sin)
        if count == 1:  # the query heads of a group are as many rows on the same keys
            a = F.scaled_dot_product_attention(q.reshape(batch, -1, c.group_size, c.head_dim), k, v, attn_mask=mask)
            a = a.reshape(batch, 1, -1)
        else:
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)
        h = h + F.linear(a, layer.out)
        x = F.rms_norm(h, h.shape[-1:], layer.norm2, c.rms_norm_eps)
        gate, up = F.linear(x, layer.gate_up).chunk(2, -1)
        h = h + F.linear(F.silu(gate) * up, layer.down)
    rows.length += count
    return F.rms_norm(h, h.shape[-1:], target.norm, c.rms_norm_eps)


@torch.inference_mode()
def write(
    target: Target, prompts: Sequence[Sequence[int]], most: int, temperature: float, generator: torch.Generator
) -> list[Text]:
    """Continue every prompt until an end token or for `most` tokens; temperature 0 is greedy."""
    c, longest = target.config, max(map(len, prompts))
    pads = torch.tensor([longest - len(prompt) for prompt in prompts])
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    shape = (c.num_hidden_layers, 2, len(prompts), c.num_key_value_heads, longest + most, c.head_dim)
    rows = Rows(torch.zeros(shape, dtype=target.norm.dtype), pads, 0)
    h = step(target, rows, ids)
    written = [[list(prompt), [h[i, pads[i] :]]] for i, prompt in enumerate(prompts)]
    alive, going = torch.arange(len(prompts)), torch.ones(len(prompts), dtype=torch.bool)
    for number in range(most):
        tokens = _choose(F.linear(h[:, -1], target.embedding).float(), temperature, generator)
        for row in going.nonzero()[:, 0].tolist():
            written[alive[row]][0].append(int(tokens[row]))
        going &= ~torch.isin(tokens, torch.tensor(c.eos_token_ids))
        if not going.any() or number == most - 1:
            break
        if number % DROP_EVERY == 0 and not going.all():
            rows.keep(going)
            alive, tokens, going = alive[going], tokens[going], going[going]
        h = step(target, rows, tokens[:, None])
        for row in going.nonzero()[:, 0].tolist():
            written[alive[row]][1].append(h[row])
    return [
        Text(torch.tensor(text, dtype=torch.int32), torch.cat(states).to(torch.float16), len(prompt))
        for (text, states), prompt in zip(written, prompts, strict=True)
    ]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    best = logits.topk(TOP_K)
    picked = torch.multinomial((best.values / temperature).softmax(-1), 1, generator=generator)
    return best.indices.gather(1, picked)[:, 0]


def rotary(positions: Tensor, c: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 1, T, d/2] of positions [..., T], for tensors [..., heads, T, d]."""
    frequencies = 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
    angles = (positions[..., None] * frequencies)[..., None, :, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [..., heads, T, d] with its halves rotated against each other, in the type of `x`."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
