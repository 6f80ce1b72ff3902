"""Which vectors a model needs: every kernel that it may launch is judged by one, and its decode step is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from edge.bundle import Manifest
from edge.config import ModelConfig, SparseConfig
from edge.errors import EdgeError
from edge.models import MINICPM4_05B, MINICPM4_8B
from plugins import PAGE_TOKENS
from plugins.embedding.vectors import rows_vector
from plugins.infllmv2.vectors import compress_vector, score_vector, select_vector
from plugins.linear.launch import GEMM_TOKENS, LinearShape, gemm, gemv, linear, row_tile_choices
from plugins.linear.vectors import head_vector, linear_vector
from plugins.paged_attention.launch import AttentionShape, choose_splits
from plugins.paged_attention.vectors import append_vector, keep_vector, shape_of, split_vector, tiles_vector
from plugins.rms_norm.vectors import add_norm_vector, norm_vector
from plugins.rope.vectors import table_vector
from plugins.sampling.vectors import advance_vector, sample_vector
from plugins.swiglu.vectors import swiglu_vector
from plugins.vectors import Vector

DENSE_CONTEXT, SPARSE_CONTEXT = 32768, 131072  # of the decode steps that are timed
_FEW_ROWS = 5
_TABLE_ROWS = 500  # of the embedding; a real one would only take memory
_MOST_OUTPUTS = 1000  # of a linear operator; the last tile is a half one
_ELEMENTS = {"float16": "half", "bfloat16": "bf16"}
_KV_ELEMENTS = {**_ELEMENTS, "int8": "uint8_t"}
_BITS = {"w4a16": 4, "ternary": 2}
_HEAD_BITS = {"int8": 8, "int4": 4}

Format = tuple[int, int]  # bits of a weight, and inputs that share a scale (plugins/linear)


@dataclass(frozen=True)
class ModelKernels:
    """All that decides which kernels a model launches, as in plugins/build/registry.py.

    element: 'half' or 'bf16'; kv_element: the same or 'uint8_t'; weights, head: None if they are not quantised.
    """

    config: ModelConfig
    element: str = "half"
    kv_element: str = "half"
    weights: Format | None = None
    head: Format | None = None

    @property
    def attention(self) -> AttentionShape:
        """Of its attention, for one token."""
        c = self.config
        return AttentionShape(
            1,
            1,
            1,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            self.element,
            self.kv_element,
            limit=c.sparse.selected_blocks if c.sparse else 0,
            use_nope=c.sparse is not None and c.sparse.use_nope,
        )

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of a layer's linear operators: qkv, o, gate_up, down."""
        c = self.config
        attended, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        hidden, width = c.hidden_size, c.intermediate_size
        return [(attended + 2 * kv, hidden), (hidden, attended), (2 * width, hidden), (hidden, width)]


# With weights of GPTQ and of BitCPM4: every family of kernels is among them.
PUBLISHED = {
    "MiniCPM4-8B, int4": ModelKernels(replace(MINICPM4_8B, sparse=SparseConfig()), weights=(4, 128), head=(4, 128)),
    "MiniCPM4-0.5B, ternary, int8 head, int8 KV": ModelKernels(
        replace(MINICPM4_05B, sparse=SparseConfig()), kv_element="uint8_t", weights=(2, 0), head=(8, 0)
    ),
}


def kernels_of(manifest: Manifest) -> ModelKernels:
    """What a bundle was exported for; EdgeError if it runs without CUDA kernels."""
    activation, kv = (manifest.types[name] for name in ("activation", "kv"))
    if activation not in _ELEMENTS or kv not in _KV_ELEMENTS:
        raise EdgeError(
            f"the bundle is for {manifest.target}, with {activation} activations, and has no CUDA kernels; export it "
            "with --target rtx, tensorrt or jetson"
        )
    found = ModelKernels(manifest.model, _ELEMENTS[activation], _KV_ELEMENTS[kv])
    if manifest.weights.get("linear") != "packed":
        return found
    weights = (_BITS[manifest.weights["kind"]], int(manifest.weights["group_size"]))
    head_bits = _HEAD_BITS.get(manifest.weights["head"])
    head_group = int(manifest.weights.get("head_group_size", weights[1]))  # older bundles have one group size
    return replace(found, weights=weights, head=None if head_bits is None else (head_bits, head_group))


def vectors_for(model: ModelKernels) -> list[Vector]:
    """Every kernel of the model at its own widths, with few tokens and short contexts; edges of tiles and pages."""
    c = model.config
    vectors = [
        *_row_vectors(model, _FEW_ROWS),
        append_vector([(60, 9), (63, 1), (0, 2)], model.attention),
        *_attend_vectors(replace(model.attention, limit=0)),
    ]
    if c.sparse is not None:
        shape = model.attention
        vectors += [
            *_attend_vectors(replace(shape, limit=min(shape.limit, 6))),
            compress_vector([(100, 40), (31, 1), (127, 1)], shape),
            score_vector(3, blocks=48, selected=20, shape=shape),
            score_vector(40, blocks=48, selected=20, shape=shape),
            select_vector(5, 300, _select_settings(c), shape),
        ]
    vectors += tree_vectors(model.attention, sparse=c.sparse is not None)
    if model.weights is not None:
        vectors += _linear_vectors(model, model.weights)
    if model.head is not None:
        vectors.append(
            head_vector(LinearShape(2, min(c.vocab_size, _MOST_OUTPUTS), c.hidden_size, *model.head, model.element))
        )
    return vectors


