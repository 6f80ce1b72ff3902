"""From an operator's description (plugins/*/trt.py) to TensorRT's classes: one IPluginV3 and its creator an operator.

Python plugins need no headers and no compiler on a board, work from TensorRT 10.3 on, and cost nothing per token: a
decode step's launches are captured into a CUDA graph once. The description knows shapes and launches; here is what
TensorRT wants besides.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from edge.errors import EdgeError
from plugins.launch import Launch

ELEMENTS = {"float16": "half", "bfloat16": "bf16"}  # activations: TensorRT's type and the kernels' name for it
ALIGNMENT = 256  # of scratch buffers
MOST_MULTIPROCESSORS = 256  # scratch is planned for the largest GPU, so that an engine does not depend on it
Buffers = Mapping[str, tuple[tuple[int, ...], np.dtype]]


@dataclass(frozen=True)
class Tensor:
    """An input or output of one call; dtype as numpy calls it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def element(self) -> str:
        """The kernels' name of an activation type."""
        return ELEMENTS[self.dtype]


class Operator(Protocol):
    """What an operator is to TensorRT: a frozen dataclass whose fields are the node's attributes (int or float).

    NAME: the ONNX operator's; INPUTS, OUTPUTS: in its order; SAME_MEMORY: output -> the input whose memory the
    runtime binds to it.
    """

    NAME: ClassVar[str]
    INPUTS: ClassVar[tuple[str, ...]]
    OUTPUTS: ClassVar[tuple[str, ...]]
    SAME_MEMORY: ClassVar[Mapping[str, str]]

    def types(self) -> Mapping[str, str]:
        """dtype of every input and output; 'element' is float16 or bfloat16, the same for all that have it."""
        ...

    def shapes(self, inputs: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """Shapes of the outputs. Extents are int where they are known, else something opaque to pass on."""
        ...

    def scratch(self, tensors: Mapping[str, Tensor], multiprocessors: int) -> Buffers:
        """Shape and dtype of what the launches need besides; grows with the tensors and the multiprocessors."""
        ...

    def tactics(self) -> Sequence[int]:
        """Numbers (from 1 on) of the ways to do it; the first is the best by estimate."""
        ...

    def launches(self, tensors: Mapping[str, Tensor], multiprocessors: int, tactic: int) -> list[Launch]:
        """What to launch; buffers are called as the inputs, outputs and scratch."""
        ...

    def __hash__(self) -> int:
        """Of the attributes: what `prepare` made for one layer serves all that are alike."""
        ...


class SimpleOperator:
    """An operator with one way to do it, on activations only, without scratch; others override what differs."""

    INPUTS: ClassVar[tuple[str, ...]]
    OUTPUTS: ClassVar[tuple[str, ...]]
    SAME_MEMORY: ClassVar[Mapping[str, str]] = {}

    def types(self) -> Mapping[str, str]:
        """All activations."""
        return dict.fromkeys((*self.INPUTS, *self.OUTPUTS), "element")

    def scratch(self, tensors: Mapping[str, Tensor], multiprocessors: int) -> Buffers:
        """None."""
        return {}

    def tactics(self) -> Sequence[int]:
        """One."""
        return (1,)


class Launcher(Protocol):
    """Kernels on a device: edge.cuda.Kernels."""

    @property
    def multiprocessors(self) -> int:
        """Of the device."""
        ...

    def launch(self, launch: Launch, arguments: bytes, stream: int) -> None:
        """Queue one launch on a stream."""
        ...


class PageOffload(Protocol):
    """KV pages of which only some are on the device (edge/executors/offload.py); a layer is known by its pool.

    A step's tokens are cut into runs whose pages have room together. `writing` and `reading` yield run after run: its
    pages are there for the kernels that the caller queues on `stream` before it asks for the next one.

    slot_table [B, P], run_start [B + 1]: addresses of the run's page table, which has slots of the pool in the place
    of pages, and of where the sequences' tokens begin among the run's.
    """

    slot_table: int
    run_start: int

    def writing(self, pool: int, stream: int) -> Iterator[range]:
        """The pages that the new tokens go to, and those whose keys are averaged with theirs."""
        ...

    def reading(self, pool: int, blocks: int, counts: int, columns: int, stream: int) -> Iterator[range]:
        """The pages of `blocks` [T, Hkv, columns]; `counts` [T, Hkv] are chosen, 0 of dense tokens, which see all."""
        ...


@dataclass
class PluginHost:
    """What all plugins of a process share.

    launcher: None where engines are built without a GPU; building: the caller is TensorRT's builder, which times
    plugins on inputs that hold anything; errors: what plugins could not do, in sentences, because TensorRT prints their
    exceptions and says no more than that something failed; offload: None if all KV pages are on the device.
    """

    launcher: Launcher | None = None
    building: bool = False
    errors: list[str] = field(default_factory=list)
    offload: PageOffload | None = None


@dataclass(frozen=True)
class PackedLaunch:
    """A launch whose struct lacks only the addresses; pointers: where in it which buffer's address goes."""

    launch: Launch
    arguments: bytes
    pointers: tuple[tuple[int, str], ...]

    def fill(self, addresses: Mapping[str, int]) -> bytes:
        """The struct with the addresses in place."""
        filled = bytearray(self.arguments)
        for offset, name in self.pointers:
            struct.pack_into("<q", filled, offset, addresses[name])
        return bytes(filled)


@dataclass(frozen=True)
class Prepared:
    """All of a call that does not change with the addresses; offsets: of scratch buffers in the workspace."""

    launches: tuple[PackedLaunch, ...]
    offsets: Mapping[str, int]


@lru_cache(maxsize=256)
def prepare(operator: Operator, inputs: tuple[Tensor, ...], multiprocessors: int, tactic: int) -> Prepared:
    """Once for all layers of a model and for all steps of one shape; `inputs` in the operator's order."""
    tensors = dict(zip(operator.INPUTS, inputs, strict=True))
    packed = tuple(map(pack_launch, operator.launches(tensors, multiprocessors, tactic)))
    return Prepared(packed, place(operator.scratch(tensors, multiprocessors))[0])


def pack_launch(launch: Launch) -> PackedLaunch:
    """The launch with all of its struct but the addresses."""
    pointers = tuple(launch.pointers())
    return PackedLaunch(launch, launch.pack({name: 0 for _, name in pointers}), pointers)


@dataclass(frozen=True)
class Call:
    """One call of an operator that queues its launches by itself; stream: its address."""

    tensors: Mapping[str, Tensor]
    addresses: Mapping[str, int]  # of inputs, outputs and scratch
    launcher: Launcher
    stream: int

    def queue(self, launches: Sequence[PackedLaunch], addresses: Mapping[str, int]) -> None:
        """Launch one after the other; `addresses` are those that differ from the call's."""
        for one in launches:
            self.launcher.launch(one.launch, one.fill({**self.addresses, **addresses}), self.stream)


@runtime_checkable
class OffloadingOperator(Protocol):
    """An operator that can do with some of its pages at a time."""

    def run_offloaded(self, call: Call, offload: PageOffload) -> None:
        """Queue what `launches` would, run by run."""
        ...


def place(buffers: Buffers) -> tuple[dict[str, int], int]:
    """(offset of each buffer in a common workspace, its size in bytes)."""
    offsets, end = {}, 0
    for name, (shape, dtype) in buffers.items():
        offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = offsets[name] + math.prod(shape) * dtype.itemsize
    return offsets, end


def takes_type(operator: Operator, name: str, dtype: str, element: str | None) -> bool:
    """May this input or output have this dtype? element: the activation type of those before it, if any had one."""
    wanted = operator.types()[name]
    if wanted != "element":
        return dtype == wanted
    return dtype in ELEMENTS and dtype == (element or dtype)


def element_of(operator: Operator, dtypes: Mapping[str, str]) -> str | None:
    """The activation type among `dtypes`, which may be only the first few."""
    types = operator.types()
    return next((dtype for name, dtype in dtypes.items() if types[name] == "element"), None)


def attributes_of(operator_class: type[Operator], values: Mapping[str, Any]) -> dict[str, int | float]:
    """The dataclass's fields out of plugin fields; EdgeError names one that is missing."""
    found: dict[str, int | float] = {}
    for attribute in fields(operator_class):  # type: ignore[arg-type]
        if attribute.name not in values:
            raise EdgeError(f"{operator_class.NAME} lacks the attribute {attribute.name}; export the bundle again")
        kind = int if attribute.type == "int" else float
        found[attribute.name] = kind(np.asarray(values[attribute.name]).reshape(-1)[0])
    return found
