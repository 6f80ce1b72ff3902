"""The MiniCPM4 forward pass as an ONNX graph (spec: infllmv2.md 2), one ragged step of any batch (DESIGN 7).

The graph names its weights but holds none: norms and the embedding are initializers without data, every
projection is an `edge.Linear` placeholder that names the checkpoint tensors it stacks. Lowering
(build_engine/lowering.py) picks operators and packs weights for one target.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import plugins
from edge.config import LongRope, ModelConfig
from edge.kv_cache import COMPRESSED_POOLS, pool_layout
from plugins.rope.meaning import rope_tables

INT32 = TensorProto.INT32
STEP_INPUTS = ("positions", "slots", "query_start", "page_table", "tree_start", "tree_mask")  # of all attention


@dataclass(frozen=True)
class GraphTypes:
    """Element types of one target: activations, and what the KV pool stores."""

    activation: int = TensorProto.FLOAT
    kv: int = TensorProto.FLOAT16

    @property
    def names(self) -> dict[str, str]:
        """numpy's, as a bundle's manifest has them."""
        return {
            "activation": helper.tensor_dtype_to_np_dtype(self.activation).name,
            "kv": helper.tensor_dtype_to_np_dtype(self.kv).name,
        }


def edge_node(op_type: str, name: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    """An operator of domain `edge`; TensorRT looks for a plugin because of the two plugin attributes."""
    attributes.update(domain=plugins.DOMAIN, plugin_namespace="", plugin_version="1")
    return helper.make_node(op_type, inputs, outputs, name=name, **attributes)


@dataclass
class Builder:
    """Collects nodes; a value's name is the name of the node that made it."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def op(self, op_type: str, name: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def edge(self, op_type: str, name: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(edge_node(op_type, name, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def linear(self, name: str, x: str, weights: list[str], role: str = "body") -> str:
        """x [T, in] times the stacked rows of `weights` transposed -> [T, out].

        The role 'head', which may be stored otherwise, gives float32 whatever x is.
        """
        return self.op("Linear", name, x, domain=plugins.DOMAIN, weights=weights, role=role)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, shape: list[int], element_type: int) -> str:
        """An initializer whose data lowering will supply from the checkpoint tensor of the same name."""
        tensor = TensorProto(name=name, dims=shape, data_type=element_type)
        tensor.data_location = TensorProto.EXTERNAL
        self.initializers.append(tensor)
        return name


def build_graph(config: ModelConfig, types: GraphTypes = GraphTypes(), *, hidden: bool = False) -> onnx.ModelProto:
    """The whole model. Inputs and outputs: `graph_inputs`, `graph_outputs`.

    hidden: whether the final norm's output of all rows is an output, too, for a draft model.
    """
    b = Builder()
    residual = embed(b, config, types)
    cos, sin = rope_nodes(b, config)
    normed = b.edge(
        "RMSNorm",
        "layers.0.input_norm",
        residual,
        b.weight(_layer(0, "input_layernorm.weight"), [config.hidden_size], types.activation),
        epsilon=config.rms_norm_eps,
    )
    for index in range(config.num_hidden_layers):
        cuts_rows = index == config.num_hidden_layers - 1 and not hidden
        residual, normed = _decoder_layer(b, config, types, index, residual, normed, cos, sin, cuts_rows)
    outputs = graph_outputs(config, types)
    if hidden:
        b.op("Cast", "hidden", normed, to=TensorProto.FLOAT)
        outputs.insert(1, helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["T", config.hidden_size]))
        normed = b.op("Gather", "head.rows", normed, "logits_rows", axis=0)
    _head(b, config, types, normed)
    return make_model(b, "minicpm4", graph_inputs(config, types), outputs)


