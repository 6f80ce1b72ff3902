"""What a decode step has to read: the weights, and of the pools the analytic minimum (spec: infllmv2.md 5.2)."""

from __future__ import annotations

import onnx

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
    stored, rows = {}, {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            size = next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
            stored[tensor.name], rows[tensor.name] = size, tensor.dims[0]
    multiplied = {name for node in graph.node if node.op_type != "Gather" for name in node.input}
    return sum(size if name in multiplied else size // rows[name] for name, size in stored.items())
