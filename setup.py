"""Builds the CPU operator library with the package; everything else is in pyproject.toml.

One shared library an instruction set, picked at run time by plugins/ort/library.py. Without a C++ compiler the
install still succeeds (the operators then run as ONNX functions: correct, slow) and says so.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Name in the library's file name -> what the compiler calls it.
INSTRUCTION_SETS = {
    "x86_64": {
        "x86_64_v3": ["-march=x86-64-v3"],
        "x86_64_v4": ["-march=x86-64-v4"],
        "x86_64_v4_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"],
    },
    "aarch64": {"armv8_2": ["-march=armv8.2-a+fp16+dotprod"]},
}
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-I."]
# The last two: GCC 12's own AVX-512 headers trip them (_mm512_undefined_ps).
WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-cast-function-type",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]


class BuildOperators(build_ext):
    """Plain shared libraries: ONNX Runtime loads them, so their names carry no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        # The objects of two instruction sets come from one source file and must not share a folder.
        temp, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
        try:
            super().build_extension(ext)
        except Exception as error:
            print(
                f"warning: {ext.name} was not built ({error}); install g++ and reinstall for full speed, "
                "until then the operators run as ONNX functions",
                file=sys.stderr,
            )
            raise
        finally:
            self.build_temp = temp


def operator_library(name: str, flags: list[str]) -> Extension:
    return Extension(
        f"plugins.ort.libedge_ops_{name}",
        sources=["plugins/ort/library.cpp"],
        depends=[str(path) for path in sorted(Path("plugins").glob("*/*.h"))],
        extra_compile_args=[*FLAGS, *WARNINGS, *flags],
        language="c++",
        optional=True,
    )


setup(
    ext_modules=[operator_library(name, flags) for name, flags in INSTRUCTION_SETS.get(platform.machine(), {}).items()],
    cmdclass={"build_ext": BuildOperators},
)
