"""A draft model's part of a bundle: its graph, its weights in the bundle's file, what the manifest says of it."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from build_engine.checkpoint import Checkpoint
from build_engine.draft_checkpoint import EMBEDDING, HEAD, DraftCheckpoint, open_draft, with_base
from build_engine.draft_graph import build_draft_graph, draft_types
from build_engine.formats import TENSORRT_TARGETS, Target, WeightFormat, choose_format, plugin_kernels
from build_engine.lowering import Progress, describe_weights, lower
from build_engine.weights_file import WeightsFile
from edge.bundle import DraftSection
from edge.config import ModelConfig
from edge.errors import UsageError
from plugins import PAGE_TOKENS
from plugins.launch import Kernel

TREE = {"depth": 2, "top_k": 10, "size": 12}  # spec: quantization_and_speculation.md 4.7
WINDOW = 1024  # tokens, from there too


@dataclass(frozen=True)
class DraftExport:
    """What `edge export --draft` decides. ids [V'] int32: the tokens of a pruned head; None: the head is the base's."""

    checkpoint: DraftCheckpoint
    weights: WeightFormat
    ids: np.ndarray | None


def choose_draft(
    folder: Path,
    base: Checkpoint,
    base_weights: WeightFormat,
    target: str,
    ids: np.ndarray | None,
    *,
    kind: str | None = None,
    head: str | None = None,
    window: int = WINDOW,
    logit_scale: float | None = None,
) -> DraftExport:
    """Open a draft of `base` and fill in what the user left open (None).

    Weights are int4 if the base's are codes or the draft has stored codes, else the base's kind; the head's format is
    the base's. window: tokens, 0 for all. logit_scale: of its hidden state before the head; None: muP's, the base's.
    """
    if window % PAGE_TOKENS or window < 0:
        raise UsageError(f"--draft-window {window} must be a multiple of {PAGE_TOKENS} tokens, or 0 for all")
    if logit_scale is not None and not 0 < logit_scale < float("inf"):
        raise UsageError(f"--draft-logit-scale {logit_scale:g} must be a positive number")
    draft = open_draft(folder, base)
    config = replace(
        draft.config,
        vocab_size=None if ids is None else len(ids),
        window=window // PAGE_TOKENS,
        logit_scale=draft.config.logit_scale if logit_scale is None else logit_scale,
    )
    draft = replace(draft, config=config)
    if kind is None:
        has_codes = any(tensor.codes is not None for tensor in draft.tensors.values())
        kind = "w4a16" if base_weights.is_low_bit or has_codes else base_weights.kind
    if kind not in ("exact", "fp16", "w4a16"):
        raise UsageError(f"a draft's weights cannot be {kind}; choose --draft-weights exact, fp16 or w4a16")
    if kind != "w4a16" and head not in (None, "exact"):
        raise UsageError(
            f"--draft-weights {kind} stores the head as it does all weights; leave out --draft-head {head}"
        )
    if kind == "w4a16" and base_weights.is_low_bit:
        head = head or base_weights.head
    linear = base_weights.linear if target in TENSORRT_TARGETS and kind == "w4a16" else None
    joined = with_base(draft, base, ids)
    weights = choose_format(joined, target, kind, symmetric=True, head=head, linear=linear)
    return DraftExport(draft, replace(weights, embedding=base_weights.embedding), ids)


def lower_draft(
    draft: DraftExport,
    base: Checkpoint,
    base_weights: WeightFormat,
    base_model: onnx.ModelProto,
    target: Target,
    file: WeightsFile,
    progress: Progress,
) -> onnx.ModelProto:
    """The draft's graph; `file` has the base's weights already, and those that both use stay there once."""
    graph = build_draft_graph(base.config, draft.checkpoint.config, target.types)
    joined = with_base(draft.checkpoint, base, draft.ids)
    shared = [tensor for tensor in base_model.graph.initializer if _is_shared(tensor.name, draft, base_weights)]
    model = lower(graph, joined, target, draft.weights, file, progress, shared)
    # Guesses are several tokens a row: the largest one alone is of no use.
    outputs = [value for value in model.graph.output if value.name != "token"]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return model


def _is_shared(name: str, draft: DraftExport, base: WeightFormat) -> bool:
    """The embedding always, the head if it is stored alike by one of the executor's own operators.

    A pruned head has another name in the draft's graph.
    """
    if name.startswith(EMBEDDING):
        return True
    is_alike = base.linear == "native" and _stored_head(draft.weights) == _stored_head(base)
    return is_alike and (name == HEAD or name.startswith("logits."))


def _stored_head(weights: WeightFormat) -> tuple[str, int]:
    """Its format, and of codes the weights that share a scale."""
    if not weights.is_low_bit:
        return weights.kind, 0
    return weights.head, 0 if weights.head == "exact" else weights.head_group_size


def draft_section(
    draft: DraftExport, base: Checkpoint, target: Target, embedding: str, model: onnx.ModelProto
) -> DraftSection:
    """What the manifest says."""
    joined = with_base(draft.checkpoint, base, draft.ids)
    description = describe_weights(draft.weights, joined, model)
    if draft.ids is not None:
        description += f", {len(draft.ids)} tokens"
    return DraftSection(
        name=draft.checkpoint.path.resolve().name,
        model=draft.checkpoint.config,
        weights={
            **asdict(draft.weights),
            "head_group_size": draft.weights.head_group_size,
            "description": description,
        },
        types={**draft_types(target.types).names, "embedding": embedding},
        tree=TREE,
    )


def vocab_file(ids: np.ndarray) -> bytes:
    """The ids as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.int32))
    return buffer.getvalue()


def draft_kernels(draft: DraftExport, base: ModelConfig, target: Target) -> list[Kernel]:
    """All that TensorRT's plugins may launch for the draft; EdgeError names a size without kernels."""
    layer, kv = draft.checkpoint.config.layer_config(base), draft_types(target.types).names["kv"]
    joining = replace(layer, intermediate_size=2 * base.hidden_size)  # fc has as many inputs
    return [kernel for config in (layer, joining) for kernel in plugin_kernels(config, draft.weights, kv)]
