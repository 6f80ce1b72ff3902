"""What a user may choose about a bundle's weights and executor, and the choice made for those who do not."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from build_engine.checkpoint import Checkpoint
from build_engine.graph import GraphTypes
from build_engine.quantize import GROUP_SIZES
from edge.config import ModelConfig
from edge.errors import EdgeError, UsageError
from plugins.build.registry import kernels_for
from plugins.launch import Kernel

# GGUF formats of four bits or fewer with a grid of their own, which an asymmetric group of 32 follows best.
_GRIDS_OF_32 = {"Q4_0", "Q4_1", "Q4_K"}


HEAD_BITS = {"int8": 8, "int4": 4}
TENSORRT_TARGETS = ("rtx", "tensorrt", "jetson")


@dataclass(frozen=True)
class WeightFormat:
    """How projections are stored. exact: the checkpoint's own values. w4a16: int4 codes in groups along the input.

    Asymmetric groups keep their minimum and follow 4-bit GGUF values exactly; symmetric ones are smaller, faster,
    and all that TensorRT knows. `head`: exact, int8 or int4 (symmetric); it decides more than its share of the quality.
    `linear`: native (the executor's own operators) or packed (TensorRT: for the plugins of plugins/linear).
    """

    kind: str = "w4a16"
    group_size: int = 32
    symmetric: bool = False
    head: str = "int8"
    linear: str = "native"

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "w4a16"):
            raise UsageError(f"unknown weight format {self.kind!r}; choose exact or w4a16")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(f"group size {self.group_size} is not offered; choose one of {GROUP_SIZES}")
        if self.head != "exact" and self.head not in HEAD_BITS:
            raise UsageError(f"unknown head format {self.head!r}; choose exact, int8 or int4")
        if self.linear not in ("native", "packed"):
            raise UsageError(f"unknown --linear {self.linear!r}; choose native or packed")
        if self.linear == "packed" and self.kind == "exact":
            raise UsageError("--linear packed stores int4 weights, not exact ones; choose --weights w4a16")
        if self.linear == "packed" and not self.symmetric:
            raise UsageError("--linear packed knows no asymmetric groups; choose --symmetric")

    @property
    def packs_head(self) -> bool:
        """Whether the head is an edge.PackedHead, which also gives the largest logit's token."""
        return self.linear == "packed" and self.head != "exact"

    def describe(self) -> str:
        """A few words for tables: 'exact', 'w4a16 g32 asymmetric, int8 head', 'packed w4a16 g64 symmetric, ...'."""
        if self.kind == "exact":
            return "exact"
        groups = f"w4a16 g{self.group_size} {'symmetric' if self.symmetric else 'asymmetric'}, {self.head} head"
        return f"packed {groups}" if self.linear == "packed" else groups


@dataclass(frozen=True)
class Target:
    """An executor to lower for."""

    name: str
    types: GraphTypes
    tensorrt: bool


_KV_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def make_target(name: str, weights: WeightFormat, kv: str | None = None) -> Target:
    """`onnxruntime`: float32 activations; KV as `kv` says, else float32 with exact weights and bfloat16 with others,
    the checkpoints' own type, whose pairs processors multiply fastest. `rtx` (TensorRT-RTX), `tensorrt` (desktop) and
    `jetson`: float16 throughout.
    """
    if name == "onnxruntime":
        if weights.linear == "packed":
            raise UsageError("--linear packed is for TensorRT's plugins; leave it out for --target onnxruntime")
        kv = kv or ("float32" if weights.kind == "exact" else "bfloat16")
        if kv not in _KV_TYPES:
            raise UsageError(f"unknown --kv {kv!r}; choose one of {', '.join(_KV_TYPES)}")
        return Target(name, GraphTypes(TensorProto.FLOAT, _KV_TYPES[kv]), tensorrt=False)
    if name not in TENSORRT_TARGETS:
        raise UsageError(f"unknown target {name!r}; choose onnxruntime, rtx, tensorrt or jetson")
    if kv not in (None, "float16"):
        raise UsageError(f"--target {name} stores keys and values as float16, not {kv}; leave --kv out")
    if weights.kind == "w4a16" and not weights.symmetric:
        raise UsageError(f"TensorRT dequantises int4 without zero points; export for {name} with --symmetric")
    if weights.kind == "w4a16" and weights.linear == "native" and weights.head == "int8":
        raise UsageError(
            f"TensorRT's own operators have no block-wise int8; export for {name} with --linear packed, "
            "--head exact or --head int4"
        )
    return Target(name, GraphTypes(TensorProto.FLOAT16, TensorProto.FLOAT16), tensorrt=True)


def choose_format(
    checkpoint: Checkpoint,
    target: str,
    kind: str,
    group_size: int | None = None,
    symmetric: bool | None = None,
    head: str | None = None,
    linear: str | None = None,
) -> WeightFormat:
    """Fill in what the user left open (None).

    Weights that were 4-bit in GGUF keep their values best in asymmetric groups of 32. All others get symmetric
    groups of 64: 4.5 bits a weight with the scale, and what TensorRT can dequantise. TensorRT gets them packed if
    there are kernels of the model's sizes.
    """
    for_tensorrt = target in TENSORRT_TARGETS
    if linear is not None and not for_tensorrt:
        raise UsageError(f"--linear is a choice between TensorRT's operators; leave it out for --target {target}")
    if symmetric is None:
        on_a_grid = any(tensor.stored_as in _GRIDS_OF_32 for tensor in checkpoint.tensors.values())
        symmetric = for_tensorrt or not on_a_grid
    if group_size is None:
        group_size = 64 if symmetric else 32
    if linear is None:
        can_pack = for_tensorrt and symmetric and kind == "w4a16"
        linear = "packed" if can_pack and _has_kernels(checkpoint.config, group_size, head or "int8") else "native"
    if head is None:
        head = "exact" if for_tensorrt and linear == "native" else "int8"
    return WeightFormat(kind, group_size, symmetric, head, linear)


def plugin_kernels(config: ModelConfig, weights: WeightFormat) -> list[Kernel]:
    """All that TensorRT's plugins may launch for a graph of this format; EdgeError names a size without kernels."""
    if weights.linear == "native":
        return kernels_for(config, "half", "half", None, None)
    head = (HEAD_BITS[weights.head], weights.group_size) if weights.packs_head else None
    return kernels_for(config, "half", "half", (4, weights.group_size), head)


def _has_kernels(config: ModelConfig, group_size: int, head: str) -> bool:
    packed = WeightFormat("w4a16", group_size, symmetric=True, head=head, linear="packed")
    try:
        plugin_kernels(config, packed)
    except EdgeError:
        return False
    return True
