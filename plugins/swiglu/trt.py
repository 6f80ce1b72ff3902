"""edge.SwiGLU for TensorRT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from plugins.launch import Launch
from plugins.plugin import SimpleOperator, Tensor
from plugins.swiglu.launch import swiglu


@dataclass(frozen=True)
class SwiGLU(SimpleOperator):
    """y [T, width] of gate_up [T, 2 width]."""

    NAME: ClassVar[str] = "SwiGLU"
    INPUTS: ClassVar[tuple[str, ...]] = ("gate_up",)
    OUTPUTS: ClassVar[tuple[str, ...]] = ("y",)

    def shapes(self, inputs: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """Half as wide; the width is known when an engine is built."""
        tokens, both = inputs["gate_up"]
        return {"y": (tokens, both // 2)}

    def launches(self, tensors: Mapping[str, Tensor], multiprocessors: int, tactic: int) -> list[Launch]:
        """One launch."""
        gate_up = tensors["gate_up"]
        tokens, both = gate_up.shape
        return [swiglu(tokens, both // 2, gate_up.element)]
