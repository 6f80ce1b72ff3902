"""What a user may choose about a bundle's weights and executor, and the choice made for those who do not."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnx import TensorProto

from build_engine.checkpoint import Checkpoint, LazyTensor
from build_engine.graph import GraphTypes
from build_engine.quantize import GROUP_SIZES
from build_engine.weight_rows import projections
from edge.config import ModelConfig
from edge.errors import EdgeError, UsageError
from plugins.build.registry import kernels_for
from plugins.launch import Kernel

# GGUF formats of four bits or fewer with a grid of their own, which an asymmetric group of 32 follows best.
_GRIDS_OF_32 = {"Q4_0", "Q4_1", "Q4_K"}
HEAD_BITS = {"int8": 8, "int4": 4}
TENSORRT_TARGETS = ("rtx", "tensorrt", "jetson")
# The formats and the bits of a weight's code; the first two have none.
KINDS = {"exact": 0, "fp16": 0, "w4a16": 4, "ternary": 2}
_DEFAULT_GROUP = 64
# A head of 16 bits with more than this share of the model's bytes is stored in 8: a token reads all of them.
_HEAD_SHARE = 0.1


@dataclass(frozen=True)
class WeightFormat:
    """How projections are stored. exact: the checkpoint's own values. fp16: those as float16. w4a16: int4 codes in
    groups along the input. ternary: the codes -1, 0, 1 of a ternary checkpoint, whose `group_size` is the checkpoint's.

    Asymmetric groups keep their minimum and follow 4-bit GGUF values exactly; symmetric ones are smaller, faster,
    and all that TensorRT knows. group_size 0: a scale a row. `head`: exact, int8 or int4 (symmetric); it decides more
    than its share of the quality; of exact and fp16 weights it is stored as they are.
    `linear`: native (the executor's own operators) or packed (TensorRT: for the plugins of plugins/linear).
    `embedding`: exact, or int8 with a scale a row, which halves a table of which a token reads one row.
    """

    kind: str = "w4a16"
    group_size: int = 32
    symmetric: bool = False
    head: str = "int8"
    linear: str = "native"
    embedding: str = "exact"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown weight format {self.kind!r}; choose exact, fp16, w4a16 or ternary")
        if self.group_size not in (0, *GROUP_SIZES):
            raise UsageError(
                f"group size {self.group_size} is not offered; choose one of {GROUP_SIZES}, or 0 for a scale a row"
            )
        if self.head != "exact" and self.head not in HEAD_BITS:
            raise UsageError(f"unknown head format {self.head!r}; choose exact, int8 or int4")
        if self.embedding not in ("exact", "int8"):
            raise UsageError(f"unknown embedding format {self.embedding!r}; choose exact or int8")
        if self.linear not in ("native", "packed"):
            raise UsageError(f"unknown --linear {self.linear!r}; choose native or packed")
        if self.linear == "packed" and not self.is_low_bit:
            raise UsageError(
                f"--linear packed stores int4 or ternary weights, not {self.kind} ones; choose --weights w4a16"
            )
        if self.is_asymmetric and self.linear == "packed":
            raise UsageError("--linear packed knows no asymmetric groups; choose --symmetric")
        if self.is_asymmetric and not self.group_size:
            raise UsageError("asymmetric int4 needs groups; choose --group-size 32, 64 or 128, or --symmetric")

    @property
    def bits(self) -> int:
        """Of a projection's code."""
        return KINDS[self.kind]

    @property
    def is_low_bit(self) -> bool:
        """Whether projections are codes and scales."""
        return self.bits > 0

    @property
    def is_asymmetric(self) -> bool:
        """Whether groups keep a minimum; ternary ones never do."""
        return self.kind == "w4a16" and not self.symmetric

    @property
    def head_group_size(self) -> int:
        """Weights of a quantised head that share a scale: as in the projections, unless those have a scale a row."""
        return self.group_size or _DEFAULT_GROUP

    @property
    def packs_head(self) -> bool:
        """Whether the head is an edge.PackedHead, which also gives the largest logit's token."""
        return self.linear == "packed" and self.head != "exact"

    def describe(self) -> str:
        """A few words for tables: 'exact', 'w4a16 g32 asymmetric, int8 head', 'packed ternary, scale a row, ...'."""
        table = ", int8 embedding" if self.embedding == "int8" else ""
        if not self.is_low_bit:
            return self.kind + table
        groups = f"g{self.group_size}" if self.group_size else "scale a row"
        if self.kind == "ternary":
            words = f"ternary, {groups}, {self.head} head"
        else:
            words = f"w4a16 {groups} {'symmetric' if self.symmetric else 'asymmetric'}, {self.head} head"
        return (f"packed {words}" if self.linear == "packed" else words) + table


@dataclass(frozen=True)
class Target:
    """An executor to lower for."""

    name: str
    types: GraphTypes
    tensorrt: bool


_KV_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
}
_TENSORRT_KV_TYPES = ("float16", "int8")
_KV_ELEMENTS = {"float16": "half", "int8": "uint8_t"}  # as kernels call them


