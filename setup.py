"""Builds the CPU operator library with the package; everything else is in pyproject.toml.

One shared library an instruction set, picked at run time by plugins/ort/library.py. Without a C++ compiler the
install still succeeds (the operators then run as ONNX functions: correct, slow) and says so.

The variable EDGE_CPU says for which processor a wheel is: x86_64, aarch64 (on another machine, by Debian's cross
compiler) or none, which gives a wheel for any machine, without the library. A build that fails is an error then.
`make wheels` builds all three.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
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
# -g0: Python's own flags ask for debug information, which is large and names the folders of this machine.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-g0", "-I."]
# The last two: GCC 12's own AVX-512 headers trip them (_mm512_undefined_ps).
WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-cast-function-type",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
chosen = os.environ.get("EDGE_CPU")
host = platform.machine()
cpu = chosen or host
if chosen and chosen not in (*INSTRUCTION_SETS, "none"):
    raise SystemExit(f"EDGE_CPU is {chosen!r}; choose from {', '.join(INSTRUCTION_SETS)}, none")


class BuildOperators(build_ext):
    """Plain shared libraries: ONNX Runtime loads them, so their names carry no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extensions(self) -> None:
        if cpu != host:
            # All of them anew, since Python's flags are for this machine's compiler.
            compiler = f"{cpu}-linux-gnu-g++"
            compile_shared, link_shared = [compiler, "-fPIC"], [compiler, "-shared"]
            self.compiler.set_executables(
                compiler_cxx=compiler,
                compiler_so=compile_shared,
                compiler_so_cxx=compile_shared,
                linker_so=link_shared,
                linker_so_cxx=link_shared,
                linker_exe=compiler,
                linker_exe_cxx=compiler,
            )
        super().build_extensions()

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


class OperatorsWheel(bdist_wheel):
    """The library knows nothing of Python: a wheel with it is for one processor and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, machine = super().get_tag()
        if cpu != host and not self.root_is_pure and not self.plat_name_supplied:
            machine = f"linux_{cpu}"
        return "py3", "none", machine


def operator_library(name: str, flags: list[str]) -> Extension:
    return Extension(
        f"plugins.ort.libedge_ops_{name}",
        sources=["plugins/ort/library.cpp"],
        depends=[str(path) for path in sorted(Path("plugins").glob("*/*.h"))],
        extra_compile_args=[*FLAGS, *WARNINGS, *flags],
        language="c++",
        optional=not chosen,
    )


setup(
    ext_modules=[operator_library(name, flags) for name, flags in INSTRUCTION_SETS.get(cpu, {}).items()],
    cmdclass={"build_ext": BuildOperators, "bdist_wheel": OperatorsWheel},
)