def make_model(
    b: Builder, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """The nodes as a model, with the meaning of every `edge` operator."""
    graph = helper.make_graph(b.nodes, name, inputs, outputs, b.initializers)
    return helper.make_model(
        graph,
        functions=plugins.functions(),
        opset_imports=[
            helper.make_opsetid("", plugins.OPSET),
            helper.make_opsetid(plugins.DOMAIN, plugins.DOMAIN_VERSION),
        ],
        ir_version=10,
        producer_name="minicpm-edge",
    )


def graph_inputs(config: ModelConfig, types: GraphTypes) -> list[onnx.ValueInfoProto]:
    """T new tokens of B sequences; P page-table columns; R rows that need logits.

    `slots`, `tree_start` and `tree_mask` say where tokens are stored and what rows of a tree see (plugins/infllmv2).
    `switch_length` [B] (only if something depends on it) is the length that selects LongRoPE's factor list and
    dense or sparse attention: the whole prompt's during its chunked prefill, then the context's, so that chunking
    never changes the result. `sparse_settings` [4] (only if the model is sparse): see plugins/infllmv2.
    """
    inputs = [
        helper.make_tensor_value_info("input_ids", INT32, ["T"]),
        helper.make_tensor_value_info("positions", INT32, ["T"]),
        helper.make_tensor_value_info("slots", INT32, ["T"]),
        helper.make_tensor_value_info("query_start", INT32, ["B_plus_1"]),
        helper.make_tensor_value_info("page_table", INT32, ["B", "P"]),
        helper.make_tensor_value_info("tree_start", INT32, ["B"]),
        helper.make_tensor_value_info("tree_mask", INT32, ["T", 2]),
        helper.make_tensor_value_info("logits_rows", INT32, ["R"]),
    ]
    if config.switches_on_length:
        inputs.append(helper.make_tensor_value_info("switch_length", INT32, ["B"]))
    if config.sparse is not None:
        inputs.append(helper.make_tensor_value_info("sparse_settings", INT32, [4]))
    return inputs + _pools(config, types)


def graph_outputs(config: ModelConfig, types: GraphTypes) -> list[onnx.ValueInfoProto]:
    """`logits` [R, vocab] float32, and each layer's pool after the step (the same memory as its input)."""
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["R", config.vocab_size])
    return [logits, *_pools(config, types, "_out")]


def _pools(config: ModelConfig, types: GraphTypes, suffix: str = "") -> list[onnx.ValueInfoProto]:
    # TensorRT takes extents of one name to be equal, and keys and values may have fewer pages: offloaded ones.
    pools = pool_layout(config, types.names).items()
    element = {name: helper.np_dtype_to_tensor_dtype(np.dtype(page.dtype)) for name, page in pools}
    extent = {name: "pages" if name in COMPRESSED_POOLS else "slots" for name, _ in pools}
    return [
        helper.make_tensor_value_info(f"{name}{suffix}.{layer}", element[name], [extent[name], *page.shape])
        for layer in range(config.num_hidden_layers)
        for name, page in pools
    ]


def _layer(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}"


def embed(b: Builder, config: ModelConfig, types: GraphTypes) -> str:
    """Rows of the embedding times its scale, [T, H]."""
    table = b.weight("model.embed_tokens.weight", [config.vocab_size, config.hidden_size], types.activation)
    rows = b.op("Gather", "embed.rows", table, "input_ids", axis=0)
    wide = b.op("Cast", "embed.cast", rows, to=types.activation)
    scale = b.constant("scale_emb", np.array(config.scale_emb, helper.tensor_dtype_to_np_dtype(types.activation)))
    return b.op("Mul", "embed", wide, scale)


def rope_nodes(b: Builder, config: ModelConfig) -> tuple[str, str]:
    """cos and sin [T, d/2] in float32 for every layer."""
    half = config.head_dim // 2
    rope = config.long_rope or LongRope((1.0,) * half, (1.0,) * half, config.max_position_embeddings)
    tables = rope_tables(config.rope_theta, rope.short_factor, rope.long_factor)
    frequency = b.constant("rope.frequency", tables.frequency)
    short = b.constant("rope.short", tables.inverse_short)
    factor = config.rope_attention_factor
    if not config.rope_lists_differ:
        return b.edge("RopeTable", "rope", "positions", short, frequency, outputs=2, attention_factor=factor)
    long = b.constant("rope.long", tables.inverse_long)
    inputs = ("positions", "query_start", "switch_length", short, long, frequency)
    limit = rope.original_max_position_embeddings
    return b.edge("LongRopeTable", "rope", *inputs, outputs=2, original_length=limit, attention_factor=factor)


