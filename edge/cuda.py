"""The one module that touches CUDA: the driver API by way of cuda-bindings, on the device's primary context.

pycuda and every library on the CUDA runtime use the same context, so their arrays and streams come in without a copy
(`device_array`, `Stream.of`) and ours go out (`DeviceArray.__cuda_array_interface__`).
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from edge.errors import EdgeError
from plugins.launch import Launch

ALIGNMENT = 256  # of everything taken from a pool; TensorRT asks for it
_STATIC_SHARED_LIMIT = 48 << 10  # dynamic shared memory beyond this must be asked for


class CudaError(EdgeError):
    """A call of the driver failed; `code` is its name, as 'CUDA_ERROR_OUT_OF_MEMORY'."""

    def __init__(self, sentence: str, code: str) -> None:
        super().__init__(sentence)
        self.code = code


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EdgeError(f"running on a GPU needs cuda-bindings ({error}); pip install 'minicpm-edge[cuda]'") from None
    return driver


def _call(function: str, *arguments: Any) -> Any:
    """driver.<function>(*arguments) -> its result (None, one value or a tuple); CudaError names the call."""
    driver = _driver()
    try:
        status, *results = getattr(driver, function)(*arguments)
    except RuntimeError:  # cuda-bindings found no libcuda, or none with this function
        raise CudaError(
            f"there is no CUDA driver here, or one too old to have {function}; install NVIDIA's driver", "no driver"
        ) from None
    if status != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{function} failed: {status.name}", status.name)
    if len(results) <= 1:
        return results[0] if results else None
    return tuple(results)


@dataclass(frozen=True)
class Device:
    """A GPU whose primary context is current in this thread, and stays retained as long as this object lives.

    architecture: as 'sm_87'; is_integrated: it shares the system's memory, as a Jetson's does.
    """

    name: str
    architecture: str
    multiprocessors: int
    total_memory: int
    is_integrated: bool
    driver_version: tuple[int, int]
    ordinal: int = 0

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes, as the driver sees them."""
        free, total = _call("cuMemGetInfo")
        return int(free), int(total)

    def synchronize(self) -> None:
        """Wait for all work of the context."""
        _call("cuCtxSynchronize")


