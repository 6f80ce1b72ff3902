"""The ledger of a run on a GPU whose engine has not been built: an estimate from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edge.kv_cache import pages_for
from edge.memory.devices import Device
from edge.memory.ledger import HOST, Line, Subject, cache_lines
from edge.memory.run import Run
from edge.memory.weights import device_matrix_bytes, device_weight_bytes, draft_matrices
from plugins.infllmv2.launch import scratch as selection_scratch
from plugins.paged_attention.launch import AttentionShape, scratch_up_to
from plugins.plugin import MOST_MULTIPROCESSORS

_ELEMENT = 2  # bytes of a float16 activation
_STAGED = 64  # bytes a sequence that the host writes for each step, beside its page table


def device_ledger(subject: Subject, run: Run, device: Device) -> tuple[Line, ...]:
    """Every line of a run with TensorRT and our plugins; the engine's own figures replace it once there is one."""
    config = subject.config
    tables = 4 * run.sequences * pages_for(run.context)
    inputs = 2 * (tables + _STAGED * run.sequences) + 24 * run.tokens
    logits = 4 * run.sequences * config.vocab_size
    lines = [
        Line("weights", device_weight_bytes(config, subject.weights), "the engine's, estimated"),
        *cache_lines(subject, run, HOST),
        Line(
            "working memory",
            _activations(subject, run) + _scratch(subject, run),
            f"steps of {run.tokens} tokens, estimated",
        ),
        Line(
            "inputs and logits",
            inputs + logits * (2 if device.is_integrated else 1),
            f"{run.sequences} x {config.vocab_size} logits",
        ),
        Line("cuda context", device.context, "assumed"),
    ]
    if (draft := subject.draft) is not None:
        table = _ELEMENT * config.vocab_size * config.hidden_size
        size = table + device_matrix_bytes(draft_matrices(draft.layer, draft.weights))
        lines.insert(1, Line("draft weights", size, "its engine's, with an embedding of its own, estimated"))
    if device.is_integrated:
        lines.append(Line("process", device.process, "interpreter, TensorRT and CUDA libraries, assumed"))
    return tuple(lines)


def _activations(subject: Subject, run: Run) -> int:
    """Tensors of one layer that are alive at once: the residual, a norm's output, and the widest product's."""
    c = subject.config
    qkv = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    return _ELEMENT * run.tokens * (2 * c.hidden_size + max(qkv, 3 * c.intermediate_size))


def _scratch(subject: Subject, run: Run) -> int:
    """What attention's launches pass on to each other, planned for the largest GPU as the plugins do."""
    c = subject.config
    limit = 0 if c.sparse is None else c.sparse.selected_blocks
    shape = AttentionShape(
        run.tokens,
        run.sequences,
        pages_for(run.context),
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        limit=limit,
    )
    buffers: Mapping[str, tuple[tuple[int, ...], np.dtype]] = scratch_up_to(shape, MOST_MULTIPROCESSORS)
    if limit:
        buffers = {**buffers, **selection_scratch(shape)}
    return sum(math.prod(size) * dtype.itemsize for size, dtype in buffers.values())
