"""Vectors on a device: judged, then timed where the device is a real one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edge.cuda import ALIGNMENT, CudaError, Device, DeviceArray, Kernels, Pool, Stream
from edge.selftest.vectors import ModelKernels, decode_vectors, vectors_for
from plugins.launch import Launch
from plugins.vectors import Deviation, Vector, worst

# A decode step finds activations in the L2 cache, weights, keys and values not. So what is larger than this is copied
# until all copies together exceed any L2, and the copies take turns.
_CACHED_BYTES = 1 << 20
_ROTATED_BYTES = 512 << 20
_FEWEST_ROUNDS = 64  # of a timed graph: its launch, about 10 us, must not count
_REPETITIONS = 7

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Result:
    """One vector on the device. seconds: median time of its launches, None if it was not timed; moved: bytes."""

    name: str
    kernels: tuple[str, ...]
    deviation: Deviation
    moved: int
    seconds: float | None = None

    @property
    def gb_s(self) -> float | None:
        """Bandwidth, by the bytes that must move."""
        return None if self.seconds is None else self.moved / self.seconds / 1e9


@dataclass(frozen=True)
class ModelResult:
    """All vectors of one model."""

    title: str
    results: list[Result]


def is_emulated(device: Device) -> bool:
    """Whether the driver is the one of plugins/simt/driver: what it runs is right or wrong, but has no speed."""
    return "emulated" in device.name.lower()


def run_model(title: str, model: ModelKernels, kernels: Kernels, progress: Progress = lambda *_: None) -> ModelResult:
    """Every kernel of a model; on a real device also its decode step at full size, and all times."""
    emulated = is_emulated(kernels.device)
    vectors = vectors_for(model)
    if not emulated:
        vectors += decode_vectors(model, kernels.multiprocessors)
    results = []
    for i, vector in enumerate(vectors):
        progress(i, len(vectors), vector.name)
        results.append(run_vector(vector, kernels, timed=not emulated))
    progress(len(vectors), len(vectors), "")
    return ModelResult(title, results)


def run_vector(vector: Vector, kernels: Kernels, *, timed: bool) -> Result:
    """Run once and judge; then again and again, if it shall be timed."""
    before, stream = vector.buffers(), Stream()
    expected = vector.expect(before)
    pool = Pool(_pool_bytes(before.values()))
    placed = {name: pool.take(array.shape, array.dtype) for name, array in before.items()}
    got = {name: np.empty_like(before[name]) for name in expected}
    try:
        for name, array in before.items():
            stream.upload(placed[name], array)
        _launch(vector.launches, placed, kernels, stream)
        for name, array in got.items():
            stream.download(array, placed[name])
        stream.synchronize()
        seconds = _time(vector.launches, placed, kernels, stream) if timed else None
    except CudaError as error:
        raise CudaError(f"the vector {vector.name} of {', '.join(_symbols(vector))}: {error}", error.code) from None
    return Result(vector.name, _symbols(vector), worst(expected, got), vector.moved, seconds)


def _symbols(vector: Vector) -> tuple[str, ...]:
    return tuple(launch.kernel.symbol for launch in vector.launches)


def _pool_bytes(arrays: Iterable[np.ndarray | DeviceArray]) -> int:
    return sum(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)


def _launch(launches: Sequence[Launch], buffers: dict[str, DeviceArray], kernels: Kernels, stream: Stream) -> None:
    addresses = {name: array.address for name, array in buffers.items()}
    for launch in launches:
        kernels.launch(launch, launch.pack(addresses), int(stream.handle))


def _time(launches: Sequence[Launch], buffers: dict[str, DeviceArray], kernels: Kernels, stream: Stream) -> float:
    """Seconds of the launches: the median replay of a graph of many rounds, which take turns on copies of the buffers.

    A graph, because a decode step is one: gaps between launches are the device's, not this program's.
    """
    copies = [buffers, *_copies(buffers, stream)]
    rounds = max(_FEWEST_ROUNDS, len(copies))
    with stream.capture() as graphs:
        for i in range(rounds):
            _launch(launches, copies[i % len(copies)], kernels, stream)
    milliseconds = []
    for _ in range(1 + _REPETITIONS):
        start = stream.record()
        graphs[0].launch(stream)
        end = stream.record()
        end.synchronize()
        milliseconds.append(end.milliseconds_since(start))
    return statistics.median(milliseconds[1:]) / 1000 / rounds  # the first one warms up


def _copies(buffers: dict[str, DeviceArray], stream: Stream) -> list[dict[str, DeviceArray]]:
    size = _pool_bytes(buffers.values())
    count = _ROTATED_BYTES // size if size > _CACHED_BYTES else 0
    if not count:
        return []
    pool = Pool(count * size)
    copies = []
    for _ in range(count):
        copy = {name: pool.take(array.shape, array.dtype) for name, array in buffers.items()}
        for name, array in buffers.items():
            stream.copy(copy[name], array)
        copies.append(copy)
    return copies
