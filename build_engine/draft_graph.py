"""An EAGLE draft's forward pass as an ONNX graph (spec: quantization_and_speculation.md 4.1), one ragged step.

It joins the embedding of a token with the base's final-norm output at the position before it, sends the sum through
one decoder layer, and has no final norm: its output `hidden_out` is what the next guess takes in place of the base's.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper

from build_engine.draft_checkpoint import ATTENTION_NORM, EMBEDDING, HEAD, INPUT_NORMS, PRUNED_HEAD
from build_engine.graph import (
    STEP_INPUTS,
    Builder,
    GraphTypes,
    edge_node,
    embed,
    graph_inputs,
    graph_outputs,
    make_model,
    rope_nodes,
)
from edge.config import DraftConfig, ModelConfig
from edge.kv_cache import compressed_type

FLOAT = TensorProto.FLOAT


def build_draft_graph(config: ModelConfig, draft: DraftConfig, types: GraphTypes) -> onnx.ModelProto:
    """The draft of a base with `config`; `types` are the base's.

    Inputs as in `graph_inputs`, and hidden [T, H] float32; logits_rows are the rows whose logits [R, V'] and hidden_out
    [R, H], float32 both, are wanted. kv_pool.0 has the base's type, or 16 bits beside int8.
    """
    b, layer, types = Builder(), draft.layer_config(config), draft_types(types)
    joined = _join_inputs(b, config, draft, types)
    normed = joined
    if draft.has_attention_norm:
        normed = _norm(b, draft, types, config.hidden_size, joined, ATTENTION_NORM)
    names = [f"layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    attended = _attention(b, layer, draft.window, b.linear("layers.0.qkv", normed, names), *rope_nodes(b, config))
    attended = b.op("Gather", "head.attention_rows", attended, "logits_rows", axis=0)
    joined = b.op("Gather", "head.joined_rows", joined, "logits_rows", axis=0)
    out = b.linear("layers.0.o", attended, ["layers.0.self_attn.o_proj.weight"])
    norm = b.weight("layers.0.post_attention_layernorm.weight", [config.hidden_size], types.activation)
    residual, normed = b.edge(
        "AddRMSNorm",
        "layers.0.post_norm",
        joined,
        out,
        norm,
        outputs=2,
        scale=draft.residual_scale,
        epsilon=draft.rms_norm_eps,
    )
    gate_up = b.linear("layers.0.gate_up", normed, [f"layers.0.mlp.{p}_proj.weight" for p in ("gate", "up")])
    gated = b.edge("SwiGLU", "layers.0.swiglu", gate_up)
    down = b.linear("layers.0.down", gated, ["layers.0.mlp.down_proj.weight"])
    _outputs(b, config, draft, types, residual, down)
    return make_model(b, "eagle", *_values(layer, types))


def draft_types(types: GraphTypes) -> GraphTypes:
    """The draft's, of its base's: the keys and values of one layer are not worth int8's operators."""
    kv = helper.np_dtype_to_tensor_dtype(np.dtype(compressed_type(types.names)))
    return replace(types, kv=kv)


def _values(layer: ModelConfig, types: GraphTypes) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Inputs and outputs; LongRoPE's two lists alone depend on a sequence's length here."""
    hidden = helper.make_tensor_value_info("hidden", FLOAT, ["T", layer.hidden_size])
    inputs, outputs = graph_inputs(layer, types), graph_outputs(layer, types)
    inputs.insert(1, hidden)
    outputs.insert(1, helper.make_tensor_value_info("hidden_out", FLOAT, ["R", layer.hidden_size]))
    return inputs, outputs


def _join_inputs(b: Builder, config: ModelConfig, draft: DraftConfig, types: GraphTypes) -> str:
    """z = fc [x_e, x_h], the norms of the token's embedding and of the base's output, [T, H]."""
    parts = [embed(b, config, types), b.op("Cast", "hidden.cast", "hidden", to=types.activation)]
    if draft.has_input_norms:
        parts = [_norm(b, draft, types, config.hidden_size, *pair) for pair in zip(parts, INPUT_NORMS, strict=True)]
    return b.linear("fc", b.op("Concat", "fc.input", *parts, axis=1), ["fc.weight"])


def _norm(b: Builder, draft: DraftConfig, types: GraphTypes, hidden: int, x: str, weight: str) -> str:
    name = weight.removesuffix(".weight")
    scale = b.weight(weight, [hidden], types.activation)
    return str(b.edge("RMSNorm", name, x, scale, epsilon=draft.rms_norm_eps))


def _attention(b: Builder, layer: ModelConfig, window: int, qkv: str, cos: str, sin: str) -> str:
    name = "layers.0.attention"
    node = edge_node(
        "PagedAttention",
        name,
        [qkv, cos, sin, "kv_pool.0", *STEP_INPUTS],
        [name, "kv_pool_out.0"],
        num_heads=layer.num_attention_heads,
        num_kv_heads=layer.num_key_value_heads,
        head_dim=layer.head_dim,
        scale=layer.head_dim**-0.5,
        window=window,
    )
    b.nodes.append(node)
    return name


def _outputs(b: Builder, config: ModelConfig, draft: DraftConfig, types: GraphTypes, residual: str, down: str) -> None:
    """hidden_out = y = residual + r down, and logits = W_head (logit_scale y)."""
    wide = [x if types.activation == FLOAT else b.op("Cast", f"{x}.wide", x, to=FLOAT) for x in (residual, down)]
    branch = b.op(
        "Mul", "layers.0.branch", wide[1], b.constant("residual_scale", np.array(draft.residual_scale, np.float32))
    )
    y = b.op("Add", "hidden_out", wide[0], branch)
    if draft.logit_scale != 1:
        y = b.op("Mul", "head.scaled", y, b.constant("head.scale", np.array(draft.logit_scale, np.float32)))
    if types.activation != FLOAT:
        y = b.op("Cast", "head.input", y, to=types.activation)
    base = EMBEDDING if config.tie_word_embeddings else HEAD
    # Pruned rows are no tensor of the base's, which would be there under the same name.
    name, weight = ("logits", base) if draft.vocab_size is None else ("draft.head", PRUNED_HEAD)
    b.linear("logits", y, [weight], role="head")
    b.nodes[-1].name = name