def tree_vectors(shape: AttentionShape, *, sparse: bool) -> list[Vector]:
    """Siblings, trees across pages, of all 64 tokens, of earlier steps and of a step's second token; a kept path.

    Dense rows also in windows, which other ones do not have.
    """
    tree, short, full = (-1, -1, 0, 0, 2, -1, 1), (-1, 0, -1, 1), tuple(max(-1, i // 2 - 1) for i in range(64))
    dense, sequences, trees = replace(shape, limit=0), [(300, 9), (62, 2), (60, 12), (3, 2)], [tree, (), tree, short]
    vectors = [
        append_vector(sequences, shape, trees),
        tiles_vector(sequences, dense, trees),
        keep_vector(125, (125, 127, 128, 131, 188), shape),
    ]
    if not sparse:
        return [
            *vectors,
            split_vector(sequences, replace(dense, window=1), 2, trees),
            tiles_vector(sequences, replace(dense, window=2), trees),
        ]
    chosen = replace(shape, limit=6)
    return [
        *vectors,
        tiles_vector(sequences, chosen, trees),
        split_vector([(700, 65)], chosen, 3, [full]),
        compress_vector([(100, 70), (31, 1), (120, 12)], shape, [(-1,) * 30, (), tree]),
        score_vector(5, 16, 6, chosen, short),
        score_vector(40, 16, 6, chosen, tree),
        select_vector(12, 300, (1, 2, 6), chosen, (*tree, 6, 4)),
    ]


def decode_vectors(model: ModelKernels, multiprocessors: int) -> list[Vector]:
    """What one decode step launches, at real sizes: for a device, an emulator would take minutes."""
    c, shape = model.config, model.attention
    dense = replace(shape, limit=0)
    vectors = [*_row_vectors(model, 1), append_vector([(127, 1)], shape)]
    contexts = [(DENSE_CONTEXT, dense)]
    if c.sparse is not None:
        blocks = SPARSE_CONTEXT // PAGE_TOKENS
        contexts.append((SPARSE_CONTEXT, shape))
        vectors += [
            compress_vector([(127, 1)], shape),
            score_vector(1, blocks, c.sparse.selected_blocks, shape),
            select_vector(1, blocks, _select_settings(c), shape),
        ]
    for context, attention in contexts:
        step = [(context - 1, 1)]
        vectors.append(split_vector(step, attention, choose_splits(shape_of(step, attention), multiprocessors)))
    if model.weights is not None:
        for n, k in model.projections:
            linear_shape = LinearShape(1, n, k, *model.weights, model.element)
            vectors.append(linear_vector(linear(linear_shape, multiprocessors), linear_shape))
    if model.head is not None:
        vectors.append(head_vector(LinearShape(1, c.vocab_size, c.hidden_size, *model.head, model.element)))
    return vectors


def _row_vectors(model: ModelKernels, rows: int) -> Iterator[Vector]:
    c, element = model.config, model.element
    yield rows_vector(rows, c.hidden_size, element, c.scale_emb, min(c.vocab_size, _TABLE_ROWS))
    yield norm_vector(rows, c.hidden_size, element, c.rms_norm_eps)
    yield add_norm_vector(rows, c.hidden_size, element, c.residual_scale, c.rms_norm_eps)
    yield table_vector(rows, c.head_dim // 2)
    yield swiglu_vector(rows, c.intermediate_size, element)
    yield sample_vector(min(rows, 3), c.vocab_size)
    yield advance_vector(rows)


def _attend_vectors(shape: AttentionShape) -> Iterator[Vector]:
    """Tiles, and splits of which the last have fewer blocks."""
    yield tiles_vector([(300, 9), (62, 2), (0, 1)], shape)
    yield split_vector([(699, 2), (63, 1)], shape, splits=3)


def _linear_vectors(model: ModelKernels, weights: Format) -> Iterator[Vector]:
    """Every block size: the kernel for one step is chosen by a device's multiprocessors."""
    n, k = model.projections[0]
    few = LinearShape(_FEW_ROWS, min(n, _MOST_OUTPUTS), k, *weights, model.element)
    yield from (linear_vector(gemv(few, tiles), few) for tiles in row_tile_choices(*weights))
    if weights[0] != 8:
        for tokens in GEMM_TOKENS:
            many = replace(few, tokens=2 * tokens - 3)  # the last block has fewer
            yield linear_vector(gemm(many, tokens), many)


def _select_settings(config: ModelConfig) -> tuple[int, int, int]:
    """init, local and selected blocks of a sparse model."""
    assert config.sparse is not None
    return config.sparse.init_blocks, config.sparse.local_blocks, config.sparse.selected_blocks