def _decoder_layer(
    b: Builder,
    c: ModelConfig,
    types: GraphTypes,
    index: int,
    hidden: str,
    normed: str,
    cos: str,
    sin: str,
    cuts_rows: bool,
) -> tuple[str, str]:
    """(hidden, the next norm's output). Each norm is fused with the residual add before it.

    cuts_rows: only the rows that need logits go on after attention.
    """
    name = f"layers.{index}"
    qkv = b.linear(
        f"{name}.qkv",
        normed,
        [_layer(index, f"self_attn.{p}_proj.weight") for p in "qkv"],
    )
    attended = _attention(b, c, types, index, qkv, cos, sin)
    if cuts_rows:
        attended = b.op("Gather", "head.attention_rows", attended, "logits_rows", axis=0)
        hidden = b.op("Gather", "head.hidden_rows", hidden, "logits_rows", axis=0)
    out = b.linear(f"{name}.o", attended, [_layer(index, "self_attn.o_proj.weight")])
    post_norm = _layer(index, "post_attention_layernorm.weight")
    hidden, normed = _add_norm(b, c, types, f"{name}.post_norm", hidden, out, post_norm)
    gate_up = b.linear(
        f"{name}.gate_up",
        normed,
        [_layer(index, f"mlp.{p}_proj.weight") for p in ("gate", "up")],
    )
    gated = b.edge("SwiGLU", f"{name}.swiglu", gate_up)
    down = b.linear(f"{name}.down", gated, [_layer(index, "mlp.down_proj.weight")])
    last = index == c.num_hidden_layers - 1
    next_norm = "model.norm.weight" if last else _layer(index + 1, "input_layernorm.weight")
    return _add_norm(b, c, types, f"{name}.next_norm", hidden, down, next_norm)


def _attention(b: Builder, c: ModelConfig, types: GraphTypes, index: int, qkv: str, cos: str, sin: str) -> str:
    """Dense or InfLLM-V2 attention over the layer's pools, which it updates."""
    attended, pools = f"layers.{index}.attention", list(pool_layout(c, types.names))
    suffix = "Int8" if types.kv == TensorProto.INT8 else ""
    inputs = [qkv, cos, sin, *(f"{pool}.{index}" for pool in pools), *STEP_INPUTS]
    outputs = [attended, *(f"{pool}_out.{index}" for pool in pools)]
    attributes: dict[str, Any] = {
        "num_heads": c.num_attention_heads,
        "num_kv_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "scale": c.head_dim**-0.5,
    }
    if c.sparse is None:
        node = edge_node(f"PagedAttention{suffix}", attended, inputs, outputs, window=0, **attributes)
    else:
        inputs += ["switch_length", "sparse_settings"]
        attributes |= {"use_nope": int(c.sparse.use_nope), "max_blocks": c.sparse.selected_blocks}
        node = edge_node(f"InfLLMv2Attention{suffix}", attended, inputs, outputs, **attributes)
    b.nodes.append(node)
    return attended


def _add_norm(
    b: Builder, c: ModelConfig, types: GraphTypes, name: str, hidden: str, branch: str, weight: str
) -> tuple[str, str]:
    total, normed = b.edge(
        "AddRMSNorm",
        name,
        hidden,
        branch,
        b.weight(weight, [c.hidden_size], types.activation),
        outputs=2,
        scale=c.residual_scale,
        epsilon=c.rms_norm_eps,
    )
    return total, normed


def _head(b: Builder, c: ModelConfig, types: GraphTypes, normed: str) -> None:
    """logits = W_head (h / (hidden_size / dim_model_base)), float32 whatever the activations are."""
    if c.logit_divisor != 1:
        dtype = helper.tensor_dtype_to_np_dtype(types.activation)
        normed = b.op("Mul", "head.scaled", normed, b.constant("head.scale", np.array(1 / c.logit_divisor, dtype)))
    weight = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    b.linear("logits", normed, [weight], role="head")
