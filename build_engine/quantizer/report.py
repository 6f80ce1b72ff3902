"""What quantising cost, linear by linear."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LinearReport:
    """Relative Frobenius errors of one linear layer, of the chosen method and of round-to-nearest beside it.

    Output errors are over the calibration tokens as the method counts them, on inputs that the quantised layers before
    give; None without calibration. `seconds` includes the pass that collected the inputs, shared by its stage.
    """

    layer: int
    linear: str
    output_error: float | None
    rtn_output_error: float | None
    weight_error: float
    rtn_weight_error: float
    seconds: float


@dataclass(frozen=True)
class QuantizationReport:
    """One run. `sequences` of `length` tokens of calibration text (0 without); `seconds` over all its sittings."""

    method: str
    group_size: int
    skip_tokens: int
    prefix: str
    damping: float
    sequences: int
    length: int
    seconds: float
    linears: tuple[LinearReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
