"""How large the device executor's buffers are: what the host writes for a step, logits, pools and working memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge.bundle import Bundle
from edge.config import ModelConfig, SparseConfig
from edge.cuda import Pool
from edge.executors.offload import OffloadSizes, staging_bytes, table_values
from edge.executors.staging import Layout, layout_bytes
from edge.executors.tensorrt_engine import LoadedEngine
from edge.kv_cache import COMPRESSED_POOLS, pool_layout
from edge.memory.attended import token_pages
from plugins import PAGE_TOKENS

BURST = 16  # decode steps between two looks of the host
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)


@dataclass(frozen=True)
class Sizes:
    """What the buffers are made for: tokens of a step, sequences, rows of logits, pages of a sequence and in all.

    slots: pages on the device, if the others are offloaded; else None. verify: tokens of a sequence in a step that
    verifies trees and gives logits of all; 0 if the engine has no profile for it.
    """

    tokens: int
    sequences: int
    rows: int
    table_width: int
    pages: int
    slots: int | None = None
    verify: int = 0

    @property
    def verified(self) -> int:
        """Tokens of a step that verifies trees."""
        return self.verify * self.sequences

    @property
    def most_tokens(self) -> int:
        """Of any step."""
        return max(self.tokens, self.verified)

    @property
    def most_rows(self) -> int:
        """Of logits."""
        return max(self.rows, self.verified)


def pages_of(pool: str, sizes: Sizes) -> int:
    """Pages of a pool on the device."""
    return sizes.pages if pool in COMPRESSED_POOLS or sizes.slots is None else sizes.slots


def input_layout(sizes: Sizes, vocabulary: int) -> Layout:
    """What the host writes: a step's inputs, the parameters of the draw, and `count`, which a burst starts from 0."""
    sequences = (sizes.sequences,)
    integers: dict[str, tuple[int, ...]] = {
        "input_ids": (sizes.most_tokens,),
        "positions": (sizes.most_tokens,),
        "slots": (sizes.most_tokens,),
        "query_start": (sizes.sequences + 1,),
        "tree_start": sequences,
        "tree_mask": (sizes.most_tokens, 2),
        "logits_rows": (sizes.most_rows,),
        "switch_length": sequences,
        "page_table": (sizes.sequences, sizes.table_width),
        "top_k": sequences,
        "step": sequences,
        "count": sequences,
    }
    reals = dict.fromkeys(("temperature", "top_p", "min_p", "penalty"), sequences)
    return {
        **{name: (shape, _INT32) for name, shape in integers.items()},
        **{name: (shape, _FLOAT32) for name, shape in reals.items()},
        "seed": (sequences, np.dtype(np.uint64)),
        "seen": ((sizes.sequences, -(-vocabulary // 32)), np.dtype(np.uint32)),
    }


def offload_sizes(config: ModelConfig, sparse: SparseConfig, sizes: Sizes) -> OffloadSizes:
    most = token_pages(config, sparse, sizes.table_width * PAGE_TOKENS)
    return OffloadSizes(sizes.most_tokens, sizes.sequences, sizes.table_width, most)


def pinned_bytes(config: ModelConfig, sizes: Sizes) -> int:
    """Page-locked memory of the host that the executor has beside offloaded pages."""
    size = layout_bytes(input_layout(sizes, config.vocab_size)) + 4 * BURST * sizes.sequences
    size += 4 * sizes.most_rows * config.vocab_size
    if sizes.slots is not None and config.sparse is not None:
        offload = offload_sizes(config, config.sparse, sizes)
        size += staging_bytes(offload, config.num_key_value_heads, config.sparse.selected_blocks)
    return size


def pool_bytes(bundle: Bundle, engine: LoadedEngine, sizes: Sizes) -> int:
    """Size of the executor's pool, to the byte: what it takes, in its order."""
    config = bundle.config
    layout = pool_layout(config, bundle.manifest.types)
    kv = [pages_of(name, sizes) * page.nbytes for name, page in layout.items()]
    tables = [] if sizes.slots is None else [4 * table_values(sizes.sequences, sizes.table_width)]
    parts: Sequence[int] = [
        layout_bytes(input_layout(sizes, config.vocab_size)),
        4 * BURST * sizes.sequences,
        4 * sizes.most_rows * config.vocab_size,
        4 * sizes.most_rows,
        *kv * config.num_hidden_layers,
        *tables,
        engine.working_bytes,
    ]
    return Pool.bytes_for(parts)
