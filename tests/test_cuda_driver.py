"""edge/cuda.py over the emulated driver: memory, order of work, real kernels from real cubins, graphs, refusals."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from edge.cuda import CudaError, DeviceArray, Kernels, Pool, Stream, device_array, open_device, pinned
from edge.errors import EdgeError
from plugins.build.nvrtc import cubin
from plugins.launch import Launch
from plugins.linear.launch import LinearShape, gemv
from plugins.linear.meaning import linear
from plugins.linear.pack import pack_codes, pack_scales
from plugins.rms_norm.launch import rms_norm as launch_norm
from plugins.rms_norm.meaning import rms_norm
from plugins.simt.driver.library import DEVICES, EmulatedDriver
from plugins.swiglu.launch import swiglu as launch_swiglu
from plugins.swiglu.meaning import swiglu
from tests.emulated import emulated_gpu

ROWS, HIDDEN = 3, 64
NORM = launch_norm(ROWS, HIDDEN, "half", 1e-5)
SWIGLU = launch_swiglu(ROWS, HIDDEN, "half")
# 16 row tiles: more than the 48 KiB of shared memory that a block has without asking.
WIDE = LinearShape(8, 256, 1024, 2, 0, "half")
GEMV = gemv(WIDE, 16)
KERNELS = [launch.kernel for launch in (NORM, SWIGLU, GEMV)]
MEBIBYTE = 1 << 20


@pytest.fixture
def gpu() -> Iterator[EmulatedDriver]:
    with emulated_gpu(kernels=KERNELS, memory=64 * MEBIBYTE) as driver:
        yield driver


def run(kernels: Kernels, launch: Launch, buffers: dict[str, DeviceArray], stream: Stream) -> None:
    addresses = {name: array.address for name, array in buffers.items()}
    kernels.launch(launch, launch.pack(addresses), int(stream.handle))


def on_device(pool: Pool, stream: Stream, array: np.ndarray) -> DeviceArray:
    target = pool.take(array.shape, array.dtype)
    stream.upload(target, array)
    return target


def on_host(stream: Stream, source: DeviceArray) -> np.ndarray:
    target = pinned(source.shape, source.dtype)
    stream.download(target, source)
    stream.synchronize()
    return target


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


@pytest.mark.parametrize("architecture", DEVICES)
def test_the_device_says_what_it_is(architecture: str) -> None:
    facts = DEVICES[architecture]
    with emulated_gpu(architecture):
        device = open_device()
        assert (device.name, device.architecture) == (facts.name, architecture)
        assert (device.multiprocessors, device.is_integrated) == (facts.multiprocessors, architecture == "sm_87")
        assert device.memory() == (facts.total_memory, facts.total_memory)
        with pytest.raises(CudaError, match="no GPU 1, only 1"):
            open_device(1)


def test_a_pool_is_one_allocation_that_ends_with_it(gpu: EmulatedDriver) -> None:
    device = open_device()
    pool = Pool(MEBIBYTE)
    first, second = pool.take((3, 5), np.float32), pool.take((7,), np.int32)
    assert first.address % 256 == second.address % 256 == 0 and second.address >= first.address + first.nbytes
    assert device.memory() == (63 * MEBIBYTE, 64 * MEBIBYTE)
    with pytest.raises(EdgeError, match=r"has no 1048576 left: 284 are in use"):
        pool.take((MEBIBYTE,), np.uint8)
    del pool
    assert device.memory()[0] == 63 * MEBIBYTE, "its arrays keep it"
    del first, second
    assert device.memory()[0] == 64 * MEBIBYTE
    with pytest.raises(CudaError, match="a pool of 65 MiB cannot be had") as refused:
        Pool(65 * MEBIBYTE)
    assert refused.value.code == "CUDA_ERROR_OUT_OF_MEMORY"


def test_copies_happen_when_something_waits(gpu: EmulatedDriver) -> None:
    device = open_device()
    pool, stream = Pool(MEBIBYTE), Stream()
    source, pageable, result = pinned((4,), np.float32), np.ones(4, np.float32), pinned((4,), np.float32)
    first, second = pool.take((4,), np.float32), pool.take((4,), np.float32)
    assert np.isnan(on_host(stream, first)).all(), "fresh memory must not look like data"

    source[:] = 1
    stream.upload(first, source)
    stream.upload(second, pageable)
    source[:] = 2
    pageable[:] = 2
    stream.download(result, first)
    assert (result == 0).all(), "nothing has waited yet"
    stream.synchronize()
    assert (result == 2).all(), "pinned memory is read when the copy runs"
    assert (on_host(stream, second) == 1).all(), "pageable memory is read at the call"

    stream.zero(first)
    stream.copy(second, first)
    device.synchronize()
    assert (on_host(stream, second) == 0).all()
    with pytest.raises(ValueError, match="cannot copy between 16 device bytes"):
        stream.upload(first, np.ones(3, np.float32))


@pytest.mark.parametrize("waits", [False, True])
def test_streams_are_ordered_by_events_only(gpu: EmulatedDriver, waits: bool) -> None:
    device = open_device()
    pool, producer, consumer = Pool(MEBIBYTE), Stream(), Stream()
    value = pool.take((4,), np.int32)
    one, two = pinned((4,), np.int32), pinned((4,), np.int32)
    one[:], two[:] = 1, 2
    producer.upload(value, one)
    producer.synchronize()
    producer.upload(value, two)
    done = producer.record()
    if waits:
        consumer.wait(done)
    assert (on_host(consumer, value) == (2 if waits else 1)).all()
    later = producer.record()
    later.synchronize()
    assert (on_host(consumer, value) == 2).all()
    assert later.milliseconds_since(done) >= 0
    assert gpu.counts().pending == 0
    del device


@pytest.mark.parametrize("architecture", ["sm_86", "sm_87"])
def test_real_kernels_compute_what_they_mean(architecture: str) -> None:
    with emulated_gpu(architecture, KERNELS):
        kernels = Kernels(cubin(KERNELS, architecture), open_device())
        pool, stream = Pool(8 * MEBIBYTE), Stream()
        x, weight, gate_up = normal(0, ROWS, HIDDEN), normal(1, HIDDEN), normal(2, ROWS, 2 * HIDDEN)
        y, z = pool.take((ROWS, HIDDEN), np.float16), pool.take((ROWS, HIDDEN), np.float16)
        run(kernels, NORM, {"x": on_device(pool, stream, x), "weight": on_device(pool, stream, weight), "y": y}, stream)
        run(kernels, SWIGLU, {"gate_up": on_device(pool, stream, gate_up), "y": z}, stream)
        np.testing.assert_allclose(on_host(stream, y), rms_norm(x, weight, 1e-5), rtol=2e-3)
        np.testing.assert_allclose(on_host(stream, z), swiglu(gate_up), rtol=4e-3, atol=1e-6)


def test_a_kernel_gets_the_shared_memory_it_asks_for(gpu: EmulatedDriver) -> None:
    assert GEMV.shared_bytes > 48 << 10
    kernels = Kernels(cubin(KERNELS, "sm_86"), open_device())
    pool, stream, rng = Pool(8 * MEBIBYTE), Stream(), np.random.default_rng(0)
    x = rng.integers(-2, 3, (WIDE.tokens, WIDE.k)).astype(np.float16)
    codes, scales = rng.integers(0, 3, (WIDE.n, WIDE.k)).astype(np.uint8), np.full(WIDE.n, 0.5, np.float32)
    buffers = {
        "x": on_device(pool, stream, x),
        "weights": on_device(pool, stream, pack_codes(codes, WIDE.bits)),
        "scales": on_device(pool, stream, pack_scales(scales, WIDE.k, WIDE.bits)),
        "y": pool.take((WIDE.tokens, WIDE.n), np.float16),
    }
    run(kernels, GEMV, buffers, stream)
    assert (on_host(stream, buffers["y"]) == linear(x, codes, scales, WIDE.bits)).all()


def test_a_graph_computes_with_what_its_buffers_hold_at_each_replay(gpu: EmulatedDriver) -> None:
    kernels = Kernels(cubin(KERNELS, "sm_86"), open_device())
    pool, stream = Pool(MEBIBYTE), Stream()
    x, weight, result = pinned((ROWS, HIDDEN), np.float16), normal(1, HIDDEN), pinned((ROWS, HIDDEN), np.float16)
    buffers = {"x": pool.take(x.shape, x.dtype), "weight": on_device(pool, stream, weight)}
    buffers["y"] = pool.take(x.shape, x.dtype)
    with stream.capture() as graphs:
        stream.upload(buffers["x"], x)
        run(kernels, NORM, buffers, stream)
        stream.download(result, buffers["y"])
    stream.synchronize()
    assert gpu.counts().launches == 0 and not result.any(), "captured work is not run"
    (graph,) = graphs
    for seed in range(3):
        x[...] = normal(seed, *x.shape)
        graph.launch(stream)
        stream.synchronize()
        np.testing.assert_allclose(result, rms_norm(x, weight, 1e-5), rtol=2e-3)
    assert (gpu.counts().launches, gpu.counts().graph_launches) == (3, 3)


def test_what_cannot_be_captured_is_an_error_and_the_stream_goes_on(gpu: EmulatedDriver) -> None:
    device = open_device()
    pool, stream = Pool(MEBIBYTE), Stream()
    target, image = pool.take((4,), np.int32), cubin(KERNELS, "sm_86")
    illegal = {
        "cuMemAlloc": lambda: Pool(256),
        "cuMemHostAlloc": lambda: pinned((4,), np.int32),
        "cuStreamSynchronize": stream.synchronize,
        "cuCtxSynchronize": device.synchronize,
        "cuModuleLoadData": lambda: Kernels(image, device),
        "cuMemcpyHtoDAsync": lambda: stream.upload(target, np.ones(4, np.int32)),
    }
    for name, call in illegal.items():
        with pytest.raises(CudaError) as refused, stream.capture() as graphs:
            call()
        assert refused.value.code == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", name
        assert not graphs
        with pytest.raises(CudaError) as spoilt, stream.capture(), suppress(CudaError):  # nobody minds the error
            call()
        assert spoilt.value.code == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", name
        stream.zero(target)
        assert not on_host(stream, target).any(), name


def test_modules_are_for_the_device_and_say_what_they_lack(gpu: EmulatedDriver) -> None:
    device, stream = open_device(), Stream()
    with pytest.raises(CudaError, match="CUDA_ERROR_NO_BINARY_FOR_GPU; export the bundle for this device"):
        Kernels(cubin(KERNELS, "sm_87"), device)
    image = cubin(KERNELS, "sm_86")
    for damaged in (b"\x7fELF", b"x" * 64, image[: len(image) // 2], image[:18] + b"\x3e\x00" + image[20:]):
        with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_IMAGE"):
            Kernels(damaged, device)
    kernels = Kernels(cubin([NORM.kernel], "sm_86"), device)
    with pytest.raises(CudaError, match=f"has no kernel {SWIGLU.kernel.symbol}.*NOT_FOUND"):
        run(kernels, SWIGLU, dict.fromkeys(("gate_up", "y"), DeviceArray(0, (1,), np.dtype(np.float16))), stream)


def test_machine_code_runs_on_later_devices_of_its_generation() -> None:
    image = cubin(KERNELS, "sm_86")
    for architecture, runs in {"sm_86": True, "sm_87": False, "sm_89": True, "sm_120": False}.items():
        with emulated_gpu(architecture):
            device = open_device()
            if runs:
                Kernels(image, device)
            else:
                with pytest.raises(CudaError, match="NO_BINARY_FOR_GPU"):
                    Kernels(image, device)


def test_arrays_go_in_and_out_without_a_copy(gpu: EmulatedDriver) -> None:
    device, pool = open_device(), Pool(MEBIBYTE)
    ours = pool.take((2, 3), np.float32)
    interface = ours.__cuda_array_interface__
    assert interface["data"] == (ours.address, False) and interface["typestr"] == "<f4"

    class Foreign:
        def __init__(self, **changes: object) -> None:
            self.__cuda_array_interface__ = {**interface, **changes}

    foreign = Foreign(strides=(12, 4))
    taken = device_array(foreign)
    assert (taken.address, taken.shape, taken.dtype, taken.owner) == (ours.address, (2, 3), np.float32, foreign)
    with pytest.raises(EdgeError, match=r"strides \(4, 8\) is not C-contiguous"):
        device_array(Foreign(strides=(4, 8)))
    with pytest.raises(EdgeError, match="a list is no device array"):
        device_array([1])
    del device


def test_nothing_leaks(gpu: EmulatedDriver) -> None:
    device = open_device()
    before = gpu.counts()
    kernels = Kernels(cubin(KERNELS, "sm_86"), device)
    pool, stream, host = Pool(MEBIBYTE), Stream(), pinned((4,), np.int32)
    with stream.capture() as graphs:
        stream.download(host, pool.take((4,), np.int32))
    graphs[0].launch(stream)
    stream.record().synchronize()
    held = gpu.counts()
    assert (held.allocations, held.pinned_allocations, held.streams, held.modules) == (1, 1, 1, 1)
    assert (held.graphs, held.graph_execs, held.pending) == (0, 1, 0)
    del kernels, pool, stream, host, graphs
    gc.collect()
    after = gpu.counts()
    alive = ("allocations", "bytes", "pinned_allocations", "streams", "events", "graphs", "graph_execs", "modules")
    assert {name: getattr(after, name) for name in alive} == {name: getattr(before, name) for name in alive}
    assert after.peak_bytes == MEBIBYTE


def test_without_a_driver_the_error_says_so() -> None:
    code = "from edge.cuda import open_device; open_device()"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert result.returncode == 1
    assert "there is no CUDA driver" in result.stderr and "install NVIDIA's driver" in result.stderr
