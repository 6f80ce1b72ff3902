"""Hand-written PTX for the interpreter's tests: a kernel around a few instructions, and exact floating point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from plugins.launch import Kernel, Launch
from plugins.simt import Report, interpreter

REGISTERS = """
  .reg .pred %p<10>;  .reg .b16 %h<10>;  .reg .b32 %r<10>;  .reg .b64 %rd<20>;
  .reg .b32 %element;  .reg .b64 %address;  .reg .b64 %index;
"""


def kernel_text(body: str, pointers: int, registers: str = "") -> str:
    """A module with the kernel `k`, which has the pointers of its struct in %rd0, %rd1, ... and its thread in %r0."""
    loads = "".join(f"  ld.param.u64 %rd{i}, [k_param_0+{8 * i}];\n" for i in range(pointers))
    return f"""
.version 8.5
.target sm_87
.address_size 64
.extern .shared .align 128 .b8 shared[];
.visible .entry k(.param .align 8 .b8 k_param_0[{8 * pointers}])
.maxntid 128, 1, 1
{{
{REGISTERS}{registers}
{loads}  mov.u32 %r0, %tid.x;
{body}
}}
"""


def run_text(
    body: str,
    buffers: dict[str, np.ndarray],
    threads: int = 32,
    grid: tuple[int, int, int] = (1, 1, 1),
    shared_bytes: int = 0,
    registers: str = "",
) -> Report:
    """Executes `body` with the buffers' addresses in %rd0, %rd1, ...; the buffers change in place."""
    kernel = Kernel("", "k", "", threads)
    launch = Launch(kernel, grid, tuple(buffers), shared_bytes)
    return interpreter.execute([launch], buffers, {kernel: kernel_text(body, len(buffers), registers)})


def compute(instructions: str, inputs: Sequence[np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
    """Executes instructions on one element of every input per thread.

    Inputs are %a0, %a1, ... and outputs %d0, %d1, ..., registers as wide as their types.
    """
    count = len(inputs[0])
    padded = count + -count % 32
    buffers = {f"a{i}": np.resize(values, padded) for i, values in enumerate(inputs)}
    buffers |= {f"d{i}": np.zeros(padded, dtype) for i, dtype in enumerate(outputs)}
    names = {name: 8 * values.itemsize for name, values in buffers.items()}
    registers = "".join(f"  .reg .b{bits} %{name};\n" for name, bits in names.items())
    start = "  mov.u32 %element, %ctaid.x;\n  mad.lo.s32 %element, %element, 32, %r0;\n"
    loads, stores = "", ""
    for i, (name, bits) in enumerate(names.items()):
        address = f"  mul.wide.u32 %index, %element, {bits // 8};\n  add.s64 %address, %rd{i}, %index;\n"
        if name[0] == "a":
            loads += address + f"  ld.global.b{bits} %{name}, [%address];\n"
        else:
            stores += address + f"  st.global.b{bits} [%address], %{name};\n"
    body = f"{start}{loads}{instructions}\n{stores}  ret;"
    run_text(body, buffers, grid=(padded // 32, 1, 1), registers=registers)
    return [buffers[f"d{i}"][:count] for i in range(len(outputs))]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: bits of the significand (with the hidden one) and of the exponent."""

    precision: int
    exponent_bits: int

    @property
    def smallest_exponent(self) -> int:
        """Of the lowest bit of subnormal numbers."""
        return 3 - (1 << (self.exponent_bits - 1)) - self.precision

    def decode(self, pattern: int) -> Fraction:
        """The value of a finite bit pattern."""
        fraction = pattern & ((1 << (self.precision - 1)) - 1)
        exponent = pattern >> (self.precision - 1) & ((1 << self.exponent_bits) - 1)
        assert exponent != (1 << self.exponent_bits) - 1
        significand = fraction + ((1 << (self.precision - 1)) if exponent else 0)
        sign = -1 if pattern >> (self.precision - 1 + self.exponent_bits) else 1
        return sign * significand * Fraction(2) ** (self.smallest_exponent + max(exponent, 1) - 1)

    def encode(self, value: Fraction, rounding: str = "rn", negative_zero: bool = False) -> int:
        """The bit pattern that a value rounds to: nearest even, or rz, rm, rp."""
        negative = value < 0 or (value == 0 and negative_zero)
        sign = int(negative) << (self.precision - 1 + self.exponent_bits)
        size = abs(value)
        # The exponent of the last place: floor(log2(size)) from the lengths of numerator and denominator.
        top = size.numerator.bit_length() - size.denominator.bit_length()
        top -= size < Fraction(2) ** top
        last = max(top - self.precision + 1, self.smallest_exponent) if size else self.smallest_exponent
        whole, rest = divmod(size / Fraction(2) ** last, 1)
        if rounding == "rn":
            up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)
        else:
            up = rest > 0 and rounding == ("rm" if negative else "rp")
        whole += bool(up)
        infinity = ((1 << self.exponent_bits) - 1) << (self.precision - 1)
        pattern = whole + ((last - self.smallest_exponent) << (self.precision - 1))
        overflowing = infinity if rounding == "rn" or rounding == ("rm" if negative else "rp") else infinity - 1
        return sign | (pattern if pattern < infinity else overflowing)


F16, BF16, F32 = Format(11, 5), Format(8, 8), Format(24, 8)
