"""Which page holds which tokens of which sequence. Knows nothing of tensors or devices."""

from __future__ import annotations

from edge.config import ModelConfig
from edge.errors import EdgeError
from plugins import PAGE_TOKENS

COMPRESSED_POOLS = ("c1_pool", "c2_pool")  # read for every token: their pages are never offloaded
KV_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of a value, by the types that a cache may have


def pages_for(tokens: int) -> int:
    """Pages that `tokens` tokens occupy."""
    return -(-tokens // PAGE_TOKENS)


def pool_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of one page in each pool of a layer: keys and values, and a sparse model's compressed keys.

    See plugins/infllmv2 for what lies where.
    """
    heads, dim = config.num_key_value_heads, config.head_dim
    if config.sparse is None:
        return {"kv_pool": (2, heads, PAGE_TOKENS, dim)}
    planes = 3 if config.sparse.use_nope else 2
    return {
        "kv_pool": (planes, heads, PAGE_TOKENS, dim),
        "c1_pool": (heads, 4, dim),
        "c2_pool": (heads, 1, dim),
    }


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
