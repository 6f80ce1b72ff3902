"""MiniCPM4's forward pass in numpy, a layer at a time, open where its linear layers take their inputs.

float32 throughout, dense attention (which is what InfLLM-V2 computes up to `dense_len`), by the operators' numpy
meanings. It exists to show every linear layer its inputs; for everything else there are the executors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from build_engine.checkpoint import Checkpoint, LazyTensor, require_finite
from edge.config import ModelConfig
from plugins.paged_attention.meaning import rotate
from plugins.rms_norm.meaning import rms_norm
from plugins.rope.meaning import rope_table, rope_tables
from plugins.swiglu.meaning import swiglu

# Linear layers in the order in which a token meets them; those of a stage read the same input.
STAGES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
LINEARS = tuple(name for names in STAGES.values() for name in names)
_CHUNK_BYTES = 64 << 20  # of an embedding, as float32


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `weights` maps the names of LINEARS to float32 [N, K] and may be changed between calls."""

    config: ModelConfig
    input_norm: np.ndarray
    post_norm: np.ndarray
    weights: dict[str, np.ndarray]

    def attention_input(self, hidden: np.ndarray) -> np.ndarray:
        """hidden [L, H] -> what q, k and v read."""
        return rms_norm(hidden, self.input_norm, self.config.rms_norm_eps)

    def attended(self, hidden: np.ndarray, rope: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """hidden [L, H], one sequence from its beginning -> [L, Hq d], what o reads."""
        c, x = self.config, self.attention_input(hidden)
        q, k, v = (self._linear(name, x).reshape(len(x), -1, c.head_dim) for name in STAGES["qkv"])
        return causal_attention(rotate(q, *rope), rotate(k, *rope), v, c.head_dim**-0.5)

    def after_attention(self, hidden: np.ndarray, attended: np.ndarray) -> np.ndarray:
        """The residual stream with o's output."""
        return hidden + np.float32(self.config.residual_scale) * self._linear("self_attn.o_proj", attended)

    def mlp_input(self, hidden: np.ndarray) -> np.ndarray:
        """hidden [L, H] after attention -> what gate and up read."""
        return rms_norm(hidden, self.post_norm, self.config.rms_norm_eps)

    def gated(self, hidden: np.ndarray) -> np.ndarray:
        """hidden [L, H] after attention -> [L, F], what down reads."""
        x = self.mlp_input(hidden)
        return swiglu(np.concatenate([self._linear(name, x) for name in STAGES["gate_up"]], axis=-1))

    def after_mlp(self, hidden: np.ndarray, gated: np.ndarray) -> np.ndarray:
        """The residual stream with down's output."""
        return hidden + np.float32(self.config.residual_scale) * self._linear("mlp.down_proj", gated)

    def forward(self, hidden: np.ndarray, rope: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The whole layer, [L, H] -> [L, H]."""
        hidden = self.after_attention(hidden, self.attended(hidden, rope))
        return self.after_mlp(hidden, self.gated(hidden))

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[name].T


def layer_tensors(index: int) -> dict[str, str]:
    """LINEARS -> the checkpoint's tensor names of one layer."""
    return {name: f"model.layers.{index}.{name}.weight" for name in LINEARS}


def load_layer(checkpoint: Checkpoint, index: int) -> Layer:
    """One layer of the checkpoint in float32."""
    norms = [
        read_float32(checkpoint.tensors[f"model.layers.{index}.{name}.weight"])
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    weights = {name: read_float32(checkpoint.tensors[tensor]) for name, tensor in layer_tensors(index).items()}
    return Layer(checkpoint.config, norms[0], norms[1], weights)


def read_float32(tensor: LazyTensor) -> np.ndarray:
    """A copy of the whole tensor; EdgeError names a value that is not finite."""
    values = np.empty(tensor.shape, np.float32)
    for start, rows in row_chunks(tensor):
        values[start : start + len(rows)] = rows
    return values


def row_chunks(tensor: LazyTensor) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of the tensor, at most 64 MiB of them as float32, checked for NaN and infinity."""
    step = max(1, _CHUNK_BYTES // (4 * math.prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0], step):
        rows = tensor.read(slice(start, start + step))
        require_finite(tensor.name, rows, start)
        yield start, rows
        tensor.release()


def embed(checkpoint: Checkpoint, ids: np.ndarray, out: np.ndarray) -> None:
    """Fill out [S, L, H] float32 with the scaled embeddings of ids [S, L]; the table is read once, in chunks."""
    scale = np.float32(checkpoint.config.scale_emb)
    for start, rows in row_chunks(checkpoint.tensors["model.embed_tokens.weight"]):
        for sequence, hidden in zip(ids, out, strict=True):
            inside = (sequence >= start) & (sequence < start + len(rows))
            hidden[inside] = rows[sequence[inside] - start].astype(np.float32) * scale


def rope_of_length(config: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [length, d / 2] of a sequence of `length` tokens, which selects LongRoPE's list."""
    ones = (1.0,) * (config.head_dim // 2)
    short, long, original = ones, ones, length
    if config.long_rope is not None:
        short, long = config.long_rope.short_factor, config.long_rope.long_factor
        original = config.long_rope.original_max_position_embeddings
    tables = rope_tables(config.rope_theta, short, long)
    bounds, positions = np.array([0, length]), np.arange(length)
    return rope_table(positions, bounds, np.array([length]), tables, original, config.rope_attention_factor)


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """q [L, Hq, d]; k, v [L, Hkv, d]; head h reads KV head h // G -> [L, Hq d]. A head at a time: L^2 floats."""
    length, heads, _ = q.shape
    group = heads // k.shape[1]
    future = np.triu(np.full((length, length), -np.inf, np.float32), 1)
    out = np.empty(q.shape, np.float32)
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].T
        scores *= np.float32(scale)
        scores += future
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        np.matmul(scores, v[:, head // group], out=out[:, head])
    return out.reshape(length, -1)
