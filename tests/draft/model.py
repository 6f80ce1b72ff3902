"""The EAGLE-2 draft of MiniCPM4 in torch (spec: quantization_and_speculation.md 4.1, 4.2), unrolled over its outputs.

Weights are a dict by the published names. Slot i takes the embedding of token i + 1 and the target's final-norm output
of token i; its output y, without a final norm, stands for that of token i + 1 and predicts token i + 2 through the
target's head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edge.config import ModelConfig
from tests.draft.target import rotary, rotate

Weights = dict[str, Tensor]
P = "layers.0"


def residual_scale(config: ModelConfig) -> float:
    """Factor on the attention's and MLP's output; `config` is the target's, and the draft counts as one layer more."""
    return float(config.scale_depth / (config.num_hidden_layers + 1) ** 0.5)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the draft of a target."""
    c = config
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {
        "fc.weight": (c.hidden_size, 2 * c.hidden_size),
        "input_norm1.weight": (c.hidden_size,),
        "input_norm2.weight": (c.hidden_size,),
        f"{P}.input_layernorm.weight": (c.hidden_size,),
        f"{P}.self_attn.q_proj.weight": (queries, c.hidden_size),
        f"{P}.self_attn.k_proj.weight": (keys, c.hidden_size),
        f"{P}.self_attn.v_proj.weight": (keys, c.hidden_size),
        f"{P}.self_attn.o_proj.weight": (c.hidden_size, queries),
        f"{P}.post_attention_layernorm.weight": (c.hidden_size,),
        f"{P}.mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
        f"{P}.mlp.up_proj.weight": (c.intermediate_size, c.hidden_size),
        f"{P}.mlp.down_proj.weight": (c.hidden_size, c.intermediate_size),
    }


def init_weights(config: ModelConfig, fc: Tensor, seed: int) -> Weights:
    """Trainable float32 weights with which y is `fc` [H, 2H] times both normed inputs: the layer adds nothing yet."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"fc.weight": fc.clone()}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros(shape)
        elif name != "fc.weight":
            weights[name] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    return {name: weights[name].requires_grad_() for name in shapes(config)}


@dataclass(frozen=True)
class Keys:
    """Rotated keys and values [..., Hkv, T, d] of the slots."""

    k: Tensor
    v: Tensor


def inputs(w: Weights, config: ModelConfig, embedded: Tensor, hidden: Tensor) -> Tensor:
    """z: both inputs [..., H], normed and joined."""
    x_e = F.rms_norm(embedded, embedded.shape[-1:], w["input_norm1.weight"], config.rms_norm_eps)
    x_h = F.rms_norm(hidden, hidden.shape[-1:], w["input_norm2.weight"], config.rms_norm_eps)
    # Under autocast too, what residuals are added to stays float32.
    return F.linear(torch.cat([x_e, x_h], -1), w["fc.weight"]).float()


def projected(w: Weights, config: ModelConfig, z: Tensor, positions: Tensor) -> tuple[Tensor, Keys]:
    """Rotated queries [..., Hq, T, d], and keys, of z [..., T, H]."""
    x = F.rms_norm(z, z.shape[-1:], w[f"{P}.input_layernorm.weight"], config.rms_norm_eps)
    q, k, v = (
        F.linear(x, w[f"{P}.self_attn.{name}_proj.weight"]).unflatten(-1, (-1, config.head_dim)).transpose(-3, -2)
        for name in "qkv"
    )
    cos, sin = rotary(positions, config)
    return rotate(q, cos, sin), Keys(rotate(k, cos, sin), v)


def finished(w: Weights, config: ModelConfig, z: Tensor, attended: Tensor) -> Tensor:
    """y [..., T, H] of z and the attention's output [..., Hq, T, d]."""
    r = residual_scale(config)
    z = z + r * F.linear(attended.transpose(-3, -2).flatten(-2), w[f"{P}.self_attn.o_proj.weight"])
    x = F.rms_norm(z, z.shape[-1:], w[f"{P}.post_attention_layernorm.weight"], config.rms_norm_eps)
    x = F.silu(F.linear(x, w[f"{P}.mlp.gate_proj.weight"])) * F.linear(x, w[f"{P}.mlp.up_proj.weight"])
    return z + r * F.linear(x, w[f"{P}.mlp.down_proj.weight"])


def unrolled(
    w: Weights, config: ModelConfig, embedded: Tensor, states: Tensor, pads: Tensor, begin: int, steps: int
) -> Iterator[Tensor]:
    """y [B, T - begin, H] of the slots from `begin` after 1, 2, ... draft steps.

    At step s a slot's hidden input is the output of step s - 1 at the slot before. `embedded` [B, T, H]: the embedding
    of token i + 1; `states` [B, T, H]: the target's output of token i; `pads` [B]: unused slots on the left. At step s
    slot i is the end of a draft that began at slot i - s + 1: it sees the keys of step 1 up to there, then one of each
    step. The first s - 1 slots of step s, whose drafts would begin before `begin`, have no meaning.
    """
    at = torch.arange(states.shape[1])
    z = inputs(w, config, embedded, states)
    q, past = projected(w, config, z, at)
    q, z, at_rows = q[:, :, begin:], z[:, begin:], at[begin:]
    later: list[Keys] = []
    for number in range(steps):
        seen = (at_rows[:, None] - number >= at) & (at >= pads[:, None, None])
        y = finished(w, config, z, _attend(q, past, later, seen[:, None, None]))
        yield y
        if number + 1 < steps:
            z = inputs(w, config, embedded[:, begin:], _shifted(y, 1))
            q, own = projected(w, config, z, at_rows)
            later = [*(Keys(_shifted(keys.k, 1), _shifted(keys.v, 1)) for keys in later), own]


def _attend(q: Tensor, past: Keys, later: list[Keys], seen: Tensor) -> Tensor:
    """Attention [B, Hq, R, d] over the keys `past`, masked by `seen` [B, 1, 1, R, T], and one of each in `later`."""
    kv_heads = past.k.shape[1]
    grouped = (q * q.shape[-1] ** -0.5).unflatten(1, (kv_heads, -1))
    scores = (grouped @ past.k[:, :, None].transpose(-1, -2)).float().masked_fill(~seen, -torch.inf)
    single = [(grouped * keys.k[:, :, None]).sum(-1, keepdim=True).float() for keys in later]
    shares = torch.cat([scores, *single], -1).softmax(-1).to(q.dtype)
    out = shares[..., : seen.shape[-1]] @ past.v[:, :, None]
    for number, keys in enumerate(later):
        out = out + shares[..., seen.shape[-1] + number, None] * keys.v[:, :, None]
    return out.flatten(1, 2)


def _shifted(x: Tensor, slots: int) -> Tensor:
    """`x` [..., T, n] moved to later slots; zeros come in."""
    return F.pad(x, (0, 0, slots, 0))[..., : x.shape[-2], :]
