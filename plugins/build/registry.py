"""Which kernels there are: the product's, as representative launches, and those that one model needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edge.config import ModelConfig
from plugins.embedding import launch as embedding
from plugins.infllmv2 import launch as infllmv2
from plugins.launch import Kernel, Launch
from plugins.linear import launch as linear
from plugins.paged_attention import launch as paged_attention
from plugins.paged_attention.launch import AttentionShape
from plugins.rms_norm import launch as rms_norm
from plugins.rope import launch as rope
from plugins.sampling import launch as sampling
from plugins.swiglu import launch as swiglu

OPERATORS = (embedding, rms_norm, linear, rope, paged_attention, infllmv2, swiglu, sampling)
STEPS = (1, 16, 1024)  # new tokens of a step: decode, verification, prefill

Format = tuple[int, int]  # bits of a weight, and inputs that share a scale (plugins/linear)


def product_launches() -> dict[str, Launch]:
    """Representative launches at the shapes of MiniCPM4-8B and 0.5B, by name; several may have one kernel."""
    launches: dict[str, Launch] = {}
    for operator in OPERATORS:
        for name, launch in operator.product_launches().items():
            if name in launches:
                raise ValueError(f"two product launches are called {name}")
            launches[name] = launch
    return launches


def kernels_for(
    config: ModelConfig, element: str, kv_element: str, weights: Format | None, head: Format | None
) -> list[Kernel]:
    """All kernels that may be launched for a model; EdgeError names a size for which there are none.

    element: 'half' or 'bf16'; kv_element: the same or 'uint8_t'; weights, head: None if they are not quantised.
    """
    launches = _launches(config, element, kv_element, weights, head)
    return list(dict.fromkeys(launch.kernel for launch in launches))


def _launches(
    config: ModelConfig, element: str, kv_element: str, weights: Format | None, head: Format | None
) -> Iterator[Launch]:
    hidden, width, half = config.hidden_size, config.intermediate_size, config.head_dim // 2
    yield embedding.scaled_rows(1, hidden, element, 1, config.vocab_size)
    yield rms_norm.rms_norm(1, hidden, element, config.rms_norm_eps)
    yield rms_norm.add_rms_norm(1, hidden, element, 1, config.rms_norm_eps)
    yield rope.rope_table(1, half, 1)
    yield swiglu.swiglu(1, width, element)
    yield sampling.sample(1, config.vocab_size)
    yield sampling.advance(1, 1)
    yield from _attention_launches(config, element, kv_element)
    if weights is not None:
        attended = config.num_attention_heads * config.head_dim
        for inputs in (hidden, attended, width):
            shape = linear.LinearShape(1, hidden, inputs, *weights, element)
            # Which of these are launched depends on a device's SMs.
            yield linear.linear(shape)
            yield from (linear.gemv(shape, tiles) for tiles in linear.row_tile_choices(*weights))
            if weights[0] != 8:
                yield from (linear.gemm(shape, tokens) for tokens in linear.GEMM_TOKENS)
    if head is not None:
        yield from linear.head(linear.LinearShape(1, config.vocab_size, hidden, *head, element))


def _attention_launches(config: ModelConfig, element: str, kv_element: str) -> Iterator[Launch]:
    sparse = config.sparse
    for tokens in STEPS:
        shape = AttentionShape(
            tokens,
            1,
            1,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            element,
            kv_element,
            limit=sparse.selected_blocks if sparse else 0,
            use_nope=sparse is not None and sparse.use_nope,
        )
        yield paged_attention.append(shape)
        yield paged_attention.keep(shape)
        for window in (0,) if sparse else (0, 1):  # dense layers may have one, as those of drafts do
            yield paged_attention.attend_tiles(replace(shape, window=window), 1)
            yield paged_attention.attend_split(replace(shape, window=window), 1, 1)
        yield paged_attention.combine(shape, 1, 1)
        if sparse is not None:
            yield infllmv2.compress(shape)
            yield infllmv2.score_coarse(shape, 1)
            yield infllmv2.score_fine(shape, 1)
            yield infllmv2.select(shape)
