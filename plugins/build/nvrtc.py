"""Kernels -> cubins and PTX, by NVRTC from NVIDIA's wheels: needs no CUDA toolkit, no driver and no GPU.

Code for Orin comes from the compiler of its JetPack 6 (CUDA 12.6), code for the GeForce series from CUDA 13.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from edge.errors import EdgeError
from plugins.build.cache import ROOT, cache_folder, source_key, write_atomically
from plugins.build.wheels import wheel_file, wheel_version
from plugins.launch import Kernel, module_source


@dataclass(frozen=True)
class Toolchain:
    """One NVRTC: the wheel and file of its library, and wheel and folder of each include folder."""

    library: tuple[str, str]
    includes: tuple[tuple[str, str], ...]


_CUDA_12 = Toolchain(
    ("nvidia-cuda-nvrtc-cu12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
    (("nvidia-cuda-runtime-cu12", "nvidia/cuda_runtime/include"),),
)
_CUDA_13 = Toolchain(
    ("nvidia-cuda-nvrtc", "nvidia/cu13/lib/libnvrtc.so.13"),
    (
        ("nvidia-cuda-runtime", "nvidia/cu13/include"),
        ("nvidia-cuda-crt", "nvidia/cu13/include/crt"),
        ("nvidia-cuda-cccl", "nvidia/cu13/include/cccl"),
    ),
)
# sm_86, 89, 120: RTX 30, 40, 50. sm_87: Jetson Orin.
TOOLCHAINS = {"sm_87": _CUDA_12, "sm_86": _CUDA_13, "sm_89": _CUDA_13, "sm_120": _CUDA_13}
ARCHITECTURES = tuple(TOOLCHAINS)


class CompileError(EdgeError):
    """NVRTC refused a kernel; `log` is all it said."""

    def __init__(self, sentence: str, log: str) -> None:
        super().__init__(sentence)
        self.log = log


def cubin(kernels: Sequence[Kernel], architecture: str) -> bytes:
    """One module of machine code with all `kernels`, for 'sm_86', 'sm_87', 'sm_89' or 'sm_120'; cached."""
    return compile_module(module_source(list(kernels)), architecture, "cubin")


def ptx(kernels: Sequence[Kernel], architecture: str) -> str:
    """The same as PTX, from the compiler of that architecture."""
    return compile_module(module_source(list(kernels)), architecture, "ptx").decode()


def compile_module(source: str, architecture: str, kind: str) -> bytes:
    """A translation unit -> 'cubin' or 'ptx', from the cache if nothing it is made from has changed."""
    if architecture not in TOOLCHAINS:
        raise EdgeError(f"kernels are not compiled for {architecture!r}; choose from {', '.join(ARCHITECTURES)}")
    toolchain = TOOLCHAINS[architecture]
    target = architecture if kind == "cubin" else architecture.replace("sm", "compute")
    options = [f"--gpu-architecture={target}", "-std=c++17", "-default-device"]
    if kind == "ptx":  # the interpreter names lines; machine code stays free of the folders of this machine
        options.append("-lineinfo")
    versions = [f"{name} {wheel_version(name)}" for name, _ in (toolchain.library, *toolchain.includes)]
    path = cache_folder("nvrtc") / f"{source_key(source, [*versions, *options])[:32]}-{architecture}.{kind}"
    if not path.exists():
        folders = [ROOT, *(wheel_file(*include) for include in toolchain.includes)]
        options += [f"--include-path={folder}" for folder in folders]
        write_atomically(path, _compile(toolchain, source, options, kind))
    return path.read_bytes()


@cache
def _library(toolchain: Toolchain) -> ctypes.CDLL:
    path = wheel_file(*toolchain.library)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EdgeError(f"{path} cannot be loaded ({error}); install it again for this platform") from None


def _compile(toolchain: Toolchain, source: str, options: Sequence[str], kind: str) -> bytes:
    nvrtc = _library(toolchain)
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"module.cu", 0, None, None)
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), words) != 0:
            log = _fetch(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise _compile_error(source, options[0], log)
        result = _fetch(nvrtc, program, "CUBIN" if kind == "cubin" else "PTX")
        return result if kind == "cubin" else result.rstrip(b"\0")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _compile_error(source: str, target: str, log: str) -> CompileError:
    """Names the first error, else the first line of the log; the files are named relative to the project."""
    lines = [line.replace(f"{ROOT}/", "") for line in log.splitlines() if line.strip()] or ["no log"]
    first = next((line for line in lines if re.search(r"\berror\b", line)), lines[0])
    files = re.findall(r'#include "(plugins/[^"]+\.cu)"', source)
    what = ", ".join(files) or "a kernel"
    return CompileError(f"{what} does not compile for {target.partition('=')[2]}: {first.strip()}", log)
