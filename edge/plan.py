"""How much memory a run may take, decided before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import psutil

from edge.bundle import WEIGHTS, Bundle
from edge.errors import EdgeError
from edge.kv_cache import pages_for
from plugins import PAGE_TOKENS

GIB = 1 << 30
# The interpreter with numpy and ONNX Runtime loaded, before any model.
PROCESS_BYTES = 160 << 20


@dataclass(frozen=True)
class EngineOptions:
    """What a user may decide about a run. context in tokens, memory in bytes; None lets the plan choose."""

    context: int | None = None
    memory: int | None = None
    threads: int = len(os.sched_getaffinity(0))
    chunk: int = 512  # prompt tokens a step


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, and the context they buy."""

    max_context: int
    num_pages: int
    weights: int
    kv: int
    activations: int
    process: int = PROCESS_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.activations + self.process


def kv_page_bytes(bundle: Bundle) -> int:
    """Bytes of one page over all layers: 64 tokens of keys and values."""
    c = bundle.config
    itemsize = np.dtype(bundle.manifest.types["kv"]).itemsize
    return c.num_hidden_layers * 2 * c.num_key_value_heads * PAGE_TOKENS * c.head_dim * itemsize


def _weights_bytes(bundle: Bundle) -> int:
    """The mapped file plus the copy ONNX Runtime packs for its kernels (float32 if the weights are exact)."""
    stored = bundle.manifest.files[WEIGHTS].bytes
    return 3 * stored if bundle.manifest.weights["kind"] == "exact" else 2 * stored


def _activation_bytes(bundle: Bundle, chunk: int) -> int:
    """Float32 values alive at once in one layer of a step, plus one row of logits."""
    c = bundle.config
    qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    per_token = 4 * c.hidden_size + qkv + c.num_attention_heads * c.head_dim + 3 * c.intermediate_size
    return 4 * (chunk * per_token + c.vocab_size)


def make_plan(bundle: Bundle, options: EngineOptions) -> Plan:
    """Fit the context into the budget: --memory, or else 90 % of the memory the system can give now.

    A context that was asked for and does not fit is refused, though it may exceed what the model was trained for;
    one that was not asked for is the model's limit, or as much of it as fits.
    """
    available = psutil.virtual_memory().available
    budget = options.memory if options.memory is not None else int(available * 0.9)
    limit = bundle.manifest.limits["max_context"]
    weights, activations = _weights_bytes(bundle), _activation_bytes(bundle, options.chunk)
    fixed = weights + activations + PROCESS_BYTES
    page = kv_page_bytes(bundle)
    fitting = (budget - fixed) // page
    if fitting < 1:
        raise EdgeError(
            f"the model needs {fixed / GIB:.2f} GiB before its first KV page and the memory budget is "
            f"{budget / GIB:.2f} GiB; raise --memory, or export with --weights w4a16"
        )
    wanted = pages_for(options.context or limit)
    if options.context is not None and wanted > fitting:
        raise EdgeError(
            f"a context of {options.context} tokens needs {(fixed + wanted * page) / GIB:.2f} GiB and the memory "
            f"budget is {budget / GIB:.2f} GiB; ask for --context {fitting * PAGE_TOKENS} or raise --memory"
        )
    num_pages = int(min(wanted, fitting))
    max_context = min(options.context or limit, num_pages * PAGE_TOKENS)
    return Plan(max_context, num_pages, weights, num_pages * page, activations)
