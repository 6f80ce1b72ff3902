"""How many KV pages must be in memory while others are offloaded: on a device as many as a token may need at once."""

from __future__ import annotations

from edge.config import ModelConfig, SparseConfig
from edge.kv_cache import pages_for
from edge.memory.run import Run
from edge.plan import ALWAYS_DENSE
from plugins.offload.store import MINIMUM_SLOTS


def forced_pages(sparse: SparseConfig) -> int:
    """Pages that a token attends to whatever their scores: initial and local ones, and its own."""
    return sparse.init_blocks + sparse.local_blocks + 1


def token_pages(config: ModelConfig, sparse: SparseConfig, context: int) -> int:
    """Pages that one token may need at once: KV heads choose apart; below dense_len it attends to all there are."""
    chosen = config.num_key_value_heads * (sparse.selected_blocks - forced_pages(sparse))
    dense = pages_for(min(max(sparse.dense_len - 1, 0), context))
    return max(forced_pages(sparse) + chosen, dense, 2)  # 2: a token's own page, and one whose keys are averaged


def least_streamed(sparse: SparseConfig | None) -> int:
    """Pages in memory where the others are streamed through a few more: those that every token attends to stay."""
    is_dense = sparse is None or sparse.dense_len == ALWAYS_DENSE
    return MINIMUM_SLOTS + (0 if is_dense or sparse is None else forced_pages(sparse))


def least_slots(config: ModelConfig, sparse: SparseConfig, context: int) -> int:
    """Pages that must be on the device: any token's, beside the initial and local ones of a sequence, which stay."""
    return token_pages(config, sparse, context) + forced_pages(sparse)


def least_resident(config: ModelConfig, run: Run, *, on_cpu: bool) -> int | None:
    """Pages that must be in memory while others are elsewhere; None if all must be: dense attention on a device."""
    if on_cpu:
        return least_streamed(config.sparse)
    return None if config.sparse is None else run.sequences * least_slots(config, config.sparse, run.context)
