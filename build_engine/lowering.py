"""From the graph to one target: pick the operator of every projection, pack its weights, store them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from build_engine.checkpoint import Checkpoint, LazyTensor
from build_engine.formats import HEAD_BITS, Target, WeightFormat
from build_engine.graph import edge_node
from build_engine.quantize import GROUP_SIZES, pack_nibbles, quantize_affine, quantize_symmetric
from build_engine.weight_rows import (
    coded_rows,
    convert,
    float_rows,
    half_scales,
    projections,
    row_chunks,
    stacked_shape,
    takes_over,
    whole_tiles,
)
from build_engine.weights_file import WeightsFile
from edge.config import SparseConfig
from edge.errors import EdgeError
from plugins.block_linear import pack as block_pack
from plugins.launch import divide_up
from plugins.linear.meaning import ZEROS
from plugins.linear.pack import TILE_ROWS, pack_codes, pack_scales, vector_inputs
from plugins.tile_linear import pack as tile_pack

# Inputs of a CPU's block for a scale a row: the fewest scales to store and to multiply by.
ROW_BLOCK = block_pack.BLOCKS[-1]
EMBEDDING = "model.embed_tokens.weight"
Progress = Callable[[int, int, str], None]


def lower(
    graph: onnx.ModelProto,
    checkpoint: Checkpoint,
    target: Target,
    weights: WeightFormat,
    file: WeightsFile,
    progress: Progress = lambda done, total, name: None,
    stored: Iterable[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """Replace every `edge.Linear` and fill every empty initializer, streaming the weights into `file`.

    stored: tensors that the file has already, under the names that they would get here.
    """
    lowering = _Lowering(checkpoint, target, weights, file, {tensor.name: tensor for tensor in stored})
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    pending = [t for t in graph.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    linears = sum(node.op_type == "Linear" for node in graph.graph.node)
    total, done = len(pending) + linears, 0

    del model.graph.initializer[:], model.graph.node[:]
    for tensor in graph.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            model.graph.initializer.append(tensor)
            continue
        if tensor.name == EMBEDDING and weights.embedding == "int8":
            lowering.store_int8_rows(tensor)
        else:
            model.graph.initializer.append(lowering.plain_weight(tensor))
        done += 1
        progress(done, total, tensor.name)
    for node in graph.graph.node:
        if node.op_type == "Gather" and node.input[0] == EMBEDDING and weights.embedding == "int8":
            model.graph.node.extend(_int8_rows(node))
            continue
        if node.op_type != "Linear":
            model.graph.node.append(node)
            continue
        model.graph.node.extend(lowering.linear(node))
        done += 1
        progress(done, total, node.name)
    model.graph.initializer.extend(lowering.initializers)
    if weights.packs_head:
        _add_output(model.graph, 1, helper.make_tensor_value_info("token", TensorProto.INT32, ["R"]))
    if target.tensorrt:
        _fix_sparse_settings(model.graph, checkpoint.config.sparse)
    return model


def _int8_rows(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Rows of a table of int8 codes and a scale a row, as float32, in place of the Gather of its values."""
    table, ids = node.input
    rows, scales, wide = (f"{node.name}.{part}" for part in ("codes", "scales", "wide"))
    return [
        helper.make_node("Gather", [f"{table}.int8", ids], [rows], rows, axis=0),
        helper.make_node("Gather", [f"{table}.scales", ids], [scales], scales, axis=0),
        helper.make_node("Cast", [rows], [wide], wide, to=TensorProto.FLOAT),
        helper.make_node("Mul", [wide, scales], list(node.output), node.name),
    ]


def _add_output(graph: onnx.GraphProto, place: int, value: onnx.ValueInfoProto) -> None:
    outputs = list(graph.output)
    del graph.output[:]
    graph.output.extend([*outputs[:place], value, *outputs[place:]])


def _fix_sparse_settings(graph: onnx.GraphProto, sparse: SparseConfig | None) -> None:
    """An engine is built for one choice: top-k needs a size that is known then."""
    if sparse is None:
        return
    values = [sparse.dense_len, sparse.init_blocks, sparse.local_blocks, sparse.selected_blocks]
    graph.initializer.append(numpy_helper.from_array(np.array(values, np.int32), "sparse_settings"))
    kept = [value for value in graph.input if value.name != "sparse_settings"]
    del graph.input[:]
    graph.input.extend(kept)


def table_type(source: LazyTensor, target: Target, weights: WeightFormat) -> np.dtype:
    """What the embedding is stored as, unless as int8: 16 bits where the checkpoint, format or target has them."""
    if target.tensorrt or (weights.kind != "exact" and source.dtype == np.float32):
        return np.dtype(np.float16)
    return source.dtype