def open_device(ordinal: int = 0) -> Device:
    """Retain the primary context of a GPU and make it current; CudaError if there is none."""
    driver = _driver()
    _call("cuInit", 0)
    if not 0 <= ordinal < (count := _call("cuDeviceGetCount")):
        raise CudaError(f"there is no GPU {ordinal}, only {count}; choose another", "CUDA_ERROR_INVALID_DEVICE")
    handle = _call("cuDeviceGet", ordinal)

    def attribute(name: str) -> int:
        value = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_call("cuDeviceGetAttribute", value, handle))

    _call("cuCtxSetCurrent", _call("cuDevicePrimaryCtxRetain", handle))
    version = int(_call("cuDriverGetVersion"))
    device = Device(
        name=_call("cuDeviceGetName", 128, handle).split(b"\0")[0].decode(),
        architecture=f"sm_{attribute('COMPUTE_CAPABILITY_MAJOR')}{attribute('COMPUTE_CAPABILITY_MINOR')}",
        multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
        total_memory=int(_call("cuDeviceTotalMem", handle)),
        is_integrated=bool(attribute("INTEGRATED")),
        driver_version=(version // 1000, version % 1000 // 10),
        ordinal=ordinal,
    )
    weakref.finalize(device, driver.cuDevicePrimaryCtxRelease, handle)
    return device


@dataclass(frozen=True)
class DeviceArray:
    """C-contiguous device memory. `owner` keeps it alive; freed with it."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    owner: Any = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """How other libraries take it without a copy."""
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3}

    def rows(self, count: int) -> DeviceArray:
        """Its first `count` rows."""
        return DeviceArray(self.address, (count, *self.shape[1:]), self.dtype, self)

    def row(self, index: int) -> DeviceArray:
        """One row, without the dimension of rows."""
        size = self.nbytes // self.shape[0]
        return DeviceArray(self.address + index * size, self.shape[1:], self.dtype, self)


def device_array(source: Any) -> DeviceArray:
    """Memory of another library (`__cuda_array_interface__`, or pycuda's GPUArray), without a copy."""
    if isinstance(source, DeviceArray):
        return source
    interface = getattr(source, "__cuda_array_interface__", None)
    if interface is None:
        raise EdgeError(f"a {type(source).__name__} is no device array; give one with __cuda_array_interface__")
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != _contiguous(shape, dtype.itemsize):
        raise EdgeError(f"a device array of shape {shape} with strides {tuple(strides)} is not C-contiguous; copy it")
    return DeviceArray(int(interface["data"][0]), shape, dtype, source)


def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Pool:
    """One allocation of a fixed size, from which a run takes all it needs at its start; freed as a whole."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        try:
            self.address = int(_call("cuMemAlloc", size))
        except CudaError as error:
            raise CudaError(
                f"a pool of {size / 2**20:.0f} MiB cannot be had on this GPU ({error.code}); give a smaller --memory "
                "or --context, or close other programs",
                error.code,
            ) from None
        weakref.finalize(self, _driver().cuMemFree, self.address)

    @staticmethod
    def bytes_for(parts: Sequence[int]) -> int:
        """Size of a pool from which so many bytes are taken one after another."""
        return sum(_aligned(size) for size in parts[:-1]) + parts[-1]

    def take(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Uninitialised memory out of the pool, aligned to 256 bytes."""
        dtype = np.dtype(dtype)
        start = _aligned(self.used)
        end = start + math.prod(shape) * dtype.itemsize
        if end > self.size:
            raise EdgeError(f"the pool of {self.size} bytes has no {end - start} left: {self.used} are in use")
        self.used = end
        return DeviceArray(self.address + start, shape, dtype, self)


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Page-locked host memory, zeroed: copies from and to it are asynchronous."""
    dtype = np.dtype(dtype)
    size = max(math.prod(shape) * dtype.itemsize, 1)
    try:
        address = int(_call("cuMemHostAlloc", size, 0))
    except CudaError as error:
        raise CudaError(
            f"{size / 2**20:.0f} MiB of page-locked host memory cannot be had ({error.code}); ask for a smaller "
            "--context, or close other programs",
            error.code,
        ) from None
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, _driver().cuMemFreeHost, address)
    array = np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
    array[...] = 0
    return array


class Event:
    """A point in a stream's work."""

    def __init__(self) -> None:
        self.handle = _call("cuEventCreate", 0)
        weakref.finalize(self, _driver().cuEventDestroy, self.handle)

    def synchronize(self) -> None:
        """Wait for it."""
        _call("cuEventSynchronize", self.handle)

    def milliseconds_since(self, earlier: Event) -> float:
        """Time between two events that have both happened."""
        return float(_call("cuEventElapsedTime", earlier.handle, self.handle))


class Graph:
    """A captured sequence of work; replaying it costs one call."""

    def __init__(self, graph: Any) -> None:
        self._handle = _call("cuGraphInstantiate", graph, 0)
        weakref.finalize(self, _driver().cuGraphExecDestroy, self._handle)

    def launch(self, stream: Stream) -> None:
        """Run it once."""
        _call("cuGraphLaunch", self._handle, stream.handle)


class Stream:
    """An ordered queue of work that does not wait for the default stream."""

    def __init__(self, handle: Any = None) -> None:
        driver = _driver()
        if handle is None:
            handle = _call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
            weakref.finalize(self, driver.cuStreamDestroy, handle)
        self.handle = handle

    @staticmethod
    def of(handle: int) -> Stream:
        """A stream that another library owns, by its address (pycuda: `stream.handle`)."""
        return Stream(_driver().CUstream(handle))

    def synchronize(self) -> None:
        """Wait for all work queued here; errors of that work come out here too."""
        _call("cuStreamSynchronize", self.handle)

    def upload(self, target: DeviceArray, source: np.ndarray) -> None:
        """Host -> device, in stream order. A pinned `source` must not change before the copy is done."""
        self._check(target, source)
        _call("cuMemcpyHtoDAsync", target.address, source.ctypes.data, source.nbytes, self.handle)

    def download(self, target: np.ndarray, source: DeviceArray) -> None:
        """Device -> host; `target` holds the values after `synchronize`."""
        self._check(source, target)
        _call("cuMemcpyDtoHAsync", target.ctypes.data, source.address, target.nbytes, self.handle)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Device -> device."""
        if target.nbytes != source.nbytes:
            raise ValueError(f"cannot copy {source.nbytes} bytes to {target.nbytes}")
        _call("cuMemcpyDtoDAsync", target.address, source.address, target.nbytes, self.handle)

    def zero(self, target: DeviceArray) -> None:
        """Fill with zero bytes."""
        _call("cuMemsetD8Async", target.address, 0, target.nbytes, self.handle)

    def record(self, event: Event | None = None) -> Event:
        """An event after all that is queued now: a new one, or one that stood for something earlier."""
        event = event or Event()
        _call("cuEventRecord", event.handle, self.handle)
        return event

    def wait(self, event: Event) -> None:
        """Let what is queued from now on wait for an event, of any stream."""
        _call("cuStreamWaitEvent", self.handle, event.handle, 0)

    @contextmanager
    def capture(self) -> Generator[list[Graph], None, None]:
        """What is queued inside becomes a graph, the one item of the list, instead of being run.

        CudaError if something inside cannot be captured; the stream is usable again in any case.
        """
        driver, graphs = _driver(), list[Graph]()
        _call("cuStreamBeginCapture", self.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            yield graphs
        except BaseException:
            driver.cuStreamEndCapture(self.handle)  # what it says is a consequence
            raise
        graph = _call("cuStreamEndCapture", self.handle)
        try:
            graphs.append(Graph(graph))
        finally:
            driver.cuGraphDestroy(graph)

    @staticmethod
    def _check(device: DeviceArray, host: np.ndarray) -> None:
        if not host.flags.c_contiguous or host.nbytes != device.nbytes:
            raise ValueError(f"cannot copy between {device.nbytes} device bytes and {host.shape} {host.dtype} values")


class Kernels:
    """A module of machine code (plugins/build/embed.py), whose kernels are launched by their symbols."""

    def __init__(self, image: bytes, device: Device) -> None:
        self.device = device
        try:
            self._module = _call("cuModuleLoadData", image)
        except CudaError as error:
            raise CudaError(
                f"the kernels do not load on {device.name} ({device.architecture}): {error.code}; export the bundle "
                "for this device",
                error.code,
            ) from None
        weakref.finalize(self, _driver().cuModuleUnload, self._module)
        self._functions: dict[str, Any] = {}
        self._shared_limits: dict[str, int] = {}  # symbol -> dynamic shared memory it may have

    @cached_property
    def multiprocessors(self) -> int:
        """Of the device: launches are sized by it."""
        return self.device.multiprocessors

    def launch(self, launch: Launch, arguments: bytes, stream: int) -> None:
        """Queue one launch. arguments: the packed struct (Launch.pack); stream: its address."""
        function = self._function(launch)
        struct = ctypes.create_string_buffer(arguments, len(arguments))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        block = (launch.kernel.threads, 1, 1)
        _call(
            "cuLaunchKernel",
            function,
            *launch.grid,
            *block,
            launch.shared_bytes,
            stream,
            ctypes.addressof(parameters),
            0,
        )

    def _function(self, launch: Launch) -> Any:
        symbol = launch.kernel.symbol
        if symbol not in self._functions:
            try:
                self._functions[symbol] = _call("cuModuleGetFunction", self._module, symbol.encode())
            except CudaError as error:
                raise CudaError(
                    f"the bundle has no kernel {symbol} ({error.code}); export it again with this version", error.code
                ) from None
        function = self._functions[symbol]
        if launch.shared_bytes > self._shared_limits.get(symbol, _STATIC_SHARED_LIMIT):
            attribute = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _call("cuFuncSetAttribute", function, attribute, launch.shared_bytes)
            self._shared_limits[symbol] = launch.shared_bytes
        return function
