"""Vectors of the norms.

The root's last bits depend on the order of a sum: the normalised value may round the other way, and after the weight
the result again, which is two units of the last place. The sum of the residual is two roundings: exact.
"""

from __future__ import annotations

import numpy as np

from plugins.rms_norm import meaning
from plugins.rms_norm.launch import add_rms_norm, rms_norm
from plugins.vectors import ELEMENTS, UNIT, Buffers, Expected, Vector, normal

_SMALLEST = 2.0**-23  # two units of the smallest halfs


def _weight(rng: np.random.Generator, hidden: int, dtype: np.dtype) -> np.ndarray:
    return rng.uniform(0.5, 1.5, hidden).astype(dtype)


def norm_vector(rows: int, hidden: int, element: str, epsilon: float) -> Vector:
    """y = RMSNorm(x)."""
    dtype = ELEMENTS[element]

    def inputs(rng: np.random.Generator) -> Buffers:
        return {"x": normal(rng, (rows, hidden), dtype, 3), "weight": _weight(rng, hidden, dtype)}

    def expect(before: Buffers) -> dict[str, Expected]:
        y = meaning.rms_norm(before["x"], before["weight"], epsilon)
        return {"y": Expected(y, absolute=_SMALLEST, relative=2 * UNIT[element])}

    return Vector(
        f"rms_norm {rows}x{hidden}",
        (rms_norm(rows, hidden, element, epsilon),),
        inputs,
        {"y": ((rows, hidden), dtype)},
        expect,
        moved=(2 * rows + 1) * hidden * dtype.itemsize,
    )


def add_norm_vector(rows: int, hidden: int, element: str, scale: float, epsilon: float) -> Vector:
    """total = hidden + scale * branch, y = RMSNorm(total)."""
    dtype = ELEMENTS[element]

    def inputs(rng: np.random.Generator) -> Buffers:
        stream, branch = (normal(rng, (rows, hidden), dtype, 3) for _ in range(2))
        return {"hidden": stream, "branch": branch, "weight": _weight(rng, hidden, dtype)}

    def expect(before: Buffers) -> dict[str, Expected]:
        total, y = meaning.add_rms_norm(before["hidden"], before["branch"], before["weight"], scale, epsilon)
        return {"total": Expected(total), "y": Expected(y, absolute=_SMALLEST, relative=2 * UNIT[element])}

    return Vector(
        f"add_rms_norm {rows}x{hidden}",
        (add_rms_norm(rows, hidden, element, scale, epsilon),),
        inputs,
        dict.fromkeys(("total", "y"), ((rows, hidden), dtype)),
        expect,
        moved=(4 * rows + 1) * hidden * dtype.itemsize,
    )
