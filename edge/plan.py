"""How much memory a run may take, decided before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from edge.bundle import WEIGHTS, Bundle
from edge.errors import EdgeError
from edge.kv_cache import pages_for
from edge.machine import available_memory, usable_cores
from plugins import PAGE_TOKENS

MIB = 1 << 20
# The interpreter with numpy and ONNX Runtime loaded, before any model.
PROCESS_BYTES = 160 << 20


@dataclass(frozen=True)
class EngineOptions:
    """What a user may decide about a run. context in tokens, memory in bytes; None lets the plan choose."""

    context: int | None = None
    memory: int | None = None
    threads: int = field(default_factory=usable_cores)
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
    budget = options.memory if options.memory is not None else int(available_memory() * 0.9)
    limit = bundle.manifest.limits["max_context"]
    weights, activations = _weights_bytes(bundle), _activation_bytes(bundle, options.chunk)
    fixed = weights + activations + PROCESS_BYTES
    page = kv_page_bytes(bundle)
    wanted = pages_for(options.context or limit)
    fitting = max(0, budget - fixed) // page
    if fitting < (1 if options.context is None else wanted):
        raise EdgeError(_refusal(bundle, options, budget, fixed, fitting))
    num_pages = min(wanted, fitting)
    max_context = min(options.context or limit, num_pages * PAGE_TOKENS)
    return Plan(max_context, num_pages, weights, num_pages * page, activations)


def _refusal(bundle: Bundle, options: EngineOptions, budget: int, fixed: int, fitting: int) -> str:
    """What does not fit, and what would: a --memory or --context that the sentence names is enough."""
    context = options.context or PAGE_TOKENS
    needed = f"{-(-(fixed + pages_for(context) * kv_page_bytes(bundle)) // MIB)}MiB"
    if options.memory is None:
        problem, remedy = f"90 % of the free memory is {budget // MIB}MiB", "free some"
    else:
        problem, remedy = f"--memory allows {budget // MIB}MiB", f"give --memory {needed}"
    if fitting:
        other = f"ask for --context {fitting * PAGE_TOKENS}"
    elif bundle.manifest.weights["kind"] == "exact":
        other = "export with --weights w4a16"
    else:
        other = "use a smaller --chunk or model"
    return f"a context of {context} tokens needs {needed} with its model, and {problem}; {remedy}, or {other}"