@dataclass
class _Lowering:
    checkpoint: Checkpoint
    target: Target
    weights: WeightFormat
    file: WeightsFile
    stored: Mapping[str, onnx.TensorProto]

    def __post_init__(self) -> None:
        self.initializers: list[onnx.TensorProto] = []
        self._plain_types: dict[str, int] = {}  # plain weights of this graph: name -> element type

    def plain_weight(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """A norm (activation type) or the embedding, which keeps 16 bits where the checkpoint or format has them."""
        if (stored := self.stored.get(tensor.name)) is not None:
            self._plain_types[tensor.name] = stored.data_type
            return stored
        source = self.checkpoint.tensors[tensor.name]
        element_type = tensor.data_type
        if len(source.shape) == 2:
            element_type = helper.np_dtype_to_tensor_dtype(table_type(source, self.target, self.weights))
        dtype = helper.tensor_dtype_to_np_dtype(element_type)
        chunks = (convert(source.name, rows, dtype) for rows in row_chunks(source))
        self._plain_types[tensor.name] = element_type
        return self.file.add(tensor.name, element_type, list(source.shape), chunks)

    def store_int8_rows(self, tensor: onnx.TensorProto) -> None:
        """A table [V, H] as int8 codes and float32 scales [V, 1], for `_int8_rows`."""
        source = self.checkpoint.tensors[tensor.name]
        scales: list[np.ndarray] = []

        def codes() -> Iterator[np.ndarray]:
            for rows in float_rows([source]):
                part = quantize_symmetric(rows, source.shape[1], bits=8)
                scales.append(part.scales)
                yield (part.codes.reshape(rows.shape).astype(np.int16) - ZEROS[8]).astype(np.int8)

        self._store(f"{tensor.name}.int8", TensorProto.INT8, list(source.shape), codes())
        self._store(f"{tensor.name}.scales", TensorProto.FLOAT, [source.shape[0], 1], scales)

    def linear(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that compute one projection; their weights go to the file."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        sources = [self.checkpoint.tensors[name.decode()] for name in attributes["weights"]]
        if attributes["role"] == b"head":
            return self._head(node, sources)
        if not self.weights.is_low_bit:
            return self._numbers(node, sources)
        bits, group = self.weights.bits, self.weights.group_size
        if self.weights.kind == "ternary":
            _require_ternary(sources, group)
        if self.weights.linear == "packed":
            return self._packed("PackedLinear", node, list(node.output), sources, bits, group)
        if self.target.tensorrt:
            return self._dequantize_linear(node, sources, group)
        if self.weights.is_asymmetric:
            return [self._block_linear_offsets(node, sources)]
        return [self._block_linear(node, sources, bits, group)]

    def _head(self, node: onnx.NodeProto, sources: list[LazyTensor]) -> list[onnx.NodeProto]:
        """The logits, float32, and with packed weights the largest one's token."""
        bits, group = HEAD_BITS.get(self.weights.head, 0), self.weights.head_group_size
        if self.weights.packs_head:
            return self._packed("PackedHead", node, ["logits", "token"], sources, bits, group)
        raw = onnx.NodeProto()
        raw.CopyFrom(node)
        casts: list[onnx.NodeProto] = []
        if self.target.types.activation != TensorProto.FLOAT:
            raw.name = raw.output[0] = "head.raw"
            casts = [helper.make_node("Cast", ["head.raw"], list(node.output), node.name, to=TensorProto.FLOAT)]
        if not self.weights.is_low_bit or self.weights.head == "exact":
            return [*self._numbers(raw, sources), *casts]
        if self.target.tensorrt:
            return self._dequantize_linear(raw, sources, group) + casts
        return [self._block_linear(raw, sources, bits, group), *casts]

    def _numbers(self, node: onnx.NodeProto, sources: list[LazyTensor]) -> list[onnx.NodeProto]:
        """Weights that are no codes: the checkpoint's own, or float16."""
        return self._gemm(node, sources) if self.target.tensorrt else [self._tile_linear(node, sources)]

    def _gemm(self, node: onnx.NodeProto, sources: list[LazyTensor]) -> list[onnx.NodeProto]:
        """On float16 values [N, K], cast to the activation type when the engine is built."""
        x, y = node.input[0], node.output[0]
        activation = self.target.types.activation
        name = sources[0].name if len(sources) == 1 else f"{node.name}.weight"
        if name not in self._plain_types and (stored := self.stored.get(name)) is not None:
            self.initializers.append(stored)
            self._plain_types[name] = stored.data_type
        if name not in self._plain_types:
            values = _values(sources, np.dtype(np.float16))
            self.initializers.append(self.file.add(name, TensorProto.FLOAT16, list(stacked_shape(sources)), values))
            self._plain_types[name] = TensorProto.FLOAT16
        nodes = []
        if self._plain_types[name] != activation:
            nodes.append(helper.make_node("Cast", [name], [f"{node.name}.cast"], f"{node.name}.cast", to=activation))
            name = f"{node.name}.cast"
        return [*nodes, helper.make_node("Gemm", [x, name], [y], node.name, transB=1)]

    def _tile_linear(self, node: onnx.NodeProto, sources: list[LazyTensor]) -> onnx.NodeProto:
        """The layout of plugins/tile_linear, written some row tiles at a time."""
        n, k = stacked_shape(sources)
        dtypes = {source.dtype for source in sources}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        if self.weights.kind == "fp16" or (self.weights.is_low_bit and dtype == np.float32):
            dtype = np.dtype(np.float16)  # as the embedding is
        packed = (tile_pack.pack_tiles(rows) for rows in whole_tiles(_values(sources, dtype)))
        stored = [divide_up(n, tile_pack.TILE_ROWS), k, tile_pack.TILE_ROWS]
        element_type = helper.np_dtype_to_tensor_dtype(dtype)
        inputs = [node.input[0], self._store(f"{node.name}.tiles", element_type, stored, packed)]
        return edge_node("TileLinear", node.name, inputs, list(node.output), n=n)

    def _block_linear(self, node: onnx.NodeProto, sources: list[LazyTensor], bits: int, group: int) -> onnx.NodeProto:
        """The layout of plugins/block_linear, written some row tiles at a time; a scale a row is one a block, too."""
        n, k = stacked_shape(sources)
        block = group or ROW_BLOCK
        scales: list[np.ndarray] = []

        def codes() -> Iterator[np.ndarray]:
            for part, its_scales in coded_rows(sources, bits, group or k, block):
                scales.append(its_scales)
                yield part

        return self._store_blocks(node, (n, k), bits, block, codes(), scales)

    def _block_linear_offsets(self, node: onnx.NodeProto, sources: list[LazyTensor]) -> onnx.NodeProto:
        """Groups with a minimum of their own: code 8, the operator's zero, stands for offset = minimum + 8 scale.

        A whole-number zero point would cost up to half a step of every weight.
        """
        n, k = stacked_shape(sources)
        group = self.weights.group_size
        if k % group:
            raise EdgeError(
                f"{node.name}: {k} input features are not a multiple of group size {group}, which asymmetric int4 "
                "needs; choose a smaller --group-size or --symmetric"
            )
        scales: list[np.ndarray] = []
        offsets: list[np.ndarray] = []

        def codes() -> Iterator[np.ndarray]:
            for rows in float_rows(sources):
                part = quantize_affine(rows, group)
                scales.append(part.scales)
                offsets.append(convert(f"{node.name}.offsets", part.minima + 8 * part.scales, np.dtype(np.float16)))
                yield part.codes.reshape(len(rows), k)

        return self._store_blocks(node, (n, k), 4, group, codes(), scales, offsets)

    def _store_blocks(
        self,
        node: onnx.NodeProto,
        of: tuple[int, int],
        bits: int,
        block: int,
        codes: Iterable[np.ndarray],
        scales: list[np.ndarray],
        offsets: list[np.ndarray] | None = None,
    ) -> onnx.NodeProto:
        """A matrix `of` (N, K). Scales and offsets are there once `codes`, chunks [rows, K], were all taken."""
        n, k = of
        tiles, blocks = divide_up(n, tile_pack.TILE_ROWS), divide_up(k, block)
        packed = (block_pack.pack_codes(rows, bits, block) for rows in whole_tiles(codes))
        stored = [tiles, blocks, block // block_pack.vector_inputs(bits), tile_pack.TILE_ROWS, 4]
        by_tile = [tiles, blocks, tile_pack.TILE_ROWS]
        inputs = [
            node.input[0],
            self._store(f"{node.name}.int{bits}", TensorProto.UINT8, stored, packed),
            self._store(f"{node.name}.scales", TensorProto.FLOAT, by_tile, _by_tile(scales)),
        ]
        if offsets is not None:
            inputs.append(self._store(f"{node.name}.offsets", TensorProto.FLOAT16, by_tile, _by_tile(offsets)))
        op_type = "BlockLinear" if offsets is None else "BlockLinearOffsets"
        return edge_node(op_type, node.name, inputs, list(node.output), bits=bits, block=block, n=n, k=k)

    def _packed(
        self, op_type: str, node: onnx.NodeProto, outputs: list[str], sources: list[LazyTensor], bits: int, group: int
    ) -> list[onnx.NodeProto]:
        """The plugins' layout (plugins/linear), written some row tiles at a time."""
        n, k = stacked_shape(sources)
        scales: list[np.ndarray] = []

        def codes() -> Iterator[np.ndarray]:
            for part, its_scales in coded_rows(sources, bits, group or k, group or k):
                scales.append(half_scales(f"{node.name}.scales", its_scales) if group else its_scales[:, 0])
                yield part

        shape = [divide_up(n, TILE_ROWS), k // vector_inputs(bits), 32, 4]
        packed = (pack_codes(tiles, bits) for tiles in whole_tiles(codes()))
        words = self._store(f"{node.name}.int{bits}", TensorProto.INT32, shape, packed)
        by_lane = pack_scales(np.concatenate(scales), k, bits)
        element_type = TensorProto.FLOAT16 if group else TensorProto.FLOAT
        scale = self._store(f"{node.name}.scales", element_type, list(by_lane.shape), [by_lane])
        inputs = [node.input[0], words, scale]
        return [edge_node(op_type, node.name, inputs, outputs, bits=bits, group=group, n=n, k=k)]

    def _store(self, name: str, element_type: int, shape: list[int], chunks: Iterable[np.ndarray]) -> str:
        stored = self.stored.get(name)
        self.initializers.append(self.file.add(name, element_type, shape, chunks) if stored is None else stored)
        return name

    def _dequantize_linear(self, node: onnx.NodeProto, sources: list[LazyTensor], group: int) -> list[onnx.NodeProto]:
        """TensorRT's native int4, of ternary codes -1, 0, 1: block-wise DequantizeLinear [N, K], then a MatMul."""
        n, k = stacked_shape(sources)
        block = group or next((size for size in reversed(GROUP_SIZES) if k % size == 0), GROUP_SIZES[0])
        if k % block:
            raise EdgeError(
                f"{node.name}: {k} input features are not a multiple of group size {block}, which TensorRT needs; "
                "choose a smaller --group-size"
            )
        scales: list[np.ndarray] = []

        def packed() -> Iterator[np.ndarray]:
            for codes, part in coded_rows(sources, 4, group or k, block):
                scales.append(half_scales(f"{node.name}.scales", part))
                yield pack_nibbles(codes ^ 8)  # code - 8 in two's complement is the code with its top bit flipped

        int4 = self._store(f"{node.name}.int4", TensorProto.INT4, [n, k], packed())
        scale = self._store(f"{node.name}.scales", TensorProto.FLOAT16, [n, k // block], scales)
        dense, transposed = f"{node.name}.dense", f"{node.name}.transposed"
        return [
            helper.make_node("DequantizeLinear", [int4, scale], [dense], dense, axis=1, block_size=block),
            helper.make_node("Transpose", [dense], [transposed], transposed, perm=[1, 0]),
            helper.make_node("MatMul", [node.input[0], transposed], list(node.output), node.name),
        ]


def _values(sources: list[LazyTensor], dtype: np.dtype) -> Iterator[np.ndarray]:
    return (convert(source.name, rows, dtype) for source in sources for rows in row_chunks(source))


def _by_tile(parts: list[np.ndarray]) -> Iterator[np.ndarray]:
    yield tile_pack.pack_tiles(np.concatenate(parts))


def describe_weights(weights: WeightFormat, checkpoint: Checkpoint, model: onnx.ModelProto) -> str:
    """The format, and the bits that a projection's weight takes with its scales beside those of its code alone."""
    if not weights.is_low_bit:
        return weights.describe()
    count = sum(math.prod(tensor.shape) for tensor in projections(checkpoint))
    size = 0
    for tensor in model.graph.initializer:
        # Codes and scales are named after their nodes, embedding and norms as in the checkpoint.
        if tensor.name.startswith("layers.") and tensor.name not in checkpoint.tensors:
            size += next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
    return f"{weights.describe()}, {8 * size / count:.2f} bits a weight (ideal {weights.bits})"


def _require_ternary(sources: list[LazyTensor], group: int) -> None:
    for source in sources:
        if not takes_over(source, 2, group or source.shape[1]):
            wanted = f"groups of {group}" if group else "rows"
            raise EdgeError(
                f"tensor {source.name} has no ternary codes with a scale for {wanted}; choose another --weights"
            )
