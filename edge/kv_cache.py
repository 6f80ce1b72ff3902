"""Which page holds which tokens of which sequence. Knows nothing of tensors or devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edge.config import ModelConfig
from edge.errors import EdgeError
from plugins import PAGE_TOKENS

KV_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # of a value, by the types that a cache may have


@dataclass(frozen=True)
class PoolSpec:
    """One page of a pool: its shape, and its elements' type as numpy calls it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Of the page."""
        return math.prod(self.shape) * KV_BYTES[self.dtype]


def pages_for(tokens: int) -> int:
    """Pages that `tokens` tokens occupy."""
    return -(-tokens // PAGE_TOKENS)


def pool_layout(config: ModelConfig, types: Mapping[str, str]) -> dict[str, PoolSpec]:
    """The pools of a layer, in the operators' order: keys and values, int8 ones' scales, a sparse model's compressed
    keys, which have 16 bits beside int8.

    types: 'activation' and 'kv', as in a bundle's manifest. See plugins/infllmv2 for what lies where.
    """
    heads, dim, kv = config.num_key_value_heads, config.head_dim, types["kv"]
    planes = 3 if config.sparse is not None and config.sparse.use_nope else 2
    pools = {"kv_pool": PoolSpec((planes, heads, PAGE_TOKENS, dim), kv)}
    if kv == "int8":
        pools["kv_scales"] = PoolSpec((planes, heads, PAGE_TOKENS), "float32")
    if config.sparse is not None:
        compressed = compressed_type(types)
        pools |= {"c1_pool": PoolSpec((heads, 4, dim), compressed), "c2_pool": PoolSpec((heads, 1, dim), compressed)}
    return pools


def compressed_type(types: Mapping[str, str]) -> str:
    """Of compressed keys: the cache's, or beside int8 the activations', or bfloat16 where those are float32."""
    if types["kv"] != "int8":
        return types["kv"]
    return "bfloat16" if types["activation"] == "float32" else types["activation"]


class KVCache:
    """Hands out the pages of one pool to sequences; a page belongs to exactly one sequence or is free."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._pages: dict[int, list[int]] = {}
        self._next_id = 0

    @property
    def free_pages(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    def open(self) -> int:
        """A new, empty sequence."""
        self._next_id += 1
        self._pages[self._next_id] = []
        return self._next_id

    def pages(self, sequence: int) -> tuple[int, ...]:
        """The sequence's pages in token order."""
        return tuple(self._pages[sequence])

    def reserve(self, sequence: int, tokens: int) -> None:
        """Make room for the first `tokens` tokens of the sequence; takes all the pages it needs or none."""
        owned = self._pages[sequence]
        missing = pages_for(tokens) - len(owned)
        if missing > len(self._free):
            raise EdgeError(
                f"{tokens} tokens need {missing} more KV pages of {PAGE_TOKENS} tokens and {len(self._free)} are free; "
                "shorten the prompt, or give more --memory or --context"
            )
        owned.extend(self._free.pop() for _ in range(missing))

    def truncate(self, sequence: int, tokens: int) -> None:
        """Forget all but the first `tokens` tokens; whole pages past them become free."""
        owned = self._pages[sequence]
        while len(owned) > pages_for(tokens):
            self._free.append(owned.pop())

    def close(self, sequence: int) -> None:
        """Free the sequence's pages; the sequence is gone."""
        self.truncate(sequence, 0)
        del self._pages[sequence]
