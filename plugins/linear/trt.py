"""edge.PackedLinear and edge.PackedHead for TensorRT: layouts in plugins/linear/__init__.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plugins.launch import Launch
from plugins.linear.launch import GEMM_TOKENS, LinearShape, best_parts, gemm, gemv, head, linear, row_tile_choices
from plugins.plugin import Buffers, SimpleOperator, Tensor


@dataclass(frozen=True)
class PackedLinear(SimpleOperator):
    """y [T, n] = x [T, k] W^T, weights packed in `bits` bits with a scale for each `group` inputs (0: a row)."""

    bits: int
    group: int
    n: int
    k: int

    NAME: ClassVar[str] = "PackedLinear"
    INPUTS: ClassVar[tuple[str, ...]] = ("x", "weights", "scales")
    OUTPUTS: ClassVar[tuple[str, ...]] = ("y",)

    def types(self) -> Mapping[str, str]:
        """Packed words are int32, since TensorRT widens uint8 to int32 and knows no uint32."""
        scales = "float16" if self.group else "float32"
        return {"x": "element", "weights": "int32", "scales": scales, "y": "element"}

    def shapes(self, inputs: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """[T, n]."""
        return {"y": (inputs["x"][0], self.n)}

    def tactics(self) -> Sequence[int]:
        """1: by estimate. Then every block size there is; TensorRT times them where it builds on the device."""
        return range(1, 2 + len(self._gemv_tiles()) + len(self._gemm_tokens()))

    def launches(self, tensors: Mapping[str, Tensor], multiprocessors: int, tactic: int) -> list[Launch]:
        """One launch."""
        x, tiles, tokens = tensors["x"], self._gemv_tiles(), self._gemm_tokens()
        shape = LinearShape(x.shape[0], self.n, self.k, self.bits, self.group, x.element)
        choice = tactic - 2
        if choice < 0:
            return [linear(shape, multiprocessors)]
        return [gemv(shape, tiles[choice]) if choice < len(tiles) else gemm(shape, tokens[choice - len(tiles)])]

    def _gemv_tiles(self) -> tuple[int, ...]:
        return row_tile_choices(self.bits, self.group)

    def _gemm_tokens(self) -> tuple[int, ...]:
        return () if self.bits == 8 else GEMM_TOKENS


@dataclass(frozen=True)
class PackedHead(SimpleOperator):
    """logits [R, n] float32 = x [R, k] W^T, and token [R]: the lowest of the largest."""

    bits: int
    group: int
    n: int
    k: int

    NAME: ClassVar[str] = "PackedHead"
    INPUTS: ClassVar[tuple[str, ...]] = ("x", "weights", "scales")
    OUTPUTS: ClassVar[tuple[str, ...]] = ("logits", "token")

    def types(self) -> Mapping[str, str]:
        """Logits keep the sums' float32."""
        scales = "float16" if self.group else "float32"
        return {"x": "element", "weights": "int32", "scales": scales, "logits": "float32", "token": "int32"}

    def shapes(self, inputs: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """[R, n] and [R]."""
        rows = inputs["x"][0]
        return {"logits": (rows, self.n), "token": (rows,)}

    def scratch(self, tensors: Mapping[str, Tensor], multiprocessors: int) -> Buffers:
        """The best of each part of the vocabulary."""
        return {"best": ((tensors["x"].shape[0], best_parts(self.n), 2), np.dtype(np.int32))}

    def launches(self, tensors: Mapping[str, Tensor], multiprocessors: int, tactic: int) -> list[Launch]:
        """The product, then the argmax over its parts."""
        x = tensors["x"]
        return list(head(LinearShape(x.shape[0], self.n, self.k, self.bits, self.group, x.element)))
