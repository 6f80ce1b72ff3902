"""pycuda and edge/cuda.py in one process: one context and its streams, arrays in both directions without a copy."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from edge.cuda import Device, DeviceArray, Kernels, Pool, Stream, device_array, open_device, pinned
from plugins.build.nvrtc import cubin
from plugins.rms_norm.launch import rms_norm as launch_norm
from plugins.rms_norm.meaning import rms_norm
from plugins.simt.driver.library import EmulatedDriver
from tests.emulated import emulated_gpu

ROWS, HIDDEN = 3, 64
NORM = launch_norm(ROWS, HIDDEN, "half", 1e-5)


@pytest.fixture
def gpu() -> Iterator[EmulatedDriver]:
    with emulated_gpu(kernels=[NORM.kernel]) as driver:
        yield driver


@pytest.fixture
def device(gpu: EmulatedDriver) -> Device:
    return open_device()


@pytest.fixture
def cuda(device: Device) -> Iterator[ModuleType]:
    """pycuda's driver with the primary context current; imported here, because importing it needs libcuda.so.1."""
    import pycuda.driver as cuda

    cuda.init()
    context = cuda.Device(device.ordinal).retain_primary_context()
    context.push()
    yield cuda
    context.pop()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def norm(device: Device, x: DeviceArray, weight: DeviceArray, y: DeviceArray, stream: Stream) -> Kernels:
    kernels = Kernels(cubin([NORM.kernel], "sm_86"), device)
    addresses = {"x": x.address, "weight": weight.address, "y": y.address}
    kernels.launch(NORM, NORM.pack(addresses), int(stream.handle))
    return kernels


def test_both_see_one_device_and_one_context(gpu: EmulatedDriver, device: Device, cuda: ModuleType) -> None:
    theirs = cuda.Device(0)
    assert theirs.name() == device.name and theirs.total_memory() == device.total_memory
    assert "sm_{}{}".format(*theirs.compute_capability()) == device.architecture
    assert theirs.get_attribute(cuda.device_attribute.MULTIPROCESSOR_COUNT) == device.multiprocessors
    pool = Pool(1 << 20)
    assert cuda.mem_get_info() == device.memory() == (device.total_memory - (1 << 20), device.total_memory)
    memory = cuda.mem_alloc(512)
    assert gpu.counts().allocations == 2
    memory.free()
    del pool
    assert gpu.counts().allocations == 0


def test_pycuda_works_by_itself(cuda: ModuleType) -> None:
    from pycuda import gpuarray
    from pycuda.tools import DeviceMemoryPool, PageLockedMemoryPool

    stream, start, end = cuda.Stream(), cuda.Event(), cuda.Event()
    host, back = cuda.pagelocked_empty(16, np.float32), PageLockedMemoryPool().allocate((16,), np.float32)
    memory = cuda.mem_alloc(host.nbytes)
    start.record(stream)
    cuda.memcpy_htod_async(memory, host, stream)
    host[:] = 5
    cuda.memcpy_dtoh_async(back, memory, stream)
    end.record(stream)
    assert not end.query()
    end.synchronize()
    assert (back == 5).all() and end.time_since(start) >= 0
    pool = DeviceMemoryPool()
    array = gpuarray.GPUArray((4, 4), np.float32, allocator=pool.allocate)
    array.set(np.arange(16, dtype=np.float32).reshape(4, 4))
    assert (array.get() == np.arange(16).reshape(4, 4)).all()
    assert pool.active_blocks == 1 and (gpuarray.to_gpu(back).get() == 5).all()


def test_their_arrays_and_stream_go_through_our_kernel(device: Device, cuda: ModuleType) -> None:
    from pycuda import gpuarray

    x, weight = normal(0, ROWS, HIDDEN), normal(1, HIDDEN)
    theirs = [gpuarray.to_gpu(x), gpuarray.to_gpu(weight), gpuarray.empty((ROWS, HIDDEN), np.float16)]
    ours = [device_array(array) for array in theirs]
    assert [array.address for array in ours] == [array.ptr for array in theirs]
    stream = cuda.Stream()
    kernels = norm(device, *ours, Stream.of(stream.handle))
    result = cuda.pagelocked_empty((ROWS, HIDDEN), np.float16)
    theirs[2].get_async(stream, result)
    stream.synchronize()
    np.testing.assert_allclose(result, rms_norm(x, weight, 1e-5), rtol=2e-3)
    del kernels


def test_our_arrays_are_theirs(gpu: EmulatedDriver, device: Device, cuda: ModuleType) -> None:
    from pycuda import gpuarray

    pool, stream = Pool(1 << 20), Stream()
    ours = pool.take((ROWS, HIDDEN), np.float16)
    theirs = gpuarray.GPUArray(ours.shape, ours.dtype, gpudata=ours.address, base=ours)
    allocations = gpu.counts().allocations
    theirs.set(normal(0, *ours.shape))
    back = pinned(ours.shape, ours.dtype)
    stream.download(back, ours)
    stream.synchronize()
    assert (back == normal(0, *ours.shape)).all()
    assert device_array(theirs).address == ours.address and gpu.counts().allocations == allocations
    del pool, ours
    assert (theirs.get() == back).all(), "the array keeps the pool"
    del theirs
    assert gpu.counts().allocations == allocations - 1


def test_a_graph_is_captured_on_their_stream(gpu: EmulatedDriver, device: Device, cuda: ModuleType) -> None:
    pool, theirs = Pool(1 << 20), cuda.Stream()
    stream, weight = Stream.of(theirs.handle), normal(1, HIDDEN)
    x, result = (cuda.pagelocked_empty((ROWS, HIDDEN), np.float16) for _ in range(2))
    on_device = [pool.take(shape, np.float16) for shape in ((ROWS, HIDDEN), (HIDDEN,), (ROWS, HIDDEN))]
    stream.upload(on_device[1], weight)
    kernels = Kernels(cubin([NORM.kernel], "sm_86"), device)
    with stream.capture() as graphs:
        cuda.memcpy_htod_async(on_device[0].address, x, theirs)
        addresses = dict(zip(("x", "weight", "y"), (array.address for array in on_device), strict=True))
        kernels.launch(NORM, NORM.pack(addresses), int(stream.handle))
        cuda.memcpy_dtoh_async(result, on_device[2].address, theirs)
    for seed in range(2):
        x[...] = normal(seed, ROWS, HIDDEN)
        graphs[0].launch(stream)
        theirs.synchronize()
        np.testing.assert_allclose(result, rms_norm(x, weight, 1e-5), rtol=2e-3)
    assert gpu.counts().graph_launches == 2
