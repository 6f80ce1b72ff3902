"""What `edge.SwiGLU` computes (spec: infllmv2.md 2)."""

from __future__ import annotations

import numpy as np


def swiglu(gate_up: np.ndarray) -> np.ndarray:
    """gate_up [T, 2F] (gate first) -> [T, F]; silu is rounded to the input's dtype before the product."""
    gate, up = np.split(gate_up, 2, axis=-1)
    wide = gate.astype(np.float32)
    with np.errstate(over="ignore"):  # exp grows to infinity and silu to -0, as it should
        silu = (wide / (1 + np.exp(-wide))).astype(gate_up.dtype)
    return silu * up
