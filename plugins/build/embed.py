"""Machine code for a bundle: one module an architecture, with all kernels that its model may launch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from plugins.build.nvrtc import cubin
from plugins.launch import Kernel, module_file

_GEFORCE = ("sm_86", "sm_89", "sm_120")  # RTX 30, 40 and 50
# Export target -> the GPUs it is for.
TARGETS: dict[str, tuple[str, ...]] = {"rtx": _GEFORCE, "tensorrt": _GEFORCE, "jetson": ("sm_87",)}  # sm_87: Orin


def kernel_modules(kernels: Sequence[Kernel], target: str) -> dict[str, bytes]:
    """{file name: cubin} for each architecture of a target. A kernel's name in them is its `symbol`."""
    architectures = TARGETS[target]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        modules = list(pool.map(lambda architecture: cubin(kernels, architecture), architectures))
    return {module_file(a): module for a, module in zip(architectures, modules, strict=True)}
