"""MiniCPM4's forward pass in torch with dense or InfLLM-V2 attention (spec: infllmv2.md 2, 3, 8).

Weights are a dict by Hugging Face name. Only the rows that are asked for go through the last layer's queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edge.config import ModelConfig, SparseConfig

Weights = dict[str, Tensor]
# (layer, q [B, Hq, R, d], k [B, Hkv, T, d], v, rows [B, R]) -> [B, Hq, R, d]
Attention = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]


def init_weights(config: ModelConfig, seed: int) -> Weights:
    """Trainable float32 weights: embeddings and head N(0, 0.1), matrices N(0, 1/inputs), norms 1."""
    generator = torch.Generator().manual_seed(seed)
    c, d = config, config.head_dim

    def matrix(rows: int, columns: int, std: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    weights = {
        name: matrix(c.vocab_size, c.hidden_size, 0.1) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    shapes = {
        "self_attn.q_proj": (c.num_attention_heads * d, c.hidden_size),
        "self_attn.k_proj": (c.num_key_value_heads * d, c.hidden_size),
        "self_attn.v_proj": (c.num_key_value_heads * d, c.hidden_size),
        "self_attn.o_proj": (c.hidden_size, c.num_attention_heads * d),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size),
    }
    for layer in range(c.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns) in shapes.items():
            weights[f"{prefix}.{name}.weight"] = matrix(rows, columns, columns**-0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{name}.weight"] = torch.ones(c.hidden_size)
    weights["model.norm.weight"] = torch.ones(c.hidden_size)
    return {name: tensor.requires_grad_() for name, tensor in weights.items()}


def forward(
    w: Weights, config: ModelConfig, ids: Tensor, positions: Tensor, rows: Tensor, attention: Attention
) -> Tensor:
    """Logits [B, R, vocab] after the tokens `rows` [B, R] of `ids` [B, T] at rotary `positions` [B, T]."""
    c, count = config, config.num_hidden_layers
    cos, sin = _rotary(positions, c.head_dim, c.rope_theta)
    everything = torch.arange(ids.shape[1]).expand_as(ids)
    h = w["model.embed_tokens.weight"][ids] * c.scale_emb
    for layer in range(count):
        p, wanted = f"model.layers.{layer}", rows if layer == count - 1 else everything
        x = F.rms_norm(h, h.shape[-1:], w[f"{p}.input_layernorm.weight"], c.rms_norm_eps)
        k = _rotate(_heads(x, w[f"{p}.self_attn.k_proj.weight"], c.head_dim), cos, sin)
        v = _heads(x, w[f"{p}.self_attn.v_proj.weight"], c.head_dim)
        if layer == count - 1:
            h, x, cos, sin = (_take(t, rows) for t in (h, x, cos, sin))
        q = _rotate(_heads(x, w[f"{p}.self_attn.q_proj.weight"], c.head_dim), cos, sin)
        out = attention(layer, q, k, v, wanted).transpose(1, 2).flatten(2)
        h = h + c.residual_scale * F.linear(out, w[f"{p}.self_attn.o_proj.weight"])
        x = F.rms_norm(h, h.shape[-1:], w[f"{p}.post_attention_layernorm.weight"], c.rms_norm_eps)
        x = F.silu(F.linear(x, w[f"{p}.mlp.gate_proj.weight"])) * F.linear(x, w[f"{p}.mlp.up_proj.weight"])
        h = h + c.residual_scale * F.linear(x, w[f"{p}.mlp.down_proj.weight"])
    h = F.rms_norm(h, h.shape[-1:], w["model.norm.weight"], c.rms_norm_eps)
    return F.linear(h / c.logit_divisor, w["lm_head.weight"])


def dense_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Causal attention of the queries at `rows` over all keys."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.arange(k.shape[2]) <= rows[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@dataclass(frozen=True)
class Selection:
    """`scores` [B, Hkv, R, blocks] before forcing, `forced` [B, 1, R, blocks], `chosen` [B, Hkv, R, blocks]."""

    scores: Tensor
    forced: Tensor
    chosen: Tensor


def select_blocks(q: Tensor, k: Tensor, rows: Tensor, sparse: SparseConfig) -> Selection:
    """Stage 1 of InfLLM-V2 for the queries at `rows` of a text of 128 tokens or more; ties go to the lower block."""
    batch, kv_heads, n, d = k.shape
    s, block = sparse.kernel_stride, sparse.block_size
    grouped = q.unflatten(1, (kv_heads, -1)) * d**-0.5
    blocks = -(-n // block)

    def pooled_logits(factor: int) -> Tensor:
        """[B, Hkv, G, R, windows]; a window that is not wholly past is -inf."""
        width, stride = factor * sparse.kernel_size, factor * s
        means = F.avg_pool1d(k.flatten(0, 1).transpose(1, 2), width, stride).transpose(1, 2).unflatten(0, (batch, -1))
        z = torch.einsum("bhgrd,bhjd->bhgrj", grouped, means)
        past = torch.arange(means.shape[2]) * stride + width - 1 <= rows[:, None, None, :, None]
        return z.masked_fill(~past, -torch.inf)

    normaliser = pooled_logits(4).logsumexp(-1, keepdim=True)
    # A row without any coarse window scores 0 everywhere.
    fine = (pooled_logits(1) - normaliser.masked_fill(normaliser.isinf(), torch.inf)).exp().sum(2)
    r = block // s
    padded = F.pad(fine, (1, r * blocks - fine.shape[-1]))
    scores = F.max_pool1d(padded.flatten(0, 2), r + 1, r).unflatten(0, fine.shape[:3])

    b, qb = torch.arange(blocks), (rows // block)[:, None, :, None]
    forced = ((b < sparse.init_blocks) | (b >= qb - sparse.window_size // block)) & (b <= qb)
    ranked = scores.detach().masked_fill(forced, torch.inf).masked_fill(b > qb, -torch.inf)
    budget = min(sparse.topk + sparse.window_size // block, blocks)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, True) & (b <= qb)
    return Selection(scores, forced, chosen)


def attend_selected(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, chosen: Tensor, block: int) -> Tensor:
    """Stage 2: softmax over the past tokens of the chosen blocks."""
    group, n = q.shape[1] // k.shape[1], k.shape[2]
    mask = chosen.repeat_interleave(block, -1)[..., :n] & (torch.arange(n) <= rows[:, None, :, None])
    k, v, mask = (t.repeat_interleave(group, 1) for t in (k, v, mask))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sparse_attention(sparse: SparseConfig, queries_at_once: int = 512) -> Attention:
    """InfLLM-V2 on every row of every layer."""

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        parts = []
        for part, at in zip(q.split(queries_at_once, 2), rows.split(queries_at_once, 1), strict=True):
            end = int(at.max()) + 1
            past_k, past_v = k[:, :, :end], v[:, :, :end]
            chosen = select_blocks(part, past_k, at, sparse).chosen
            parts.append(attend_selected(part, past_k, past_v, at, chosen, sparse.block_size))
        return torch.cat(parts, 2)

    return attention


def _heads(x: Tensor, weight: Tensor, head_dim: int) -> Tensor:
    return F.linear(x, weight).unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _take(t: Tensor, rows: Tensor) -> Tensor:
    return t.gather(1, rows[..., None].expand(-1, -1, t.shape[-1]))


def _rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, d/2]."""
    frequencies = 1 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = positions[..., None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
