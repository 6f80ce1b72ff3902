"""The emulated driver is as strict as a device: order of streams, capture, memory, faults. By cuda-bindings alone."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as cu
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.build.nvrtc import cubin
from plugins.build.sass import read_cubin
from plugins.launch import Kernel
from plugins.linear.launch import LinearShape, gemv
from plugins.rms_norm.launch import rms_norm
from plugins.simt.driver.library import EmulatedDriver
from tests.emulated import emulated_gpu

NORM = rms_norm(2, 64, "half", 1e-5)
GEMV = gemv(LinearShape(8, 256, 1024, 2, 0, "half"), 16)
FAULTY = Kernel("../tests/simt_faults.cu", "faulty<128>", "FaultyArguments", threads=128)
DIVERGENT_BARRIER = 2
KERNELS = [NORM.kernel, FAULTY]
BLOCKING, NON_BLOCKING = 0, 1
GLOBAL, THREAD_LOCAL, RELAXED = cu.CUstreamCaptureMode
MEBIBYTE = 1 << 20


def status(result: tuple[Any, ...]) -> str:
    """The error that a call returned, without its prefix."""
    return result[0].name.removeprefix("CUDA_").removeprefix("ERROR_")


def done(result: tuple[Any, ...]) -> Any:
    assert status(result) == "SUCCESS"
    return result[1] if len(result) == 2 else result[1:]


@pytest.fixture
def gpu() -> Iterator[EmulatedDriver]:
    with emulated_gpu(kernels=KERNELS, memory=64 * MEBIBYTE) as driver:
        start()
        yield driver


def start() -> None:
    done(cu.cuInit(0))
    done(cu.cuCtxSetCurrent(done(cu.cuDevicePrimaryCtxRetain(0))))


def device_words(*values: int) -> int:
    """The address of int32 values on the device."""
    address = int(done(cu.cuMemAlloc(4 * len(values))))
    done(cu.cuMemcpyHtoD(address, np.array(values, np.int32), 4 * len(values)))
    return address


def word(address: int) -> int:
    """The first value there, after all work of the default stream."""
    value = np.empty(1, np.int32)
    done(cu.cuMemcpyDtoH(value, address, 4))
    return int(value[0])


def fill(address: int, value: int, stream: Any) -> None:
    done(cu.cuMemsetD32Async(address, value, 1, stream))


def new_stream(flags: int = NON_BLOCKING) -> Any:
    return done(cu.cuStreamCreate(flags))


def module(kernels: list[Kernel]) -> Any:
    return done(cu.cuModuleLoadData(cubin(kernels, "sm_86")))


def launch(function: Any, struct: bytes, threads: int = 32, shared: int = 4, stream: Any = 0) -> str:
    data = ctypes.create_string_buffer(struct, len(struct))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(data))
    return status(cu.cuLaunchKernel(function, 2, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(parameters), 0))


def norm_struct(x: int, weight: int, y: int) -> bytes:
    return NORM.pack({"x": x, "weight": weight, "y": y})


@pytest.mark.parametrize(("flags", "seen"), [(BLOCKING, 2), (NON_BLOCKING, 1)])
def test_the_default_stream_waits_for_blocking_streams_only(gpu: EmulatedDriver, flags: int, seen: int) -> None:
    address, stream = device_words(1), new_stream(flags)
    fill(address, 2, stream)
    assert word(address) == seen
    done(cu.cuMemsetD32(address, 3, 1))  # on the default stream, without waiting
    fill(address, 4, stream)
    done(cu.cuStreamSynchronize(stream))
    assert gpu.counts().pending == (0 if flags == BLOCKING else 1)
    assert word(address) == (4 if flags == BLOCKING else 3)


def test_a_copy_to_pageable_memory_waits_and_one_within_the_device_does_not(gpu: EmulatedDriver) -> None:
    source, target, stream = device_words(1), device_words(0), new_stream()
    fill(source, 5, stream)
    value = np.zeros(1, np.int32)
    done(cu.cuMemcpyDtoHAsync(value, source, 4, stream))
    assert value[0] == 5
    done(cu.cuMemcpyDtoD(target, source, 4))
    assert gpu.counts().pending == 1
    assert word(target) == 5


def test_asking_is_not_waiting(gpu: EmulatedDriver) -> None:
    address, stream, event = device_words(0), new_stream(), done(cu.cuEventCreate(0))
    assert status(cu.cuEventQuery(event)) == "SUCCESS", "never recorded"
    fill(address, 1, stream)
    fill(address, 2, stream)
    done(cu.cuEventRecord(event, stream))
    assert status(cu.cuEventElapsedTime(event, event)) == "NOT_READY"
    assert [status(cu.cuStreamQuery(stream)) for _ in range(2)] == ["NOT_READY"] * 2
    assert [status(cu.cuEventQuery(event)) for _ in range(2)] == ["NOT_READY", "SUCCESS"]
    assert status(cu.cuStreamQuery(stream)) == "SUCCESS"


def test_host_functions_run_in_order_and_may_not_call_the_driver(gpu: EmulatedDriver) -> None:
    address, stream, seen = device_words(0), new_stream(), []
    host = done(cu.cuMemHostAlloc(4, 0))

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def note(number: int | None) -> None:
        seen.append((number, ctypes.c_int32.from_address(host).value, status(cu.cuMemAlloc(4))))

    function = cu.CUhostFn(_ptr=ctypes.addressof(ctypes.c_void_p.from_buffer(note)))
    for number in (1, 2):
        fill(address, 10 * number, stream)
        done(cu.cuMemcpyDtoHAsync(host, address, 4, stream))
        done(cu.cuLaunchHostFunc(stream, function, number))
    assert not seen
    done(cu.cuStreamSynchronize(stream))
    assert seen == [(1, 10, "NOT_PERMITTED"), (2, 20, "NOT_PERMITTED")]


# (stream, target, source) of copies among four words.
COPIES = st.lists(st.tuples(*(st.integers(0, n) for n in (2, 3, 3))), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(copies=COPIES, last=st.integers(0, 2), captured=st.booleans())
def test_a_chain_of_events_is_the_order_of_the_calls(
    copies: list[tuple[int, int, int]], last: int, captured: bool
) -> None:
    with emulated_gpu():
        start()
        words = [device_words(i) for i in range(4)]
        streams, model = [new_stream() for _ in range(3)], [0, 1, 2, 3]
        if captured:
            done(cu.cuStreamBeginCapture(streams[last], THREAD_LOCAL))
        former = done(cu.cuEventCreate(0))
        done(cu.cuEventRecord(former, streams[last]))
        for stream, target, source in [*copies, (last, 0, 0)]:
            done(cu.cuStreamWaitEvent(streams[stream], former, 0))
            done(cu.cuMemcpyDtoDAsync(words[target], words[source], 4, streams[stream]))
            done(cu.cuEventRecord(former, streams[stream]))
            model[target] = model[source]
        if captured:
            graph = done(cu.cuStreamEndCapture(streams[last]))
            done(cu.cuGraphLaunch(done(cu.cuGraphInstantiate(graph, 0)), streams[last]))
        done(cu.cuStreamSynchronize(streams[last]))
        assert [word(address) for address in words] == model


def test_a_capture_knows_its_nodes_and_who_has_not_come_back(gpu: EmulatedDriver) -> None:
    address, first, second = device_words(0), new_stream(), new_stream()
    event, outside = done(cu.cuEventCreate(0)), done(cu.cuEventCreate(0))
    done(cu.cuEventRecord(outside, second))

    def fork(joins: bool) -> tuple[Any, ...]:
        done(cu.cuStreamBeginCapture(first, THREAD_LOCAL))
        fill(address, 7, first)
        done(cu.cuEventRecord(event, first))
        done(cu.cuStreamWaitEvent(second, event, 0))
        fill(address, 8, second)
        state, number, *_, follows = done(cu.cuStreamGetCaptureInfo(second))
        assert state.name.endswith("ACTIVE") and int(number) > 0 and follows == 1
        assert status(cu.cuStreamEndCapture(second)) == "STREAM_CAPTURE_UNMATCHED"
        if joins:
            done(cu.cuEventRecord(event, second))
            done(cu.cuStreamWaitEvent(first, event, 0))
        return cu.cuStreamEndCapture(first)

    assert status(fork(False)) == "STREAM_CAPTURE_UNJOINED"
    graph = done(fork(True))
    nodes, count = done(cu.cuGraphGetNodes(graph, 8))
    assert count == 2 and {done(cu.cuGraphNodeGetType(node)).name[19:] for node in nodes[:2]} == {"MEMSET"}
    done(cu.cuGraphLaunch(done(cu.cuGraphInstantiate(graph, 0)), first))
    done(cu.cuStreamSynchronize(first))
    assert word(address) == 8
    done(cu.cuStreamBeginCapture(first, THREAD_LOCAL))
    assert status(cu.cuStreamWaitEvent(first, outside, 0)) == "STREAM_CAPTURE_ISOLATION"
    assert status(cu.cuStreamEndCapture(first)) == "STREAM_CAPTURE_INVALIDATED"


@pytest.mark.parametrize(
    ("mode", "here", "elsewhere"),
    [(GLOBAL, False, False), (THREAD_LOCAL, False, True), (RELAXED, True, True)],
)
def test_a_capture_forbids_by_its_mode(gpu: EmulatedDriver, mode: Any, here: bool, elsewhere: bool) -> None:
    def allocate() -> None:
        start()
        said.append(status(cu.cuMemAlloc(4)))

    for runs, allowed in ((allocate, here), (lambda: in_thread(allocate), elsewhere)):
        said: list[str] = []
        stream = new_stream()
        done(cu.cuStreamBeginCapture(stream, mode))
        runs()
        assert said == ["SUCCESS" if allowed else "STREAM_CAPTURE_UNSUPPORTED"]
        ended = status(cu.cuStreamEndCapture(stream))
        assert ended == ("SUCCESS" if allowed else "STREAM_CAPTURE_INVALIDATED")


def in_thread(function: Any) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_copies_stay_inside_one_allocation(gpu: EmulatedDriver) -> None:
    address, host = device_words(1, 2), np.zeros(4, np.int32)
    assert status(cu.cuMemcpyHtoD(address, host, 12)) == "INVALID_VALUE"
    assert status(cu.cuMemcpyDtoH(host, address + 4, 8)) == "INVALID_VALUE"
    assert status(cu.cuMemcpyHtoDAsync(host.ctypes.data, host, 4, 0)) == "INVALID_VALUE", "no device memory"
    assert status(cu.cuMemsetD8(address, 0, 9)) == "INVALID_VALUE"
    assert [int(x) for x in done(cu.cuMemGetAddressRange(address + 5))] == [address, 8]
    done(cu.cuMemFree(address))
    assert status(cu.cuMemFree(address)) == "INVALID_VALUE"
    assert status(cu.cuMemcpyDtoH(host, address, 4)) == "INVALID_VALUE"
    assert status(cu.cuMemAlloc(0)) == "INVALID_VALUE"
    assert status(cu.cuMemAlloc(65 * MEBIBYTE)) == "OUT_OF_MEMORY"


def test_memory_that_is_freed_too_early_shows(gpu: EmulatedDriver, capfd: pytest.CaptureFixture[str]) -> None:
    user, owner = new_stream(), new_stream()
    address = int(done(cu.cuMemAllocAsync(8, owner)))
    fill(address, 1, user)
    done(cu.cuMemFreeAsync(address, owner))
    done(cu.cuStreamSynchronize(owner))
    assert status(cu.cuStreamSynchronize(user)) == "ILLEGAL_ADDRESS"
    assert "a copy to 0x" in (said := capfd.readouterr().err) and "freed or never allocated" in said


def test_what_is_known_of_host_memory(gpu: EmulatedDriver) -> None:
    pinned, own, stream = done(cu.cuMemHostAlloc(64, 0)), np.zeros(4, np.int32), new_stream()
    kind = cu.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    assert done(cu.cuPointerGetAttribute(kind, pinned)) == cu.CUmemorytype.CU_MEMORYTYPE_HOST
    assert done(cu.cuPointerGetAttribute(kind, device_words(1))) == cu.CUmemorytype.CU_MEMORYTYPE_DEVICE
    assert status(cu.cuPointerGetAttribute(kind, own.ctypes.data)) == "INVALID_VALUE"
    assert status(cu.cuMemHostUnregister(own.ctypes.data)) == "HOST_MEMORY_NOT_REGISTERED"
    done(cu.cuMemHostRegister(own.ctypes.data, own.nbytes, 0))
    assert status(cu.cuMemHostRegister(own.ctypes.data, 4, 0)) == "HOST_MEMORY_ALREADY_REGISTERED"
    done(cu.cuMemcpyDtoHAsync(own, device_words(9), 4, stream))
    assert own[0] == 0, "registered memory is pinned: nothing waits"
    done(cu.cuMemHostUnregister(own.ctypes.data))
    assert own[0] == 9, "which waits for all work"


def test_a_kernel_of_freed_memory_ends_the_context(gpu: EmulatedDriver, capfd: pytest.CaptureFixture[str]) -> None:
    function = done(cu.cuModuleGetFunction(module(KERNELS), NORM.kernel.symbol.encode()))
    good, freed = (int(done(cu.cuMemAlloc(512))) for _ in range(2))
    done(cu.cuMemFree(freed))
    assert launch(function, norm_struct(freed, good, good)) == "SUCCESS", "it is only queued"
    assert status(cu.cuCtxSynchronize()) == "ILLEGAL_ADDRESS"
    assert NORM.kernel.symbol in (said := capfd.readouterr().err) and "freed or never allocated" in said
    for result in (cu.cuMemAlloc(4), cu.cuStreamCreate(0), cu.cuStreamSynchronize(0)):
        assert status(result) == "ILLEGAL_ADDRESS", "until the context is made anew"
    done(cu.cuDevicePrimaryCtxReset(0))
    assert word(device_words(3)) == 3
    assert launch(function, norm_struct(good, good, good)) == "INVALID_HANDLE", "modules went with the context"


def test_a_write_past_the_end_is_noticed(gpu: EmulatedDriver, capfd: pytest.CaptureFixture[str]) -> None:
    function = done(cu.cuModuleGetFunction(module(KERNELS), NORM.kernel.symbol.encode()))
    good, short = int(done(cu.cuMemAlloc(256))), int(done(cu.cuMemAlloc(192)))
    done(cu.cuMemsetD8(good, 0, 256))
    assert launch(function, norm_struct(good, good, short)) == "SUCCESS"
    assert status(cu.cuCtxSynchronize()) == "ILLEGAL_ADDRESS"
    assert "written past the end of device memory of 192 bytes, at + 192" in capfd.readouterr().err


def test_a_deadlock_is_a_failed_launch(gpu: EmulatedDriver, capfd: pytest.CaptureFixture[str]) -> None:
    function = done(cu.cuModuleGetFunction(module(KERNELS), FAULTY.symbol.encode()))
    memory = int(done(cu.cuMemAlloc(MEBIBYTE)))
    done(cu.cuMemsetD8(memory, 0, MEBIBYTE))
    struct = np.array([memory] * 5 + [DIVERGENT_BARRIER], np.int64).tobytes()
    assert launch(function, struct, threads=128, shared=2 * 128 * 16 + 128 * 4) == "SUCCESS"
    assert status(cu.cuCtxSynchronize()) == "LAUNCH_FAILED"
    assert "barrier at" in capfd.readouterr().err


def test_launches_that_no_device_would_take(gpu: EmulatedDriver, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = module([*KERNELS, GEMV.kernel])
    function = done(cu.cuModuleGetFunction(loaded, NORM.kernel.symbol.encode()))
    struct, most = norm_struct(0, 0, 0), cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert launch(function, struct, threads=64) == "INVALID_VALUE", "its launch bounds are 32"
    assert launch(function, struct, shared=49 << 10) == "INVALID_VALUE"
    assert status(cu.cuFuncSetAttribute(function, most, 100 << 10)) == "INVALID_VALUE"
    done(cu.cuFuncSetAttribute(function, most, 99 << 10))
    assert launch(function, struct, shared=99 << 10) == "SUCCESS"
    packed = ctypes.create_string_buffer(struct, len(struct))
    for size, said in ((len(struct), "SUCCESS"), (len(struct) - 8, "INVALID_VALUE")):
        length = ctypes.c_size_t(size)
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(packed), 2, ctypes.addressof(length), 0)
        queued = cu.cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 4, 0, 0, ctypes.addressof(extra))
        assert status(queued) == said
    other = done(cu.cuModuleGetFunction(loaded, GEMV.kernel.symbol.encode()))
    assert launch(other, struct) == "NOT_SUPPORTED"
    assert "has no CPU build here; give its Kernel to the emulated driver" in capfd.readouterr().err


def test_kernels_have_the_facts_of_their_machine_code(gpu: EmulatedDriver) -> None:
    for kernels in ([NORM.kernel], [*KERNELS, GEMV.kernel]):
        image = cubin(kernels, "sm_86")
        library = done(cu.cuLibraryLoadData(image, None, None, 0, None, None, 0))
        for name, code in read_cubin(image).items():
            kernel = done(cu.cuLibraryGetKernel(library, name.encode()))
            function = done(cu.cuKernelGetFunction(kernel))
            facts = cu.CUfunction_attribute
            wanted = {
                facts.CU_FUNC_ATTRIBUTE_NUM_REGS: code.registers,
                facts.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: code.stack,
                facts.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: code.shared,
                facts.CU_FUNC_ATTRIBUTE_BINARY_VERSION: 86,
                facts.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: next(k.threads for k in kernels if k.symbol == name),
            }
            assert {which: done(cu.cuFuncGetAttribute(which, function)) for which in wanted} == wanted
        done(cu.cuLibraryUnload(library))


def test_contexts_and_handles_end(gpu: EmulatedDriver) -> None:
    stream, event = new_stream(), done(cu.cuEventCreate(0))
    done(cu.cuStreamDestroy(stream))
    assert status(cu.cuStreamSynchronize(stream)) == status(cu.cuStreamDestroy(stream)) == "INVALID_HANDLE"
    address = device_words(1)
    own = done(cu.cuCtxCreate(None, 0, 0))
    assert [int(x) for x in done(cu.cuMemGetInfo())] == [64 * MEBIBYTE - 512, 64 * MEBIBYTE]
    done(cu.cuCtxDestroy(own))
    assert word(address) == 1, "the one below is current again"
    done(cu.cuDevicePrimaryCtxRetain(0))
    done(cu.cuDevicePrimaryCtxRelease(0))
    assert gpu.counts().allocations == 1
    while status(cu.cuDevicePrimaryCtxRelease(0)) == "SUCCESS":
        pass
    assert (gpu.counts().allocations, gpu.counts().events) == (0, 0)
    assert status(cu.cuEventQuery(event)) == "CONTEXT_IS_DESTROYED"
    done(cu.cuCtxSetCurrent(None))
    assert status(cu.cuMemAlloc(4)) == "INVALID_CONTEXT"


def test_what_is_not_emulated_says_so(gpu: EmulatedDriver) -> None:
    assert status(cu.cuGraphCreate(0)) == "NOT_SUPPORTED"
    assert done(cu.cuGetErrorName(cu.CUresult.CUDA_ERROR_NOT_SUPPORTED)) == b"CUDA_ERROR_NOT_SUPPORTED"
