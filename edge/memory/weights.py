"""Bytes of a model's weights: in a bundle for the CPU, and in a TensorRT engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edge.config import ModelConfig
from plugins.tile_linear.pack import TILE_ROWS

TABLE_BYTES = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}  # of a value of the embedding
BITS = {"exact": 16, "fp16": 16, "w4a16": 4, "ternary": 2, "int8": 8, "int4": 4}
_ROW_BLOCK = 128  # inputs that share a scale in a CPU's operator if the format has one for a whole row


@dataclass(frozen=True)
class StoredWeights:
    """How a bundle stores its weights (build_engine/formats.py says what there is). embedding: its values' type."""

    kind: str
    group_size: int
    symmetric: bool
    head: str
    head_group_size: int
    embedding: str = "bfloat16"

    @property
    def is_asymmetric(self) -> bool:
        """Whether groups keep a minimum; ternary ones never do, whatever `symmetric` says."""
        return self.kind == "w4a16" and not self.symmetric

    @property
    def value_bytes(self) -> int:
        """Of a weight that is no code: the checkpoint's own are as wide as its embedding's."""
        return 4 if self.kind == "exact" and self.embedding == "float32" else 2

    @property
    def stored_head(self) -> str:
        """How the head is stored: of 16-bit weights as they are, whatever `head` says."""
        return self.kind if BITS[self.kind] == 16 else self.head

    @staticmethod
    def from_manifest(weights: Mapping[str, Any], types: Mapping[str, str]) -> StoredWeights:
        """Of a manifest's `weights` and `types`; KeyError if something is missing."""
        names = ("kind", "group_size", "symmetric", "head", "head_group_size")
        return StoredWeights(**{name: weights[name] for name in names}, embedding=types["embedding"])


@dataclass(frozen=True)
class Matrix:
    """`count` matrices of the model that are multiplied with: stored as BITS says, a scale for every `group` inputs.

    value_bytes: of one that is no code, on the CPU.
    """

    rows: int
    columns: int
    stored: str
    group: int
    value_bytes: int
    symmetric: bool = True
    count: int = 1

    @property
    def has_codes(self) -> bool:
        """Whether it is codes and scales rather than numbers."""
        return BITS[self.stored] < 16

    @property
    def values(self) -> int:
        """Weights of one."""
        return self.rows * self.columns

    @property
    def block(self) -> int:
        """Inputs that share a scale on the CPU."""
        return self.group or _ROW_BLOCK

    @property
    def blocks(self) -> int:
        """Scales of a row on the CPU."""
        return -(-self.columns // self.block)


def matrices(config: ModelConfig, weights: StoredWeights) -> Iterator[Matrix]:
    """What a step multiplies with, the head last."""
    c = config
    attended, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = (
        (attended + 2 * kv, c.hidden_size),
        (c.hidden_size, attended),
        (2 * c.intermediate_size, c.hidden_size),
        (c.hidden_size, c.intermediate_size),
    )
    for rows, columns in shapes:
        yield _projection(rows, columns, weights, c.num_hidden_layers)
    yield Matrix(c.vocab_size, c.hidden_size, weights.stored_head, weights.head_group_size, weights.value_bytes)


def draft_matrices(layer: ModelConfig, weights: StoredWeights) -> Iterator[Matrix]:
    """What a step of a draft model multiplies with: fc, which joins its inputs, and those of its layer and head."""
    size = layer.hidden_size
    yield _projection(size, 2 * size, weights)
    yield from matrices(layer, weights)


def _projection(rows: int, columns: int, weights: StoredWeights, count: int = 1) -> Matrix:
    symmetric = not weights.is_asymmetric
    return Matrix(rows, columns, weights.kind, weights.group_size, weights.value_bytes, symmetric, count)


def cpu_weight_bytes(config: ModelConfig, weights: StoredWeights) -> int:
    """What ONNX Runtime's CPU provider reads of a model, all of it where the bundle's file has it."""
    table = config.vocab_size * config.hidden_size * TABLE_BYTES[weights.embedding]
    return table + cpu_matrix_bytes(matrices(config, weights))


def cpu_matrix_bytes(multiplied: Iterable[Matrix]) -> int:
    """Codes with float32 scales and float16 offsets, or numbers; rows are padded to whole tiles."""
    total = 0
    for m in multiplied:
        width = m.columns * m.value_bytes
        if m.has_codes:
            width = m.blocks * (m.block * BITS[m.stored] // 8 + (4 if m.symmetric else 6))
        total += m.count * -(-m.rows // TILE_ROWS) * TILE_ROWS * width
    return total


def device_weight_bytes(config: ModelConfig, weights: StoredWeights) -> int:
    """What a TensorRT engine of this format holds: codes with float16 scales, a float16 embedding, all else float16.

    An exact head that is the embedding's own table is held once.
    """
    is_shared = config.tie_word_embeddings and BITS[weights.stored_head] == 16
    table = 0 if is_shared else config.vocab_size * config.hidden_size * 2
    return table + device_matrix_bytes(matrices(config, weights))


def device_matrix_bytes(multiplied: Iterable[Matrix]) -> int:
    """Codes with their scales, or float16 values."""
    total = 0
    for m in multiplied:
        scales = 2 * m.rows * (m.columns // m.group if m.group else 1) if m.has_codes else 0
        total += m.count * (m.values * BITS[m.stored] // 8 + scales)
    return total
