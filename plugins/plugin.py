"""From an operator's description (plugins/*/trt.py) to TensorRT's classes: one IPluginV3 and its creator an operator.

Python plugins need no headers and no compiler on a board, work from TensorRT 10.3 on, and cost nothing per token: a
decode step's launches are captured into a CUDA graph once. The description knows shapes and launches; here is what
TensorRT wants besides.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, Protocol

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


@dataclass
class PluginHost:
    """What all plugins of a process share.

    launcher: None where engines are built without a GPU; building: the caller is TensorRT's builder, which times
    plugins on inputs that hold anything; errors: what plugins could not do, in sentences, because TensorRT prints their
    exceptions and says no more than that something failed.
    """

    launcher: Launcher | None = None
    building: bool = False
    errors: list[str] = field(default_factory=list)


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
    packed = []
    for launch in operator.launches(tensors, multiprocessors, tactic):
        pointers = tuple(launch.pointers())
        packed.append(PackedLaunch(launch, launch.pack({name: 0 for _, name in pointers}), pointers))
    return Prepared(tuple(packed), place(operator.scratch(tensors, multiprocessors))[0])


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
