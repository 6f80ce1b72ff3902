"""Vectors of SwiGLU."""

from __future__ import annotations

import numpy as np

from plugins.swiglu import meaning
from plugins.swiglu.launch import swiglu
from plugins.vectors import ELEMENTS, UNIT, Buffers, Expected, Vector, normal


def swiglu_vector(rows: int, width: int, element: str) -> Vector:
    """y = silu(gate) * up, gates from -30 to 30 in the first row.

    The exponential's last bits may round silu the other way, and the product again: two units of the last place.
    """
    dtype = ELEMENTS[element]

    def inputs(rng: np.random.Generator) -> Buffers:
        gate_up = normal(rng, (rows, 2 * width), dtype, 2)
        gate_up[0, :width] = np.linspace(-30, 30, width)
        return {"gate_up": gate_up}

    def expect(before: Buffers) -> dict[str, Expected]:
        y = meaning.swiglu(before["gate_up"])
        # The least silu that is no zero is off by a whole unit of the smallest halfs, times |up| < 16.
        return {"y": Expected(y, absolute=2.0**-20, relative=2 * UNIT[element])}

    return Vector(
        f"swiglu {rows}x{width}",
        (swiglu(rows, width, element),),
        inputs,
        {"y": ((rows, width), dtype)},
        expect,
        moved=3 * rows * width * dtype.itemsize,
    )
