"""What a user may choose about a bundle's weights and executor, and the choice made for those who do not."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from build_engine.checkpoint import Checkpoint
from build_engine.graph import GraphTypes
from build_engine.quantize import GROUP_SIZES
from edge.errors import UsageError

# GGUF formats of four bits or fewer with a grid of their own, which an asymmetric group of 32 follows best.
_GRIDS_OF_32 = {"Q4_0", "Q4_1", "Q4_K"}


@dataclass(frozen=True)
class WeightFormat:
    """How projections are stored. exact: the checkpoint's own values. w4a16: int4 codes in groups along the input.

    Asymmetric groups keep their minimum and follow 4-bit GGUF values exactly; symmetric ones are smaller, faster,
    and all that TensorRT knows. `head`: exact, int8 or int4 (symmetric); it decides more than its share of the quality.
    """

    kind: str = "w4a16"
    group_size: int = 32
    symmetric: bool = False
    head: str = "int8"

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "w4a16"):
            raise UsageError(f"unknown weight format {self.kind!r}; choose exact or w4a16")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(f"group size {self.group_size} is not offered; choose one of {GROUP_SIZES}")
        if self.head not in ("exact", "int8", "int4"):
            raise UsageError(f"unknown head format {self.head!r}; choose exact, int8 or int4")

    def describe(self) -> str:
        """A few words for tables: 'exact', 'w4a16 g32 asymmetric, int8 head'."""
        if self.kind == "exact":
            return "exact"
        return f"w4a16 g{self.group_size} {'symmetric' if self.symmetric else 'asymmetric'}, {self.head} head"


@dataclass(frozen=True)
class Target:
    """An executor to lower for."""

    name: str
    types: GraphTypes
    tensorrt: bool


_KV_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def make_target(name: str, weights: WeightFormat, kv: str | None = None) -> Target:
    """`onnxruntime`: float32 activations; KV as `kv` says, else float32 with exact weights and bfloat16 with others,
    the checkpoints' own type, whose pairs processors multiply fastest. `rtx`: float16 throughout.
    """
    if name == "onnxruntime":
        kv = kv or ("float32" if weights.kind == "exact" else "bfloat16")
        if kv not in _KV_TYPES:
            raise UsageError(f"unknown --kv {kv!r}; choose one of {', '.join(_KV_TYPES)}")
        return Target(name, GraphTypes(TensorProto.FLOAT, _KV_TYPES[kv]), tensorrt=False)
    if name == "rtx":
        if kv not in (None, "float16"):
            raise UsageError(f"--target rtx stores keys and values as float16, not {kv}; leave --kv out")
        if weights.kind == "w4a16" and not weights.symmetric:
            raise UsageError("TensorRT dequantises int4 without zero points; export for rtx with --symmetric")
        if weights.kind == "w4a16" and weights.head == "int8":
            raise UsageError("TensorRT has no block-wise int8; export for rtx with --head exact or --head int4")
        return Target(name, GraphTypes(TensorProto.FLOAT16, TensorProto.FLOAT16), tensorrt=True)
    raise UsageError(f"unknown target {name!r}; choose onnxruntime or rtx")


def choose_format(
    checkpoint: Checkpoint,
    target: str,
    kind: str,
    group_size: int | None = None,
    symmetric: bool | None = None,
    head: str | None = None,
) -> WeightFormat:
    """Fill in what the user left open (None).

    Weights that were 4-bit in GGUF keep their values best in asymmetric groups of 32. All others get symmetric
    groups of 64: 4.5 bits a weight with the scale, and what TensorRT can dequantise.
    """
    if symmetric is None:
        on_a_grid = any(tensor.stored_as in _GRIDS_OF_32 for tensor in checkpoint.tensors.values())
        symmetric = target == "rtx" or not on_a_grid
    if group_size is None:
        group_size = 64 if symmetric else 32
    if head is None:
        head = "exact" if target == "rtx" else "int8"
    return WeightFormat(kind, group_size, symmetric, head)
