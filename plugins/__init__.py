"""Operators of the ONNX domain `edge`: one folder an operator, each with its meaning, function and kernels.

Every operator has a numpy meaning (`meaning.py`, the definition of truth), an ONNX FunctionProto of standard
operators (`function.py`, what an executor without a kernel runs) and kernels for executors that have them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "edge"
DOMAIN_VERSION = 1
OPSET = 21
PAGE_TOKENS = 64


def functions() -> list[onnx.FunctionProto]:
    """The FunctionProto of every operator, for the `functions` field of a model (host only: a device needs no onnx)."""
    import onnx.parser

    from plugins.block_linear.function import BLOCK_LINEAR, BLOCK_LINEAR_OFFSETS
    from plugins.infllmv2.function import INFLLMV2_ATTENTION, INFLLMV2_ATTENTION_INT8
    from plugins.linear.function import PACKED_HEAD, PACKED_LINEAR
    from plugins.paged_attention.function import PAGED_ATTENTION, PAGED_ATTENTION_INT8
    from plugins.rms_norm.function import ADD_RMS_NORM, RMS_NORM
    from plugins.rope.function import LONG_ROPE_TABLE, ROPE_TABLE
    from plugins.swiglu.function import SWIGLU
    from plugins.tile_linear.function import TILE_LINEAR

    texts = (
        RMS_NORM,
        ADD_RMS_NORM,
        SWIGLU,
        ROPE_TABLE,
        LONG_ROPE_TABLE,
        BLOCK_LINEAR,
        BLOCK_LINEAR_OFFSETS,
        TILE_LINEAR,
        PACKED_LINEAR,
        PACKED_HEAD,
        PAGED_ATTENTION,
        PAGED_ATTENTION_INT8,
        INFLLMV2_ATTENTION,
        INFLLMV2_ATTENTION_INT8,
    )
    return [onnx.parser.parse_function(text) for text in texts]
