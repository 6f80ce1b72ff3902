"""The memories a kernel sees: global buffers with nothing between them, exact shared memory, copies under way.

Every access is checked: an address outside the buffers or misaligned for its size is a PtxFault. Addresses come as
int64 arrays, one an active thread, and become byte indices into one numpy array.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from plugins.simt.ptx_parser import PtxFault

Lanes = slice | np.ndarray  # the active threads of a batch: all, or their indices

GLOBAL_BASE = 0x7_0000_0000  # over 4 GiB: an address cut to 32 bits is outside
GAP = 1 << 16
SHARED_BASE = 1 << 10  # devices keep the first KiB for themselves, and null is outside
SHARED_WINDOW = 0x6_0000_0000  # where generic addresses mean shared memory
SHARED_WINDOW_BYTES = 1 << 24
POISON = 0xFF


def first_thread(wrong: np.ndarray, lanes: Lanes) -> tuple[int, int]:
    """The first access that is wrong, and its thread's index in the batch."""
    access = int(np.flatnonzero(wrong)[0])
    return access, access if isinstance(lanes, slice) else int(lanes[access])


class Space:
    """Bytes under a name, seen as words of any size."""

    name = ""

    def __init__(self, data: np.ndarray) -> None:
        self.words = {size: data.view(f"u{size}") for size in (1, 2, 4, 8)} | {16: data.view(np.uint64).reshape(-1, 2)}

    def locate(self, addresses: np.ndarray, size: int, lanes: Lanes, writes: bool) -> np.ndarray:
        """Byte indices of checked accesses of `size` bytes."""
        raise NotImplementedError

    def load(self, index: np.ndarray, size: int) -> np.ndarray:
        """[accesses, size] bytes from located places."""
        return self.words[size][index // size].view(np.uint8).reshape(-1, size)

    def store(self, index: np.ndarray, values: np.ndarray) -> None:
        """values: [accesses, size] bytes to located places; of two threads at one place, the later one wins."""
        size = values.shape[1]
        words = values.view(f"u{min(size, 8)}")
        self.words[size][index // size] = words if size == 16 else words[:, 0]

    def check_alignment(self, addresses: np.ndarray, size: int, lanes: Lanes) -> None:
        wrong = addresses & (size - 1)
        if wrong.any():
            access, thread = first_thread(wrong, lanes)
            raise PtxFault(f"misaligned {self.name} access of {size} bytes at {int(addresses[access]):#x}", thread)


class GlobalMemory(Space):
    """Copies of the launches' buffers, each at a multiple of 256 bytes with an unmapped gap behind it."""

    name = "global"

    def __init__(self, buffers: Mapping[str, np.ndarray]) -> None:
        self.buffers = buffers
        self.names = list(buffers)
        sizes = np.array([b.nbytes for b in buffers.values()], np.int64)
        spans = (sizes + 255) // 256 * 256 + GAP
        self.starts = (np.cumsum(spans) - spans + GLOBAL_BASE).tolist()
        self.ends = (self.starts + sizes).tolist()
        data = np.empty(int(spans.sum()), np.uint8)
        super().__init__(data)
        self.contents = {n: data[s - GLOBAL_BASE : e - GLOBAL_BASE] for n, s, e in self._extents()}
        for name, content in self.contents.items():
            content[:] = buffers[name].reshape(-1).view(np.uint8)
        self.bytes_read, self.bytes_written = (dict.fromkeys(self.names, 0) for _ in range(2))

    def _extents(self) -> list[tuple[str, int, int]]:
        return list(zip(self.names, self.starts, self.ends, strict=True))

    def addresses(self) -> dict[str, int]:
        return dict(zip(self.names, self.starts, strict=True))

    def locate(self, addresses: np.ndarray, size: int, lanes: Lanes, writes: bool) -> np.ndarray:
        moved = self.bytes_written if writes else self.bytes_read
        low, high = int(addresses.min()), int(addresses.max())
        buffer = bisect_right(self.starts, low) - 1
        if buffer >= 0 and high + size <= self.ends[buffer]:
            moved[self.names[buffer]] += size * len(addresses)
        else:  # several buffers, or outside
            owners = np.searchsorted(self.starts, addresses, side="right") - 1
            outside = (owners < 0) | (addresses + size > np.append(self.ends, 0)[owners])
            if outside.any():
                access, thread = first_thread(outside, lanes)
                what = f"global {'write' if writes else 'read'} of {size} bytes {self.place(int(addresses[access]))}"
                raise PtxFault(what, thread)
            for owner, count in zip(*np.unique(owners, return_counts=True), strict=True):
                moved[self.names[owner]] += size * int(count)
        self.check_alignment(addresses, size, lanes)
        return addresses - GLOBAL_BASE

    def place(self, address: int) -> str:
        """An address outside all buffers, told by the nearest one."""
        if 0 <= address < GAP:
            return f"through a null pointer (address {address:#x})"
        distances = [(max(start - address, address - end), name, start) for name, start, end in self._extents()]
        distance, name, start = min(distances, default=(GAP, "", 0))
        if distance >= GAP:
            return f"at {address:#x}, far from every buffer"
        return f"at byte {address - start} of '{name}', which has {self.buffers[name].nbytes} bytes"

    def copy_back(self) -> None:
        """Copies what kernels wrote into the buffers."""
        for name, content in self.contents.items():
            if self.bytes_written[name]:
                self.buffers[name].reshape(-1).view(np.uint8)[:] = content


class SharedMemory(Space):
    """The dynamic shared memory of every block of a batch; addresses start at SHARED_BASE in each."""

    name = "shared"

    def __init__(self, size: int, blocks: int, threads: int) -> None:
        self.size = size
        stride = (size + 15) // 16 * 16
        self.data = np.empty(blocks * stride, np.uint8)
        super().__init__(self.data)
        self.block_start = np.repeat(np.arange(blocks, dtype=np.int64) * stride - SHARED_BASE, threads)

    def locate(self, addresses: np.ndarray, size: int, lanes: Lanes, writes: bool) -> np.ndarray:
        if int(addresses.min()) < SHARED_BASE or int(addresses.max()) + size > SHARED_BASE + self.size:
            outside = (addresses < SHARED_BASE) | (addresses + size > SHARED_BASE + self.size)
            access, thread = first_thread(outside, lanes)
            what = f"shared {'write' if writes else 'read'} of {size} bytes at byte {addresses[access] - SHARED_BASE}"
            raise PtxFault(f"{what}; the launch gives a block {self.size} bytes", thread)
        self.check_alignment(addresses, size, lanes)
        return addresses + self.block_start[lanes]


class ParameterSpace(Space):
    """The launch's struct; addresses are offsets in it."""

    name = "parameter"

    def __init__(self, packed: bytes) -> None:
        self.size = len(packed)
        super().__init__(np.frombuffer(packed + bytes(-len(packed) % 16), np.uint8))

    def locate(self, addresses: np.ndarray, size: int, lanes: Lanes, writes: bool) -> np.ndarray:
        if int(addresses.min()) < 0 or int(addresses.max()) + size > self.size or writes:
            raise PtxFault(f"access of {size} bytes at byte {int(addresses.max())} of a struct of {self.size} bytes")
        self.check_alignment(addresses, size, lanes)
        return addresses


@dataclass(frozen=True)
class _Copy:
    """cp.async by some threads: the group each belongs to, whether it reads, and the places it copies between."""

    threads: np.ndarray
    groups: np.ndarray
    reads: np.ndarray
    sources: np.ndarray
    destinations: np.ndarray
    size: int

    def part(self, chosen: np.ndarray) -> _Copy:
        threads, groups, reads = self.threads[chosen], self.groups[chosen], self.reads[chosen]
        return _Copy(threads, groups, reads, self.sources[chosen], self.destinations[chosen], self.size)


class AsyncCopies:
    """Copies from global to shared memory that happen when they are waited for; until then the target is poison."""

    def __init__(self, memory: GlobalMemory, shared: SharedMemory, threads: int) -> None:
        self.memory, self.shared = memory, shared
        self.committed = np.zeros(threads, np.int64)  # groups that each thread has ended
        self.pending: list[_Copy] = []

    def restart(self) -> None:
        self.committed[:] = 0
        self.pending = []

    def start(self, targets: np.ndarray, sources: np.ndarray, taken: np.ndarray, size: int, lanes: Lanes) -> None:
        """taken: how many of the `size` bytes each thread reads, 0 or all."""
        reads = taken > 0
        if (taken[reads] != size).any():
            raise PtxFault(f"cp.async reads {int(taken[reads].min())} of {size} bytes: only none or all are supported")
        threads = np.arange(len(self.committed))[lanes]
        places = np.zeros(len(threads), np.int64)
        if reads.any():
            places[reads] = self.memory.locate(sources[reads], size, threads[reads], False)
        destinations = self.shared.locate(targets, size, lanes, True)
        self.shared.store(destinations, np.full((len(threads), size), POISON, np.uint8))
        self.pending.append(_Copy(threads, self.committed[threads], reads, places, destinations, size))

    def commit(self, lanes: Lanes) -> None:
        self.committed[lanes] += 1

    def wait(self, allowed: int, lanes: Lanes) -> None:
        """Ends all but the last `allowed` committed groups of each thread."""
        limit = np.full(len(self.committed), -1)
        limit[lanes] = self.committed[lanes] - allowed
        remaining = []
        for copy in self.pending:
            due = copy.groups < limit[copy.threads]
            if due.any():
                self._finish(copy.part(due))
            if not due.all():
                remaining.append(copy.part(~due))
        self.pending = remaining

    def _finish(self, copy: _Copy) -> None:
        values = np.zeros((len(copy.threads), copy.size), np.uint8)
        values[copy.reads] = self.memory.load(copy.sources[copy.reads], copy.size)
        self.shared.store(copy.destinations, values)

    def check_none(self, lanes: Lanes) -> None:
        """Raises PtxFault if one of these threads, about to end, has a copy under way."""
        ending = np.zeros(len(self.committed), bool)
        ending[lanes] = True
        if any(ending[copy.threads].any() for copy in self.pending):
            raise PtxFault("a thread ends with asynchronous copies under way")
