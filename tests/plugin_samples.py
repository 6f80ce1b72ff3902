"""Calls of every operator that TensorRT gets from us: inputs, and what the numpy meanings make of them."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from plugins.infllmv2 import meaning as infllmv2
from plugins.infllmv2.trt import InfLLMv2Attention, InfLLMv2AttentionInt8
from plugins.linear import meaning as linear
from plugins.linear.pack import pack_codes, pack_scales
from plugins.linear.trt import PackedHead, PackedLinear
from plugins.paged_attention.meaning import paged_attention, stored_values
from plugins.paged_attention.pages import Step, device_order, make_step, quantise_pool
from plugins.paged_attention.trt import PagedAttention, PagedAttentionInt8
from plugins.plugin import Operator
from plugins.rms_norm.meaning import add_rms_norm, rms_norm
from plugins.rms_norm.trt import AddRMSNorm, RMSNorm
from plugins.rope.meaning import rope_table, rope_tables
from plugins.rope.trt import LongRopeTable, RopeTable
from plugins.swiglu.meaning import swiglu
from plugins.swiglu.trt import SwiGLU
from tests.cuda_pages import past_pool

Arrays = dict[str, np.ndarray]
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
UNIT = {"float16": 2.0**-10, "bfloat16": 2.0**-7}  # of the last place, relative
# Sequences' (past, new) tokens: a decode step, a prompt's chunks that start inside a page, and trees, one of them over
# two pages, beside a plain token.
STEPS = {
    "decode": [(190, 1), (63, 1), (700, 1)],
    "prefill": [(999, 45), (0, 31)],
    "verify": [(699, 9), (120, 6), (40, 1)],
}
TOKENS = {"decode": 3, "prefill": 76, "verify": 16}
TREES = {"verify": [(-1, 0, 0, 1, 2, 4, 4, -1), (-1, 0, 1, 1, 0)]}
WINDOWS = {"verify": 2}  # blocks that dense rows see


@dataclass(frozen=True)
class Sample:
    """One call. expected: {output: values}; each may be off by `absolute` + `relative` * |value|."""

    operator: Operator
    inputs: Arrays
    expected: Arrays
    absolute: float = 0.0
    relative: float = 0.0

    def output_dtype(self, name: str) -> np.dtype:
        """As the operator says."""
        wanted = self.operator.types()[name]
        return self.inputs[self.operator.INPUTS[0]].dtype if wanted == "element" else np.dtype(wanted)


def attribute(value: float) -> float:
    """A value that an attribute holds exactly: ONNX and TensorRT have float32."""
    return float(np.float32(value))


def _norm_samples(rng: np.random.Generator, element: str, tokens: int) -> list[Sample]:
    dtype, epsilon, scale = DTYPES[element], attribute(1e-5), attribute(0.3)
    x, branch = (rng.normal(size=(tokens, 64)).astype(dtype) for _ in range(2))
    weight = rng.uniform(0.5, 1.5, 64).astype(dtype)
    total, y = add_rms_norm(x, branch, weight, scale, epsilon)
    close = {"absolute": 1e-7, "relative": 2 * UNIT[element]}
    return [
        Sample(RMSNorm(epsilon), {"x": x, "weight": weight}, {"y": rms_norm(x, weight, epsilon)}, **close),
        Sample(
            AddRMSNorm(scale, epsilon),
            {"hidden": x, "branch": branch, "weight": weight},
            {"total": total, "y": y},
            **close,
        ),
    ]


def _swiglu_samples(rng: np.random.Generator, element: str, tokens: int) -> list[Sample]:
    gate_up = rng.normal(size=(tokens, 2 * 72)).astype(DTYPES[element])
    return [Sample(SwiGLU(), {"gate_up": gate_up}, {"y": swiglu(gate_up)}, 1e-7, 2 * UNIT[element])]


def _rope_samples(rng: np.random.Generator, tokens: int) -> list[Sample]:
    factor, half, original = attribute(1.2), 32, 4096
    tables = rope_tables(10000.0, rng.uniform(1, 2, half).tolist(), rng.uniform(2, 40, half).tolist())
    positions = rng.integers(0, 131072, tokens).astype(np.int32)
    query_start = np.array([0, 1, tokens], np.int32)
    switch_length = np.array([original, original + 1], np.int32)
    constants = {"inverse_short": tables.inverse_short, "frequency": tables.frequency}
    short = rope_table(positions, query_start, None, tables, 0, factor)
    long = rope_table(positions, query_start, switch_length, tables, original, factor)
    return [
        Sample(RopeTable(factor), {"positions": positions, **constants}, {"cos": short[0], "sin": short[1]}, 4e-7),
        Sample(
            LongRopeTable(original, factor),
            {
                "positions": positions,
                "query_start": query_start,
                "switch_length": switch_length,
                "inverse_long": tables.inverse_long,
                **constants,
            },
            {"cos": long[0], "sin": long[1]},
            4e-7,
        ),
    ]


def _linear_inputs(
    rng: np.random.Generator, element: str, rows: int, n: int, k: int, bits: int, group: int
) -> tuple[Arrays, np.ndarray]:
    """Small whole numbers and powers of two: sums are exact in any order. -> (inputs, y float64)."""
    x = rng.integers(-8, 9, (rows, k)).astype(DTYPES[element])
    codes = rng.integers(0, 3 if bits == 2 else 1 << bits, (n, k)).astype(np.uint8)
    exponents = rng.integers(-9, -3, (n, k // group) if group else n)
    scales = np.exp2(exponents).astype(np.float16 if group else np.float32)
    inputs = {"x": x, "weights": pack_codes(codes, bits), "scales": pack_scales(scales, k, bits)}
    return inputs, linear.linear(x, codes, scales, bits)


def _linear_samples(rng: np.random.Generator, element: str, tokens: int) -> list[Sample]:
    # What MiniCPM4 is quantised to, and BitCPM4; heads of both kinds.
    (bits, group), (head_bits, head_group) = {
        "float16": ((4, 128), (8, 0)),
        "bfloat16": ((2, 0), (4, 128)),
    }[element]
    inputs, y = _linear_inputs(rng, element, tokens, 136, 384, bits, group)
    head_inputs, logits = _linear_inputs(rng, element, min(tokens, 9), 301, 256, head_bits, head_group)
    head_logits = logits.astype(np.float32)
    return [
        Sample(PackedLinear(bits, group, 136, 384), inputs, {"y": y.astype(DTYPES[element])}),
        Sample(
            PackedHead(head_bits, head_group, 301, 256),
            head_inputs,
            {"logits": head_logits, "token": linear.argmax(head_logits)},
        ),
    ]


@dataclass(frozen=True)
class _Step:
    """A step's inputs but for the pools, and what all operators are told of it."""

    inputs: Arrays
    known: Arrays  # the same for the meaning, which looks at columns of the page table that lead nowhere
    pages: int
    sizes: dict[str, float]
    window: int


