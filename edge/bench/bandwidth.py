"""Memory bandwidth and peak arithmetic of what an engine runs on: from a data sheet, else measured here."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.cuda import CudaError, Device, Pool, Stream
from edge.machine import available_memory
from plugins.build.cost import BOARDS, PARTITIONS, Board, board_of

LEAST_BYTES, MOST_BYTES = 64 << 20, 1 << 30  # of the buffer of a read test
PASSES = 5
# Operations of one tensor instruction (m16n8k16, float16 with float32 sums), and cycles that it takes a partition of an
# SM: data-sheet rates; Orin's is derived from its int8 rate (spec: kernel_technology.md 6.3).
_HMMA_FLOPS, _HMMA_CYCLES, _HMMA_CYCLES_ORIN = 4096, 32, 8


@dataclass(frozen=True)
class Limits:
    """What the hardware can do at most. gb_s: bytes a second in 10^9; tflops: float16 products with float32 sums in
    10^12, None if it is not known. bandwidth_source, compute_source: where the figures are from, as sentences.
    """

    gb_s: float
    bandwidth_source: str
    tflops: float | None
    compute_source: str


def peak_tflops(board: Board) -> float:
    """Of a board's tensor cores: SMs x clock x partitions x operations an instruction / its cycles."""
    cycles = _HMMA_CYCLES_ORIN if board.architecture == "sm_87" else _HMMA_CYCLES
    return board.sms * board.clock * PARTITIONS * _HMMA_FLOPS / cycles / 1000


def board_named(device: Device, board_model: str) -> Board | None:
    """The published board that a device is, by the whole name: an RTX 4090 Laptop GPU is no RTX 4090.

    board_model: the device tree's; a Jetson's GPU is called 'Orin' on all of them. An emulated device stands for the
    board of its architecture.
    """
    if "emulated" in device.name.lower():
        return board_of(device.architecture)
    return next((b for b in BOARDS if device.name.endswith(b.name) or b.name in board_model), None)


def device_limits(device: Device, board_model: str) -> Limits:
    """Of a GPU: published, or the bandwidth of a copy on it; CudaError if that cannot be made."""
    board = board_named(device, board_model)
    if board is None:
        rate = copy_bandwidth(MOST_BYTES // 4)
        source = f"measured here: a copy of {_mib(MOST_BYTES // 4)} on the device, bytes read and written"
        return Limits(rate, source, None, f"the peak of {device.name} is not known here")
    peak = peak_tflops(board)
    published = f"published for {board.name}"
    if "emulated" in device.name.lower():
        published += ", whose kernels are emulated here: shares of it say nothing"
    return Limits(board.bandwidth, published, peak, f"{published}: float16 tensor cores with float32 sums")


def cpu_limits(threads: int) -> Limits:
    """Of this machine's CPU, measured now: the best of some passes over a buffer beyond its caches.

    Every thread takes the maximum of its own part with numpy, whose loop of vector instructions reads once and writes
    nothing; the interpreter is not held meanwhile.
    """
    size = buffer_bytes(last_level_cache(), available_memory())
    values = np.ones(size // 8, np.int64)  # written, so that every page is there
    parts = np.array_split(values, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            started = time.perf_counter()
            list(pool.map(np.maximum.reduce, parts))
            best = min(best, time.perf_counter() - started)
    source = f"measured here: best of {PASSES} reads of {_mib(size)} by {threads} thread{'s' * (threads > 1)}"
    return Limits(size / best / 1e9, source, None, "the peak of this CPU is not published in its facts")


def buffer_bytes(cache: int, available: int) -> int:
    """Bytes to read: four times the last cache, in bounds, and never more than a quarter of the memory there is."""
    return max(8 << 10, min(max(4 * cache, LEAST_BYTES), MOST_BYTES, available // 4)) // 8 * 8


def last_level_cache(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache of the first core; 0 if the system does not tell."""
    sizes = [0]
    for path in root.glob("index*/size"):
        text = path.read_text().strip()
        number, unit = text[:-1], text[-1:]
        if number.isdigit() and unit in "KM":
            sizes.append(int(number) << (10 if unit == "K" else 20))
    return max(sizes)


def copy_bandwidth(size: int) -> float:
    """GB/s that a device reads and writes in a copy of `size` bytes; CudaError if it has no room for two buffers."""
    pool, stream = Pool(Pool.bytes_for([size, size])), Stream()
    source, target = (pool.take((size,), np.uint8) for _ in range(2))
    stream.zero(source)
    milliseconds = []
    for _ in range(1 + PASSES):  # the first one warms up
        start = stream.record()
        stream.copy(target, source)
        end = stream.record()
        end.synchronize()
        milliseconds.append(end.milliseconds_since(start))
    if (best := min(milliseconds[1:])) <= 0:
        raise CudaError("the device's clock saw no time pass", "CUDA_ERROR_INVALID_VALUE")
    return 2 * size / best / 1e6


def _mib(size: int) -> str:
    return f"{size >> 20:,} MiB"
