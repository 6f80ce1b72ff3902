"""Installs pycuda, of which there are no wheels, on a machine without a CUDA toolkit: `python -m tests.install_pycuda`.

Its C++ is compiled against the headers of NVIDIA's wheels and linked against the emulated driver, which stands for
libcuda.so; on a machine with a GPU the result finds NVIDIA's. Takes a minute or two; does nothing if it is there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edge.errors import EdgeError
from plugins.build.wheels import wheel_file
from plugins.simt.driver.library import driver_library

VERSION = "2026.1"
HEADERS = (
    ("nvidia-cuda-runtime", "nvidia/cu13/include/cuda.h"),
    ("nvidia-cuda-profiler-api", "nvidia/cu13/include/cudaProfiler.h"),
)
IMPORT = "from plugins.simt.driver.library import load_driver; load_driver(); import pycuda.driver"


def main() -> None:
    if is_installed():
        return
    print(f"compiling pycuda {VERSION}: a minute or two", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "libcuda.so").symlink_to(driver_library())
        done = subprocess.run(pip_command(), env=environment(folder), capture_output=True, text=True)
    if done.returncode or not is_installed():
        errors = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
        said = errors[0] if errors else "no error was printed"
        raise EdgeError(f"pycuda {VERSION}, which the tests need, does not install: {said}; see {__file__}")


def is_installed() -> bool:
    """Whether that version is there and imports."""
    try:
        if version("pycuda") != VERSION:
            return False
    except PackageNotFoundError:
        return False
    return subprocess.run([sys.executable, "-c", IMPORT], capture_output=True).returncode == 0


def pip_command() -> list[str]:
    """Without build isolation, so that it is compiled for the numpy that is installed."""
    settings = "--config-settings=--global-option=--conf:CUDA_ENABLE_CURAND=False"
    options = ["--no-build-isolation", "--no-binary=pycuda", "--no-cache-dir", settings]
    return [sys.executable, "-m", "pip", "install", *options, f"pycuda=={VERSION}"]


def environment(folder: str) -> dict[str, str]:
    """What tells the compiler where to look. It need not be fast: the tests call no hot loop of it."""
    headers = [str(wheel_file(*header).parent) for header in HEADERS]
    return {**os.environ, "CPATH": ":".join(headers), "LIBRARY_PATH": folder, "CXXFLAGS": "-O0 -g0 -w"}


if __name__ == "__main__":
    try:
        main()
    except EdgeError as error:
        sys.exit(f"error: {error}")
