"""NVIDIA's compilers and disassemblers, as the wheels of the extra `kernels` install them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from edge.errors import EdgeError


def wheel_file(package: str, name: str) -> Path:
    """The file or folder `name` that a wheel holds, as ('nvidia-cuda-nvrtc', 'nvidia/cu13/lib/libnvrtc.so.13')."""
    try:
        path = Path(str(distribution(package).locate_file(name)))
    except PackageNotFoundError:
        path = None
    if path is None or not path.exists():
        raise EdgeError(
            f"compiling CUDA kernels needs the package {package}"
            f"{'' if path is None else f' with {name}'}; pip install 'minicpm-edge[kernels]'"
        )
    return path


def wheel_version(package: str) -> str:
    """The installed version of a wheel; EdgeError as in `wheel_file`."""
    try:
        return distribution(package).version
    except PackageNotFoundError:
        raise EdgeError(
            f"compiling CUDA kernels needs the package {package}; pip install 'minicpm-edge[kernels]'"
        ) from None
