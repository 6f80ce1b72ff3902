"""What a decode step must read, and what a prompt's token must multiply: the numerators of the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge.config import ModelConfig, SparseConfig
from edge.kv_cache import pool_layout
from edge.memory.ledger import page_bytes
from edge.memory.weights import StoredWeights, cpu_matrix_bytes, device_matrix_bytes, matrices
from plugins import PAGE_TOKENS


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decode step reads: weights, head, keys and values, compressed keys."""

    weights: float
    head: float
    kv: float
    compressed: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.head + self.kv + self.compressed


def attended(context: int, sparse: SparseConfig | None) -> tuple[int, int]:
    """Tokens whose keys and values a token at the end of `context` reads, and windows that it chooses them by.

    Dense attention reads all; sparse attention the selected blocks, chosen by an average of keys every 16 and every 64
    tokens, once there are more blocks than it selects (spec: infllmv2.md 5.2).
    """
    if sparse is None or not sparse.is_sparse(context):
        return context, 0
    selected = sparse.selected_blocks * sparse.block_size
    if context <= selected:
        return context, 0
    return selected, context // sparse.kernel_stride + context // (4 * sparse.kernel_stride)


def pool_bytes(
    config: ModelConfig, types: Mapping[str, str], context: int, sparse: SparseConfig | None
) -> tuple[float, float]:
    """Keys and values, and compressed keys, that one sequence's step at `context` reads, in the cache's own types."""
    tokens, windows = attended(context, sparse)
    values, _ = page_bytes(config, types)
    compressed = pool_layout(config, types).get("c2_pool")  # of a page: one window's keys
    window = 0 if compressed is None else config.num_hidden_layers * compressed.nbytes
    return values * tokens / PAGE_TOKENS, float(window * windows)


def weight_bytes(config: ModelConfig, weights: StoredWeights, *, on_cpu: bool) -> tuple[int, int]:
    """Stored bytes of a model's projections, and of its head; norms and an embedding row are below a thousandth."""
    *projections, head = matrices(config, weights)
    count = cpu_matrix_bytes if on_cpu else device_matrix_bytes
    return count(projections), count([head])


def prompt_flops(config: ModelConfig, prompt_tokens: int, sparse: SparseConfig | None) -> float:
    """Operations a token of a prompt of this length, at least, on average over the prompt.

    2 a weight of the projections, and 4 d a query head, layer and key attended to. The head runs once a prompt; the
    choice of blocks is left out.
    """
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (config.head_dim * heads + 3 * config.intermediate_size)
    most, _ = attended(prompt_tokens, sparse)
    below = most * (most + 1) / 2  # tokens that see all before them
    keys = (below + (prompt_tokens - most) * most) / prompt_tokens
    attention = 4 * config.num_attention_heads * config.head_dim * keys
    return config.num_hidden_layers * (2 * layer + attention)
