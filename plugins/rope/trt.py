"""edge.RopeTable and edge.LongRopeTable for TensorRT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from plugins.launch import Launch
from plugins.plugin import SimpleOperator, Tensor
from plugins.rope.launch import rope_table


@dataclass(frozen=True)
class RopeTable(SimpleOperator):
    """cos and sin [T, d / 2] of positions [T], from constants [d / 2] (plugins/rope/meaning.py)."""

    attention_factor: float

    NAME: ClassVar[str] = "RopeTable"
    INPUTS: ClassVar[tuple[str, ...]] = ("positions", "inverse_short", "frequency")
    OUTPUTS: ClassVar[tuple[str, ...]] = ("cos", "sin")

    def types(self) -> Mapping[str, str]:
        """Positions are int32, all else float32."""
        return {**dict.fromkeys((*self.INPUTS, *self.OUTPUTS), "float32"), "positions": "int32"}

    def shapes(self, inputs: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """[T, d / 2]."""
        return dict.fromkeys(self.OUTPUTS, (*inputs["positions"], inputs["frequency"][-1]))

    def launches(self, tensors: Mapping[str, Tensor], multiprocessors: int, tactic: int) -> list[Launch]:
        """One launch."""
        (tokens,), half = tensors["positions"].shape, tensors["frequency"].shape[-1]
        return [rope_table(tokens, half, 1, attention_factor=self.attention_factor)]


@dataclass(frozen=True)
class LongRopeTable(SimpleOperator):
    """The same with LongRoPE's two lists; a sequence longer than original_length takes the long one."""

    original_length: int
    attention_factor: float

    NAME: ClassVar[str] = "LongRopeTable"
    INPUTS: ClassVar[tuple[str, ...]] = (
        "positions",
        "query_start",
        "switch_length",
        "inverse_short",
        "inverse_long",
        "frequency",
    )
    OUTPUTS: ClassVar[tuple[str, ...]] = ("cos", "sin")

    def types(self) -> Mapping[str, str]:
        """Positions and lengths are int32, all else float32."""
        integers = ("positions", "query_start", "switch_length")
        return {**dict.fromkeys((*self.INPUTS, *self.OUTPUTS), "float32"), **dict.fromkeys(integers, "int32")}

    def shapes(self, inputs: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """[T, d / 2]."""
        return dict.fromkeys(self.OUTPUTS, (*inputs["positions"], inputs["frequency"][-1]))

    def launches(self, tensors: Mapping[str, Tensor], multiprocessors: int, tactic: int) -> list[Launch]:
        """One launch."""
        (tokens,), half = tensors["positions"].shape, tensors["frequency"].shape[-1]
        sequences = tensors["query_start"].shape[0] - 1
        return [rope_table(tokens, half, sequences, self.original_length, self.attention_factor)]
