"""How a model is to run, as far as memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from edge.kv_cache import pages_for


@dataclass(frozen=True)
class Run:
    """How it runs: `sequences` of up to `context` tokens, `chunk` prompt tokens a step, logits of up to `rows` rows.

    packed: whether the processor multiplies pairs of bfloat16 and fours of int8 (plugins/ort/library.py knows).
    resident: KV pages in memory if the others are offloaded; None keeps all of them. spare: KV pages besides those of
    one whole context, if sequences share a pool; None: each has room for a context of its own.
    """

    context: int
    sequences: int = 1
    chunk: int = 512
    rows: int = 1
    threads: int = 1
    packed: bool = False
    resident: int | None = None
    spare: int | None = None

    @property
    def pages(self) -> int:
        """KV pages of all sequences."""
        if self.spare is not None:
            return pages_for(self.context) + self.spare
        return self.sequences * pages_for(self.context)

    @property
    def tokens(self) -> int:
        """Most tokens of a step: a prompt's chunk beside a token of every other sequence."""
        return self.chunk + self.sequences - 1
