"""edge.RMSNorm and edge.AddRMSNorm for TensorRT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from plugins.launch import Launch
from plugins.plugin import SimpleOperator, Tensor
from plugins.rms_norm.launch import add_rms_norm, rms_norm


@dataclass(frozen=True)
class RMSNorm(SimpleOperator):
    """y = RMSNorm(x) weight; x, y [T, hidden]."""

    epsilon: float

    NAME: ClassVar[str] = "RMSNorm"
    INPUTS: ClassVar[tuple[str, ...]] = ("x", "weight")
    OUTPUTS: ClassVar[tuple[str, ...]] = ("y",)

    def shapes(self, inputs: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """y as x."""
        return {"y": inputs["x"]}

    def launches(self, tensors: Mapping[str, Tensor], multiprocessors: int, tactic: int) -> list[Launch]:
        """One launch."""
        x = tensors["x"]
        rows, hidden = x.shape
        return [rms_norm(rows, hidden, x.element, self.epsilon)]


@dataclass(frozen=True)
class AddRMSNorm(SimpleOperator):
    """total = hidden + scale branch, y = RMSNorm(total) weight; all [T, hidden]."""

    scale: float
    epsilon: float

    NAME: ClassVar[str] = "AddRMSNorm"
    INPUTS: ClassVar[tuple[str, ...]] = ("hidden", "branch", "weight")
    OUTPUTS: ClassVar[tuple[str, ...]] = ("total", "y")

    def shapes(self, inputs: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """Both as hidden."""
        return dict.fromkeys(self.OUTPUTS, inputs["hidden"])

    def launches(self, tensors: Mapping[str, Tensor], multiprocessors: int, tactic: int) -> list[Launch]:
        """One launch."""
        x = tensors["hidden"]
        rows, hidden = x.shape
        return [add_rms_norm(rows, hidden, x.element, self.scale, self.epsilon)]
