"""What speculation did for one request."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Speculated:
    """Verified trees of a request: `steps` of them, with `proposed` nodes, `accepted` ones and `emitted` tokens.

    `lengths` counts the steps by how many tokens they emitted, `depths` by the levels of their trees. Tokens of prefill
    and of plain steps are in none of these: counting the reply's first token as a step of length 1 would bias the mean.
    """

    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    emitted: int = 0
    draft_seconds: float = 0.0
    lengths: Counter[int] = field(default_factory=Counter)
    depths: Counter[int] = field(default_factory=Counter)

    def add(self, proposed: int, emitted: int, draft_seconds: float = 0.0, depth: int | None = None) -> None:
        """A step verified `proposed` nodes on `depth` levels (None: a chain's), and emitted the accepted ones' tokens
        and one more.
        """
        self.steps += 1
        self.proposed += proposed
        self.accepted += emitted - 1
        self.emitted += emitted
        self.draft_seconds += draft_seconds
        self.lengths[emitted] += 1
        self.depths[proposed if depth is None else depth] += 1

    def merge(self, other: Speculated) -> None:
        """Count another request's steps, too."""
        self.steps += other.steps
        self.proposed += other.proposed
        self.accepted += other.accepted
        self.emitted += other.emitted
        self.draft_seconds += other.draft_seconds
        self.lengths += other.lengths
        self.depths += other.depths

    def values(self) -> dict[str, Any]:
        """Plain JSON values; `lengths` and `depths` by the number as text."""
        counted = {
            name: {str(number): count for number, count in sorted(counts.items())}
            for name, counts in (("lengths", self.lengths), ("depths", self.depths))
        }
        return {**vars(self), **counted, "mean_accept_length": self.mean_accept_length}

    @property
    def mean_accept_length(self) -> float:
        """Emitted tokens a verified tree; 1 if there was none, as of plain steps."""
        return self.emitted / self.steps if self.steps else 1.0
