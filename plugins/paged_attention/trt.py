"""edge.PagedAttention for TensorRT.

The pool is an input and an output that the runtime binds to the same memory. A plugin could tell TensorRT so
(`getAliasedInput`), but these do not. Undeclared, both pointers reach the kernels as they were bound, and TensorRT-RTX
plans no memory of a pool's size. Declared, it plans none either, but compiles a program of its own for every stretch
between two attention layers (tests/test_tensorrt_aliasing.py); on TensorRT 10 Edge-LLM found it to keep a second cache
for each layer. `enqueue` checks that the addresses are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from plugins.launch import Launch
from plugins.paged_attention.launch import AttentionShape, append, attend, scratch_up_to
from plugins.plugin import Buffers, SimpleOperator, Tensor

STEP_INPUTS = ("positions", "slots", "query_start", "page_table", "tree_start", "tree_mask")


@dataclass(frozen=True)
class PagedAttention(SimpleOperator):
    """output [T, Hq d] of qkv [T, (Hq + 2 Hkv) d], whose keys and values it appends to kv_pool.

    window: a row sees so many blocks of keys, the last of which is its position's; 0: all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int

    NAME: ClassVar[str] = "PagedAttention"
    INPUTS: ClassVar[tuple[str, ...]] = ("qkv", "cos", "sin", "kv_pool", *STEP_INPUTS)
    OUTPUTS: ClassVar[tuple[str, ...]] = ("output", "kv_pool_out")
    SAME_MEMORY: ClassVar[Mapping[str, str]] = {"kv_pool_out": "kv_pool"}

    def types(self) -> Mapping[str, str]:
        """As plugins/infllmv2/__init__.py has them."""
        return {**super().types(), **STEP_TYPES}

    def shapes(self, inputs: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """[T, Hq d], and the pools as they were."""
        pools = {output: inputs[source] for output, source in self.SAME_MEMORY.items()}
        return {"output": (inputs["qkv"][0], self.num_heads * self.head_dim), **pools}

    def scratch(self, tensors: Mapping[str, Tensor], multiprocessors: int) -> Buffers:
        """Rotated queries, and the parts that a decode step's thread blocks leave for `combine`."""
        return scratch_up_to(self._shape(tensors), multiprocessors)

    def launches(self, tensors: Mapping[str, Tensor], multiprocessors: int, tactic: int) -> list[Launch]:
        """Append, then attend."""
        shape = self._shape(tensors)
        return [append(shape), *attend(shape, self.scale, multiprocessors)]

    def _shape(self, tensors: Mapping[str, Tensor]) -> AttentionShape:
        return attention_shape(tensors, self.num_heads, self.num_kv_heads, self.head_dim, window=self.window)


@dataclass(frozen=True)
class PagedAttentionInt8(PagedAttention):
    """PagedAttention on an int8 kv_pool, whose scales it keeps in kv_scales."""

    NAME: ClassVar[str] = "PagedAttentionInt8"
    INPUTS: ClassVar[tuple[str, ...]] = (*PagedAttention.INPUTS[:4], "kv_scales", *PagedAttention.INPUTS[4:])
    OUTPUTS: ClassVar[tuple[str, ...]] = ("output", "kv_pool_out", "kv_scales_out")
    SAME_MEMORY: ClassVar[Mapping[str, str]] = {**PagedAttention.SAME_MEMORY, "kv_scales_out": "kv_scales"}

    def types(self) -> Mapping[str, str]:
        """As plugins/infllmv2/__init__.py has them."""
        return {**super().types(), **INT8_TYPES}


INT8_TYPES = {
    **dict.fromkeys(("kv_pool", "kv_pool_out"), "int8"),
    **dict.fromkeys(("kv_scales", "kv_scales_out"), "float32"),
}

STEP_TYPES = {
    "cos": "float32",
    "sin": "float32",
    **dict.fromkeys(STEP_INPUTS, "int32"),
}


def attention_shape(
    tensors: Mapping[str, Tensor], heads: int, kv_heads: int, head_dim: int, **further: Any
) -> AttentionShape:
    """The step that the tensors of an attention operator describe; `further`: other fields of it."""
    (sequences, table_width), element = tensors["page_table"].shape, tensors["qkv"].element
    tokens, pool = tensors["qkv"].shape[0], tensors["kv_pool"]
    kv_element = "uint8_t" if pool.dtype == "int8" else pool.element
    return AttentionShape(tokens, sequences, table_width, heads, kv_heads, head_dim, element, kv_element, **further)