def make_target(name: str, weights: WeightFormat, kv: str | None = None) -> Target:
    """`onnxruntime`: float32 activations; KV as `kv` says, else float32 with exact weights and bfloat16 with others,
    the checkpoints' own type, whose pairs processors multiply fastest. `rtx` (TensorRT-RTX), `tensorrt` (desktop) and
    `jetson`: float16 throughout, or with an int8 cache.
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
    if weights.embedding == "int8":
        raise UsageError(f"TensorRT looks up no int8 table; export for {name} with --embedding exact")
    kv = kv or "float16"
    if kv not in _TENSORRT_KV_TYPES:
        raise UsageError(f"--target {name} stores keys and values as float16 or int8, not {kv}; leave --kv out")
    if weights.is_asymmetric:
        raise UsageError(f"TensorRT dequantises int4 without zero points; export for {name} with --symmetric")
    if weights.is_low_bit and weights.linear == "native" and weights.head == "int8":
        raise UsageError(
            f"TensorRT's own operators have no block-wise int8; export for {name} with --linear packed, "
            "--head exact or --head int4"
        )
    return Target(name, GraphTypes(TensorProto.FLOAT16, _KV_TYPES[kv]), tensorrt=True)


def choose_format(
    checkpoint: Checkpoint,
    target: str,
    kind: str,
    group_size: int | None = None,
    symmetric: bool | None = None,
    head: str | None = None,
    linear: str | None = None,
    embedding: str = "exact",
) -> WeightFormat:
    """Fill in what the user left open (None).

    Stored codes (GPTQ, ternary) keep their groups. Weights that were 4-bit in GGUF keep their values best in asymmetric
    groups of 32. All others get symmetric groups of 64: 4.5 bits a weight with the scale, and what TensorRT can
    dequantise. TensorRT gets them packed if there are kernels of the model's sizes. The head gets 8 bits if it would
    take more than a tenth of the bytes with 16, except beside TensorRT's own int4, which has no int8.
    """
    for_tensorrt = target in TENSORRT_TARGETS
    _check_choices(target, kind, group_size, symmetric, head, linear)
    stored = _stored_group(checkpoint, KINDS.get(kind, 0))
    if kind == "ternary":
        group_size = _ternary_group(checkpoint, stored)
        symmetric = True
    if symmetric is None:
        on_a_grid = any(tensor.stored_as in _GRIDS_OF_32 for tensor in checkpoint.tensors.values())
        symmetric = for_tensorrt or stored is not None or not on_a_grid
    if group_size is None:
        group_size = (_DEFAULT_GROUP if stored is None else stored) if symmetric else 32
    native = WeightFormat(kind, group_size, symmetric, "exact", "native", embedding)
    if not native.is_low_bit:
        return _checked(native, checkpoint.config)
    best_head = head or ("int8" if _head_dominates(checkpoint.config, native.bits) else "exact")
    packed = replace(native, head=best_head, linear="packed" if for_tensorrt and symmetric else "native")
    if linear is None:
        linear = "packed" if for_tensorrt and symmetric and _has_kernels(checkpoint.config, packed) else "native"
    if head is None:
        head = "exact" if for_tensorrt and linear == "native" else best_head
    return _checked(replace(native, head=head, linear=linear), checkpoint.config)


def _checked(weights: WeightFormat, config: ModelConfig) -> WeightFormat:
    """Refuse a small table of which an exact head needs the large one anyway."""
    if weights.embedding == "int8" and config.tie_word_embeddings and weights.head == "exact":
        raise UsageError(
            "the embedding is this model's head, too, which stays exact; leave out --embedding int8, or add --head int8"
        )
    return weights


def _check_choices(
    target: str, kind: str, group_size: int | None, symmetric: bool | None, head: str | None, linear: str | None
) -> None:
    """Refuse what would be ignored."""
    if linear is not None and target not in TENSORRT_TARGETS:
        raise UsageError(f"--linear is a choice between TensorRT's operators; leave it out for --target {target}")
    if kind in ("exact", "fp16") and head not in (None, "exact"):
        raise UsageError(f"--weights {kind} stores the head as it does all weights; leave out --head {head}")
    if kind == "ternary" and (group_size is not None or symmetric is False):
        name = "--asymmetric" if symmetric is False else "--group-size"
        raise UsageError(f"a ternary checkpoint says itself which weights share a scale; leave out {name}")


def _stored_group(checkpoint: Checkpoint, bits: int) -> int | None:
    """Inputs that share a scale in all codes of up to `bits` bits that the projections have stored; 0: their rows.

    Groups of 256, or halves of rows, are groups of 128 with equal scales. None: there are no codes, or no such group.
    """
    stored = [(tensor, tensor.codes) for tensor in projections(checkpoint)]
    groups = {(codes.group, tensor.shape[1]) for tensor, codes in stored if codes is not None and codes.bits <= bits}
    if not groups:
        return None
    if all(group == inputs for group, inputs in groups):
        return 0
    return next((size for size in reversed(GROUP_SIZES) if all(group % size == 0 for group, _ in groups)), None)


def _ternary_group(checkpoint: Checkpoint, stored: int | None) -> int:
    def is_ternary(tensor: LazyTensor) -> bool:
        return tensor.codes is not None and tensor.codes.bits == 2

    for tensor in projections(checkpoint):
        if not is_ternary(tensor):
            raise EdgeError(f"tensor {tensor.name} is not ternary; choose --weights w4a16 or exact")
        if stored is None and tensor.codes is not None and tensor.codes.group % GROUP_SIZES[0]:
            raise EdgeError(
                f"tensor {tensor.name} has a scale for each {tensor.codes.group} inputs, but operators need multiples "
                f"of {GROUP_SIZES[0]}; choose --weights exact"
            )
    assert stored is not None
    return stored


def _head_dominates(config: ModelConfig, bits: int) -> bool:
    """Whether a head of 16 bits would be a large part of the bytes that a token reads, beside codes of `bits` bits."""
    attended = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * attended + 2 * kv + 3 * config.intermediate_size)
    head = 16 * config.vocab_size * config.hidden_size
    return head > _HEAD_SHARE * (head + bits * config.num_hidden_layers * layer)


def plugin_kernels(config: ModelConfig, weights: WeightFormat, kv: str = "float16") -> list[Kernel]:
    """All that TensorRT's plugins may launch for a graph of this format; EdgeError names a size without kernels."""
    kv_element = _KV_ELEMENTS[kv]
    if weights.linear == "native":
        return kernels_for(config, "half", kv_element, None, None)
    head = (HEAD_BITS[weights.head], weights.head_group_size) if weights.packs_head else None
    return kernels_for(config, "half", kv_element, (weights.bits, weights.group_size), head)


def _has_kernels(config: ModelConfig, packed: WeightFormat) -> bool:
    try:
        plugin_kernels(config, packed)
    except EdgeError:
        return False
    return True
