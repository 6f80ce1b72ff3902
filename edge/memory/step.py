"""Bytes that a step works in on the CPU: its tensors in the order in which ONNX Runtime takes and frees them.

The executor gives a step one region of fixed size (plugins/ort/memory.h). Gaps between tensors count as much as the
tensors do, so the size follows from running the schedule through the same first-fit rule.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from edge.config import ModelConfig
from edge.memory.weights import TABLE_BYTES, Matrix, StoredWeights, draft_matrices, matrices

_ALIGNMENT = 64


@dataclass
class Region:
    """plugins/ort/memory.h's Region: first fit, neighbouring gaps joined.

    peak: the end of the highest block so far.
    """

    peak: int = 0
    _gaps: list[tuple[int, int]] = field(default_factory=lambda: [(0, 1 << 62)])  # (offset, length), ascending
    _taken: dict[str, tuple[int, int]] = field(default_factory=dict)

    def take(self, name: str, size: int) -> None:
        """Give `name` the first gap that is long enough."""
        size = -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT
        index = next(i for i, (_, length) in enumerate(self._gaps) if length >= size)
        offset, length = self._gaps.pop(index)
        if length > size:
            insort(self._gaps, (offset + size, length - size))
        self._taken[name] = (offset, size)
        self.peak = max(self.peak, offset + size)

    def rename(self, old: str, new: str) -> None:
        """Call what was `old` `new`."""
        self._taken[new] = self._taken.pop(old)

    def give_back(self, name: str) -> None:
        """Free what `name` had."""
        insort(self._gaps, self._taken.pop(name))
        joined: list[tuple[int, int]] = []
        for offset, length in self._gaps:
            if joined and sum(joined[-1]) == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((offset, length))
        self._gaps = joined


@dataclass(frozen=True)
class _Node:
    """One operator of a step: what it makes, what it works in meanwhile, and what nobody needs after it."""

    makes: dict[str, int]
    workspace: int = 0
    frees: tuple[str, ...] = ()
    renames: dict[str, str] = field(default_factory=dict)


def step_bytes(
    config: ModelConfig, weights: StoredWeights, tokens: int, rows: int, *, gives_hidden: bool = False
) -> int:
    """The region that a step of `tokens` new tokens and `rows` rows of logits needs, float32 throughout.

    gives_hidden: whether the final norm's output of all rows is wanted, too.
    """
    return _peak(_schedule(config, weights, tokens, min(rows, tokens), gives_hidden))


def draft_step_bytes(layer: ModelConfig, weights: StoredWeights, tokens: int, rows: int) -> int:
    """The same of a draft model's step, whose results have buffers of their own."""
    return _peak(_draft_schedule(layer, weights, tokens, min(rows, tokens)))


def _peak(schedule: Iterator[_Node]) -> int:
    region = Region()
    for node in schedule:
        for name, size in node.makes.items():
            region.take(name, size)
        if node.workspace:
            region.take("workspace", node.workspace)
            region.give_back("workspace")
        for name in node.frees:
            region.give_back(name)
        for old, new in node.renames.items():
            region.rename(old, new)
    return region.peak


def _schedule(c: ModelConfig, weights: StoredWeights, tokens: int, rows: int, gives_hidden: bool) -> Iterator[_Node]:
    qkv, out, gate_up, down, head = matrices(c, weights)
    hidden = 4 * tokens * c.hidden_size
    table = 4 * tokens * c.head_dim // 2
    yield _Node({"cos": table, "sin": table, "angle": table}, frees=("angle",))
    yield from _embed(c, weights, tokens)
    yield _Node({"normed": hidden})
    for layer in range(min(c.num_hidden_layers, 3)):  # the third takes its blocks where the second did
        yield from _linear("qkv", "normed", qkv, tokens)
        yield _Node({"attended": 4 * tokens * out.columns}, frees=("qkv",))
        if layer == min(c.num_hidden_layers, 3) - 1 and not gives_hidden:
            tokens = rows
            yield _cut("attended", 4 * rows * out.columns)
            yield _cut("hidden", 4 * rows * c.hidden_size)
        yield from _after_attention(c, out, gate_up, down, tokens)
        yield from _add_norm(c, tokens)
    if gives_hidden:
        yield _cut("normed", 4 * rows * c.hidden_size)
    yield _Node({"scaled": 4 * rows * c.hidden_size}, frees=("hidden", "normed"))
    yield _Node({}, workspace=_workspace(head, rows), frees=("scaled",))  # the logits have a buffer of their own


