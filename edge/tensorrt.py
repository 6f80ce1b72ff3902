"""The TensorRT that a target is built with and runs on; the only module that names the package or knows its versions.

| target | package | builds |
|---|---|---|
| rtx | tensorrt_rtx | for any RTX GPU, without one |
| tensorrt | tensorrt 10.3 to 11 | for the GPU that is there, which it runs and times kernels on |
| jetson | the same, from JetPack | the same, on the board |
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edge.alias_library import alias_library
from edge.errors import EdgeError, UsageError

TARGETS = ("rtx", "tensorrt", "jetson")
_RTX_LIBRARY = "libtensorrt_rtx.so"
_REMEDIES = {
    "rtx": "pip install 'minicpm-edge[rtx]'",
    "tensorrt": "pip install tensorrt-cu13",
    "jetson": "sudo apt install python3-libnvinfer, and use a venv made with --system-site-packages",
}
_OLDEST = (10, 3)  # JetPack 6.2's; the first with all that Python plugins need


@dataclass(frozen=True)
class Flavour:
    """`name` with the version, as 'TensorRT-RTX 1.7.1.116'; `api` is the package; needs_gpu: does it build on one."""

    name: str
    api: Any
    needs_gpu: bool = False

    @property
    def streams(self) -> bool:
        """Does it write an engine in pieces?"""
        return hasattr(self.api.Builder, "build_serialized_network_to_stream")


@cache
def load_flavour(target: str) -> Flavour:
    """Import the target's TensorRT, ready for networks with plugins; UsageError if there is none here."""
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}; engines are built for {', '.join(TARGETS)}")
    if target == "jetson" and not is_jetson():
        raise UsageError("a Jetson's engine can only be built on the board, and this is none; copy the bundle there")
    package, name = ("tensorrt_rtx", "TensorRT-RTX") if target == "rtx" else ("tensorrt", "TensorRT")
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{name} is not installed for this Python; run: {_REMEDIES[target]}")
    try:
        api: Any = importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise EdgeError(f"{name} does not load ({error}); install it again: {_REMEDIES[target]}") from None
    if target == "rtx":
        _make_plugins_loadable()
        return Flavour(f"{name} {api.__version__}", api)
    if tuple(int(part) for part in api.__version__.split(".")[:2]) < _OLDEST:
        raise UsageError(f"{name} {api.__version__} is too old for the plugins; update to 10.3 (JetPack 6.2) or newer")
    return Flavour(f"{name} {api.__version__}", api, needs_gpu=True)


def is_jetson() -> bool:
    """By NVIDIA's chip in the device tree, or the release file, which containers are given."""
    try:
        chips = Path("/proc/device-tree/compatible").read_bytes()
    except OSError:
        chips = b""
    return b"nvidia,tegra" in chips or Path("/etc/nv_tegra_release").exists()


def compute_capabilities(flavour: Flavour) -> tuple[str, ...]:
    """GPUs that it compiles for though they are not there, as 'sm86'."""
    if flavour.needs_gpu:
        return ()
    return tuple(name.lower() for name in flavour.api.ComputeCapability.__members__ if name.startswith("SM"))


def set_compute_capabilities(flavour: Flavour, config: Any, names: list[str]) -> None:
    """Compile for these GPUs; one that needs a GPU compiles for that one anyway."""
    if flavour.needs_gpu:
        return
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(flavour.api.ComputeCapability, name.upper()), index)


def set_timing_cache(flavour: Flavour, config: Any, data: bytes) -> bool:
    """Start from what earlier builds timed (b"": nothing); False if TensorRT does not take it."""
    timing_cache = config.create_timing_cache(data)
    return timing_cache is not None and bool(config.set_timing_cache(timing_cache, False))


def timing_cache(config: Any) -> bytes:
    """What the build has timed, to start the next one from."""
    cache_object = config.get_timing_cache()
    return b"" if cache_object is None else bytes(memoryview(cache_object.serialize()))


def build_engine_into(flavour: Flavour, builder: Any, network: Any, config: Any, write: Callable[[Any], Any]) -> bool:
    """Compile and `write` the engine, in pieces where TensorRT can (not 10.3), which saves a copy of it.

    False if TensorRT cannot build it; OSError of `write`.
    """
    if not flavour.streams:
        engine = builder.build_serialized_network(network, config)
        if engine is not None:
            write(memoryview(engine))
        return engine is not None
    writer = _stream_writer(flavour.api, write)
    built = bool(builder.build_serialized_network_to_stream(network, config, writer))
    if writer.error is not None:
        raise writer.error
    return built


def _stream_writer(api: Any, write: Callable[[Any], Any]) -> Any:
    class Writer(api.IStreamWriter):
        def __init__(self) -> None:
            super().__init__()
            self.error: OSError | None = None

        def write(self, data: Any) -> int:
            try:
                write(data)
            except OSError as error:  # TensorRT passes no exception on
                self.error = error
                return 0
            return len(data)

    return Writer()


def error_logger(api: Any, errors: list[str]) -> Any:
    """A logger that appends what TensorRT calls an error to `errors`."""

    class ErrorLogger(api.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity <= api.ILogger.ERROR:
                errors.append(message.strip())

    return ErrorLogger()


def _make_plugins_loadable() -> None:
    """Let TensorRT-RTX's ONNX parser find the library it is part of.

    At its first plugin the parser opens "libtensorrt_rtx.so", a name that the wheel does not ship (it has
    libtensorrt_rtx.so.1), and ends the process if that fails. The dynamic loader takes a library it already holds
    for any request of its SONAME, so an empty library of that SONAME which depends on the real one answers it.
    It exists in memory only: nothing to install, to clean up or to race for.
    """
    try:
        ctypes.CDLL(_RTX_LIBRARY)  # the system's own installation has the name
        return
    except OSError:
        pass
    descriptor = os.memfd_create(_RTX_LIBRARY)
    try:
        os.write(descriptor, alias_library(_RTX_LIBRARY, f"{_RTX_LIBRARY}.1"))
        ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError as error:
        raise EdgeError(f"TensorRT-RTX's ONNX parser cannot be given {_RTX_LIBRARY}: {error}") from None
    finally:
        os.close(descriptor)