def _attention_step(rng: np.random.Generator, dtype: np.dtype, step: Step, heads: int, dim: int, window: int) -> _Step:
    tokens, kv_heads = len(step.positions), 2
    angles = rng.uniform(0, 6, (tokens, dim // 2))
    inputs = {
        "qkv": rng.normal(size=(tokens, (heads + 2 * kv_heads) * dim)).astype(dtype),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        **step.buffers,
    }
    known = {**inputs, "page_table": np.minimum(step.page_table, step.pages - 1)}
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "scale": attribute(dim**-0.5)}
    return _Step(inputs, known, step.pages, sizes, window)


def _pools(pool: np.ndarray, scales: np.ndarray | None, suffix: str = "") -> Arrays:
    """As the kernels have them; TensorRT's type of bytes is int8."""
    if scales is None:
        return {f"kv_pool{suffix}": device_order(pool)}
    return {f"kv_pool{suffix}": device_order(pool).view(np.int8), f"kv_scales{suffix}": scales.copy()}


def _dense_sample(step: _Step, pool: np.ndarray, scales: np.ndarray | None, close: dict[str, float]) -> Sample:
    before, sizes = _pools(pool, scales), {**step.sizes, "window": step.window}
    output = paged_attention(pool=pool, kv_scales=scales, **step.known, **sizes)
    operator = PagedAttention if scales is None else PagedAttentionInt8
    expected = {"output": output, **_pools(pool, scales, "_out")}
    return Sample(operator(head_dim=pool.shape[-1], **sizes), {**step.inputs, **before}, expected, **close)


def _sparse_sample(
    step: _Step, kind: str, pool: np.ndarray, scales: np.ndarray | None, close: dict[str, float]
) -> Sample:
    kv_heads, dim, use_nope, dtype = *pool.shape[2::2], pool.shape[1] == 3, step.inputs["qkv"].dtype
    windows = {
        "c1_pool": np.full((step.pages, kv_heads, 4, dim), np.nan, dtype),
        "c2_pool": np.full((step.pages, kv_heads, 1, dim), np.nan, dtype),
    }
    for b, (past, _) in enumerate(STEPS[kind]):
        for name, sizes in (("c1_pool", infllmv2.FINE), ("c2_pool", infllmv2.COARSE)):
            stored = stored_values(pool, scales)
            infllmv2.compress(windows[name], stored, step.known["page_table"][b], np.arange(past), *sizes)
    lengths = [past + new for past, new in STEPS[kind]]
    rest = {"switch_length": np.array(lengths, np.int32), "sparse_settings": np.array((400, 1, 2, 5), np.int32)}
    before = {**_pools(pool, scales), **{name: array.copy() for name, array in windows.items()}}
    output = infllmv2.infllmv2_attention(
        kv_pool=pool, kv_scales=scales, **windows, **step.known, **rest, **step.sizes, use_nope=use_nope
    )
    operator = InfLLMv2Attention if scales is None else InfLLMv2AttentionInt8
    return Sample(
        operator(head_dim=dim, use_nope=int(use_nope), max_blocks=7, **step.sizes),
        {**step.inputs, **before, **rest},
        {"output": output, **_pools(pool, scales, "_out"), **{f"{name}_out": a for name, a in windows.items()}},
        **close,
    )


def _attention_samples(rng: np.random.Generator, element: str, kind: str) -> list[Sample]:
    """Both models' shapes. Probabilities and keys are rounded to the element type before they are multiplied."""
    dtype, kv_heads = DTYPES[element], 2
    group, dim, use_nope = {"float16": (16, 128, False), "bfloat16": (8, 64, True)}[element]
    close = {"absolute": {"float16": 3e-3, "bfloat16": 2e-2}[element], "relative": 2 * UNIT[element]}
    pages = make_step(rng, STEPS[kind], trees=TREES.get(kind, ()))
    step = _attention_step(rng, dtype, pages, group * kv_heads, dim, WINDOWS.get(kind, 0))
    pool = past_pool(rng, pages, 2, kv_heads, dim, dtype)
    dense = [_dense_sample(step, *one, close) for one in ((pool.copy(), None), quantise_pool(pool))]
    pool = past_pool(rng, pages, 3 if use_nope else 2, kv_heads, dim, dtype)
    sparse = [_sparse_sample(step, kind, *one, close) for one in ((pool.copy(), None), quantise_pool(pool))]
    return dense + sparse


def samples(kind: str, element: str) -> dict[str, Sample]:
    """{operator: a call of it} of a decode step or a prompt's chunk, with activations of one type."""
    rng, tokens = np.random.default_rng(0), TOKENS[kind]
    made = [
        *_norm_samples(rng, element, tokens),
        *_swiglu_samples(rng, element, tokens),
        *_rope_samples(rng, tokens),
        *_linear_samples(rng, element, tokens),
        *_attention_samples(rng, element, kind),
    ]
    return {sample.operator.NAME: sample for sample in made}