def _draft_schedule(c: ModelConfig, weights: StoredWeights, tokens: int, rows: int) -> Iterator[_Node]:
    fc, qkv, out, gate_up, down, head = draft_matrices(c, weights)
    hidden, table = 4 * tokens * c.hidden_size, 4 * tokens * c.head_dim // 2
    yield _Node({"cos": table, "sin": table, "angle": table}, frees=("angle",))
    yield from _embed(c, weights, tokens)
    yield _Node({"token": hidden}, frees=("hidden",))
    yield _Node({"base": hidden})
    yield _Node({"both": 2 * hidden}, frees=("token", "base"))
    yield from _linear("hidden", "both", fc, tokens)
    yield _Node({"normed": hidden})
    yield from _linear("qkv", "normed", qkv, tokens)
    yield _Node({"attended": 4 * tokens * out.columns}, frees=("qkv",))
    yield _cut("attended", 4 * rows * out.columns)
    yield _cut("hidden", 4 * rows * c.hidden_size)
    yield from _after_attention(c, out, gate_up, down, rows)
    yield _Node({"scaled": 4 * rows * c.hidden_size}, frees=("hidden", "branch"))
    yield _Node({}, workspace=_workspace(head, rows), frees=("scaled",))


def _after_attention(c: ModelConfig, out: Matrix, gate_up: Matrix, down: Matrix, tokens: int) -> Iterator[_Node]:
    """A layer from its attention's projection to the MLP's branch, which is not added yet."""
    yield from _linear("branch", "attended", out, tokens)
    yield from _add_norm(c, tokens)
    yield from _linear("gate_up", "normed", gate_up, tokens)
    yield _Node({"gated": 4 * tokens * c.intermediate_size}, frees=("gate_up",))
    yield from _linear("branch", "gated", down, tokens)


def _embed(c: ModelConfig, weights: StoredWeights, tokens: int) -> Iterator[_Node]:
    """Rows of the table, as float32, times scale_emb; ONNX Runtime leaves out what changes nothing."""
    hidden = 4 * tokens * c.hidden_size
    yield _Node({"hidden": hidden * TABLE_BYTES[weights.embedding] // 4})
    if weights.embedding != "float32":
        yield _Node({"wide": hidden}, frees=("hidden",), renames={"wide": "hidden"})
    if weights.embedding == "int8" or c.scale_emb != 1:
        yield _Node({"scaled": hidden}, frees=("hidden",), renames={"scaled": "hidden"})


def _cut(name: str, size: int) -> _Node:
    """Only the rows that need logits go on."""
    return _Node({"rows": size}, frees=(name,), renames={"rows": name})


def _linear(name: str, source: str, matrix: Matrix, tokens: int) -> Iterator[_Node]:
    """x -> x W^T."""
    yield _Node({name: 4 * tokens * matrix.rows}, _workspace(matrix, tokens), (source,))


def _workspace(matrix: Matrix, tokens: int) -> int:
    """edge.BlockLinear rounds its input to int8 codes, with a scale and two sums for every block."""
    return tokens * matrix.blocks * (matrix.block + 12) if matrix.has_codes else 0


def _add_norm(c: ModelConfig, tokens: int) -> Iterator[_Node]:
    size = 4 * tokens * c.hidden_size
    yield _Node({"total": size, "normed": size}, frees=("hidden", "branch"), renames={"total": "hidden"})
