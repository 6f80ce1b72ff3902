"""edge.InfLLMv2Attention for TensorRT; the pools are bound as plugins/paged_attention/trt.py says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from plugins.infllmv2.launch import compress, score_coarse, score_fine, select
from plugins.infllmv2.launch import scratch as selection_scratch
from plugins.infllmv2.offloaded import run_offloaded
from plugins.launch import Launch
from plugins.paged_attention.launch import AttentionShape, append, attend, scratch_up_to
from plugins.paged_attention.trt import INT8_TYPES, STEP_INPUTS, STEP_TYPES, attention_shape
from plugins.plugin import Buffers, Call, PageOffload, SimpleOperator, Tensor


@dataclass(frozen=True)
class InfLLMv2Attention(SimpleOperator):
    """Block-sparse attention (plugins/infllmv2/__init__.py); max_blocks: the most blocks that a row may select."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    use_nope: int
    max_blocks: int

    NAME: ClassVar[str] = "InfLLMv2Attention"
    INPUTS: ClassVar[tuple[str, ...]] = (
        "qkv",
        "cos",
        "sin",
        "kv_pool",
        "c1_pool",
        "c2_pool",
        *STEP_INPUTS,
        "switch_length",
        "sparse_settings",
    )
    OUTPUTS: ClassVar[tuple[str, ...]] = ("output", "kv_pool_out", "c1_pool_out", "c2_pool_out")
    SAME_MEMORY: ClassVar[Mapping[str, str]] = {f"{pool}_out": pool for pool in ("kv_pool", "c1_pool", "c2_pool")}

    def types(self) -> Mapping[str, str]:
        """As plugins/infllmv2/__init__.py has them."""
        return {**super().types(), **STEP_TYPES, "switch_length": "int32", "sparse_settings": "int32"}

    def shapes(self, inputs: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """[T, Hq d], and the pools as they were."""
        pools = {output: inputs[source] for output, source in self.SAME_MEMORY.items()}
        return {"output": (inputs["qkv"][0], self.num_heads * self.head_dim), **pools}

    def scratch(self, tensors: Mapping[str, Tensor], multiprocessors: int) -> Buffers:
        """Those of attention and of the selection of blocks: nothing has a row for every key."""
        shape = self._shape(tensors)
        return {**scratch_up_to(shape, multiprocessors), **selection_scratch(shape)}

    def launches(self, tensors: Mapping[str, Tensor], multiprocessors: int, tactic: int) -> list[Launch]:
        """Append, compress, score in two stages, select, attend."""
        shape, scale = self._shape(tensors), self.scale
        selection = [compress(shape), score_coarse(shape, scale), score_fine(shape, scale), select(shape)]
        return [append(shape), *selection, *attend(shape, scale, multiprocessors)]

    def run_offloaded(self, call: Call, offload: PageOffload) -> None:
        """The same, of which `append`, `compress` and `attend` go run by run of tokens."""
        run_offloaded(self._shape(call.tensors), self.scale, call, offload)

    def _shape(self, tensors: Mapping[str, Tensor]) -> AttentionShape:
        return attention_shape(
            tensors,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            limit=self.max_blocks,
            use_nope=bool(self.use_nope),
        )


@dataclass(frozen=True)
class InfLLMv2AttentionInt8(InfLLMv2Attention):
    """InfLLMv2Attention on an int8 kv_pool, whose scales it keeps in kv_scales; compressed keys have 16 bits."""

    NAME: ClassVar[str] = "InfLLMv2AttentionInt8"
    INPUTS: ClassVar[tuple[str, ...]] = (*InfLLMv2Attention.INPUTS[:4], "kv_scales", *InfLLMv2Attention.INPUTS[4:])
    OUTPUTS: ClassVar[tuple[str, ...]] = ("output", "kv_pool_out", "kv_scales_out", "c1_pool_out", "c2_pool_out")
    SAME_MEMORY: ClassVar[Mapping[str, str]] = {**InfLLMv2Attention.SAME_MEMORY, "kv_scales_out": "kv_scales"}

    def types(self) -> Mapping[str, str]:
        """As plugins/infllmv2/__init__.py has them."""
        return {**super().types(), **INT8_TYPES}
