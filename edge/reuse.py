"""Which cached tokens equal those that a run without a cache would compute.

Besides the token ids, the length that a step is given (`StepBatch.switch_length`) decides: LongRoPE's list rotates the
keys, and attention is dense or sparse. A step's length is the whole prompt's until the context outgrows it, so a reply
may change both on its way; a sequence therefore records how each of its tokens was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge.config import ModelConfig, SparseConfig
from plugins import PAGE_TOKENS


@dataclass(frozen=True)
class Mode:
    """How a token was computed: rotated by LongRoPE's long list, attending to chosen blocks."""

    is_long: bool
    is_sparse: bool


Runs = list[tuple[int, Mode]]  # (first token, mode of it and those after it), in order of tokens


@dataclass(frozen=True)
class Modes:
    """The modes of one engine: its model's lists and the sparse attention in force."""

    config: ModelConfig
    sparse: SparseConfig | None

    def of(self, length: int) -> Mode:
        """The mode of a step whose switch_length is `length`."""
        return Mode(self.config.rope_is_long(length), self.sparse is not None and self.sparse.is_sparse(length))

    @property
    def indifferent_tokens(self) -> int:
        """The first tokens of a sequence: they see no more blocks than are selected, so sparse attention is dense."""
        return 0 if self.sparse is None else self.sparse.selected_blocks * self.sparse.block_size

    def alike(self, runs: Runs, mode: Mode, tokens: int) -> int:
        """How many of the first `tokens` tokens were computed as in `mode`, they and all before them."""
        if not runs:
            return 0
        ends = [start for start, _ in runs[1:]] + [tokens]
        for (start, other), end in zip(runs, ends, strict=True):
            if other.is_long != mode.is_long:
                return min(start, tokens)
            if other.is_sparse != mode.is_sparse and min(end, tokens) > self.indifferent_tokens:
                return min(max(start, self.indifferent_tokens), tokens)
        return tokens

    def cuts(self, prompt_length: int, length: int) -> tuple[int, ...]:
        """Where the mode changes in a reply that made a prompt a sequence of `length` tokens, one by one."""
        if self.of(prompt_length) == self.of(length):
            return ()
        return tuple(i for i in range(prompt_length, length) if self.of(max(i, prompt_length)) != self.of(i + 1))

    def salt(self, mode: Mode, index: int) -> bytes:
        """What tells a sequence's page `index` from one of the same tokens computed otherwise."""
        is_indifferent = (index + 1) * PAGE_TOKENS <= self.indifferent_tokens
        return bytes([mode.is_long, 2 if is_indifferent else mode.is_sparse])

    def salt_of(self, runs: Runs, index: int) -> bytes | None:
        """`salt` of a page that was computed; None if it or an earlier one was computed in two ways."""
        end = (index + 1) * PAGE_TOKENS
        mode = next(mode for start, mode in reversed(runs) if start < end)
        return self.salt(mode, index) if self.alike(runs, mode, end) == end else None


def record(runs: Runs, start: int, mode: Mode) -> None:
    """Note that tokens from `start` on, and none after them, are computed in `mode`."""
    while runs and runs[-1][0] >= start:
        runs.pop()
    if not runs or runs[-1][1] != mode:
        runs.append((start, mode))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
