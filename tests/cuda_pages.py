"""KV pools with a past, for tests of attention over pages."""

from __future__ import annotations

import numpy as np

from plugins import PAGE_TOKENS
from plugins.paged_attention.pages import Step


def past_pool(
    rng: np.random.Generator, step: Step, planes: int, kv_heads: int, head_dim: int, dtype: np.dtype
) -> np.ndarray:
    """A pool with random keys and values for the past of every sequence, NaN elsewhere."""
    pool = np.full((step.pages, planes, kv_heads, PAGE_TOKENS, head_dim), np.nan, np.float32)
    for b in range(step.sequences):
        rows = step.rows(b)
        past = step.slots[rows[0]] if len(rows) else 0
        for i in range(past):
            pool[step.page_table[b, i // PAGE_TOKENS], :, :, i % PAGE_TOKENS] = rng.normal(
                size=(planes, kv_heads, head_dim)
            )
    return pool.astype(dtype)
