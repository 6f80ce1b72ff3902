"""What a decode step has to read: the weights, and of the pools the analytic minimum (spec: infllmv2.md 5.2)."""

from __future__ import annotations

import math

import onnx

from build_engine.checkpoint import expected_shapes
from build_engine.formats import WeightFormat
from edge.bundle import GRAPH, Bundle
from edge.config import ModelConfig, SparseConfig


def minimum_pool_bytes(
    config: ModelConfig,
    context: int,
    value_bytes: int,
    sparse: SparseConfig | None,
    *,
    scale_bytes: int = 0,
    compressed_bytes: int | None = None,
) -> int:
    """Bytes of keys, values and compressed keys that one step at `context` tokens reads, over all layers.

    Dense (`sparse` None, or a context that is not computed sparsely): 2 Hkv d b n a layer. Sparse: 2 Hkv d b T for the
    T tokens of the selected blocks and Hkv d b (n/16 + n/64) for their choice, which is no choice up to T tokens.
    scale_bytes: of each key and value besides; compressed_bytes: b of compressed keys, if it is another.
    """
    row = config.num_key_value_heads * (config.head_dim * value_bytes + scale_bytes)
    compressed = config.num_key_value_heads * config.head_dim * (compressed_bytes or value_bytes)
    per_layer = 2 * row * context
    if sparse is not None and sparse.is_sparse(context):
        selected = sparse.selected_blocks * sparse.block_size
        if context > selected:
            windows = context // sparse.kernel_stride + context // (4 * sparse.kernel_stride)
            per_layer = 2 * row * selected + compressed * windows
    return config.num_hidden_layers * per_layer


def weight_bytes(bundle: Bundle) -> int:
    """Bytes of the stored weights that a step of one token reads: all but the embedding, and of that one row."""
    graph = onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph
    stored = _stored_bytes(graph)
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.name in stored}
    multiplied = {name for node in graph.node if node.op_type != "Gather" for name in node.input}
    return sum(size if name in multiplied else size // rows[name] for name, size in stored.items())


def bits_a_weight(bundle: Bundle) -> float:
    """Of a projection's weight as it is stored, with its share of scales, offsets and padding."""
    stored = _stored_bytes(onnx.load(str(bundle.file(GRAPH)), load_external_data=False).graph)
    size = sum(size for name, size in stored.items() if name.startswith("layers."))  # named after their nodes
    return 8 * size / sum(math.prod(shape) for shape in projection_shapes(bundle.config))


def ideal_bits(weights: WeightFormat, config: ModelConfig) -> float:
    """A code and the share of a float16 scale, and of a minimum if groups have one: for a group, or for a row."""
    shapes = projection_shapes(config)
    count = sum(rows * inputs for rows, inputs in shapes)
    groups = count / weights.group_size if weights.group_size else sum(rows for rows, _ in shapes)
    return weights.bits + 16 * (1 + weights.is_asymmetric) * groups / count


def projection_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """[N, K] of every matrix that low-bit formats are for."""
    return [shape for name, shape in expected_shapes(config) if name.endswith("_proj.weight")]


def _stored_bytes(graph: onnx.GraphProto) -> dict[str, int]:
    """Bytes in the weights file by name."""
    return {
        tensor.name: next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
