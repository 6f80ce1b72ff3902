"""An EAGLE draft in numpy, float64, row by row and by the letter of quantization_and_speculation.md 4.1.

It knows neither pages nor masks: a row is told which earlier slots it sees.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from edge.config import ModelConfig

Array = np.ndarray


def rms(x: Array, weight: Array | None, eps: float) -> Array:
    """No weight: no norm."""
    return x if weight is None else x / np.sqrt((x * x).mean() + eps) * weight


@dataclass
class DraftReference:
    """One sequence. weights: the draft's by their published names, and the base's embedding and head rows [V', H]."""

    base: ModelConfig
    weights: dict[str, Array]
    embedding: Array
    head: Array
    heads: int
    kv_heads: int
    eps: float
    logit_scale: float
    window_blocks: int = 16
    is_long: bool = False
    cache: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def row(self, token: int, hidden: Array, position: int, slot: int, seen: Iterable[int]) -> tuple[Array, Array]:
        """(logits [V'], y [H]) of a row that is stored at `slot` and sees the slots `seen` and itself."""
        w = {name: array.astype(np.float64) for name, array in self.weights.items()}
        x_e = rms(self.embedding[token].astype(np.float64) * self.base.scale_emb, w.get("input_norm1.weight"), self.eps)
        x_h = rms(hidden.astype(np.float64), w.get("input_norm2.weight"), self.eps)
        size = len(x_e)
        z = w["fc.weight"][:, :size] @ x_e + w["fc.weight"][:, size:] @ x_h
        r = self.base.scale_depth / np.sqrt(self.base.num_hidden_layers + 1)
        a = self._attention(w, rms(z, w.get("layers.0.input_layernorm.weight"), self.eps), position, slot, seen)
        z1 = z + r * a
        x = rms(z1, w["layers.0.post_attention_layernorm.weight"], self.eps)
        gate = w["layers.0.mlp.gate_proj.weight"] @ x
        m = w["layers.0.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * (w["layers.0.mlp.up_proj.weight"] @ x))
        y = z1 + r * m
        return self.head.astype(np.float64) @ (y * self.logit_scale), y

    def _attention(self, w: dict[str, Array], x: Array, position: int, slot: int, seen: Iterable[int]) -> Array:
        dim = self.base.head_dim
        q, k, v = ((w[f"layers.0.self_attn.{p}_proj.weight"] @ x).reshape(-1, dim) for p in "qkv")
        self.cache[slot] = (self._rotate(k, position), v)
        nearest = position // 64 - self.window_blocks
        slots = sorted(j for j in {*seen, slot} if j // 64 > nearest)
        out = []
        for head, query in enumerate(self._rotate(q, position)):
            keys = np.stack([self.cache[j][0][head // (self.heads // self.kv_heads)] for j in slots])
            values = np.stack([self.cache[j][1][head // (self.heads // self.kv_heads)] for j in slots])
            scores = keys @ query / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out.append(weights @ values / weights.sum())
        return np.asarray(w["layers.0.self_attn.o_proj.weight"] @ np.concatenate(out))

    def _rotate(self, x: Array, position: int) -> Array:
        """Half rotation, by the base's frequencies."""
        half = self.base.head_dim // 2
        factors = np.ones(half)
        if (rope := self.base.long_rope) is not None:
            factors = np.array(rope.long_factor if self.is_long else rope.short_factor)
        angle = position / factors / self.base.rope_theta ** (np.arange(half) / half)
        cos, sin = (f(angle) * self.base.rope_attention_factor for f in (np.cos, np.sin))
        first, second = x[:, :half], x[:, half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
