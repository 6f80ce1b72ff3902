"""How much memory a run may take, decided before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge.bundle import WEIGHTS, Bundle
from edge.config import SparseConfig
from edge.errors import EdgeError, UsageError
from edge.kv_cache import KV_BYTES, pages_for, pool_shapes
from edge.machine import available_memory, usable_cores
from plugins import PAGE_TOKENS
from plugins.offload.store import MINIMUM_SLOTS

MIB = 1 << 20
# The interpreter with numpy and ONNX Runtime loaded, before any model.
PROCESS_BYTES = 160 << 20
TILE_ROWS = 512  # query rows of one attention task (plugins/paged_attention/cpu.h)
ALWAYS_DENSE = 2**31 - 1  # a dense_len that no sequence reaches


@dataclass(frozen=True)
class EngineOptions:
    """What a user may decide about a run. context in tokens, memory in bytes; None lets the plan choose.

    attention: 'model' (as the bundle says), 'dense' or 'sparse'. sparse: fields of SparseConfig to change. offload: a
    folder for the KV pages that do not fit into memory.
    """

    context: int | None = None
    memory: int | None = None
    threads: int = field(default_factory=usable_cores)
    chunk: int = 512  # prompt tokens a step
    attention: str = "model"
    sparse: Mapping[str, int] = field(default_factory=dict)
    offload: Path | None = None


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, the context they buy, and the sparse attention in force (None: the model has none).

    resident_pages: how many pages' keys and values are in memory at a time; fewer than num_pages only with an offload.
    """

    max_context: int
    num_pages: int
    weights: int
    kv: int
    activations: int
    process: int = PROCESS_BYTES
    sparse: SparseConfig | None = None
    resident_pages: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.activations + self.process


def kv_page_bytes(bundle: Bundle) -> int:
    """Bytes of one page over all layers: 64 tokens of keys and values, and their compressed keys."""
    values = sum(math.prod(shape) for shape in pool_shapes(bundle.config).values())
    return bundle.config.num_hidden_layers * values * KV_BYTES[bundle.manifest.types["kv"]]


def _weights_bytes(bundle: Bundle) -> int:
    """The mapped file plus the copy ONNX Runtime packs for its kernels (float32 of 16-bit projections or heads)."""
    stored, weights = bundle.manifest.files[WEIGHTS].bytes, bundle.manifest.weights
    is_wide = weights["kind"] in ("exact", "fp16") or weights.get("head") == "exact"
    return 3 * stored if is_wide else 2 * stored


def _activation_bytes(bundle: Bundle, options: EngineOptions, context: int) -> int:
    """Float32 values alive at once in one layer of a step, one row of logits, and what attention works in."""
    c = bundle.config
    qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    per_token = 4 * c.hidden_size + qkv + c.num_attention_heads * c.head_dim + 3 * c.intermediate_size
    tile = TILE_ROWS * 2 * (c.head_dim + PAGE_TOKENS) + 2 * PAGE_TOKENS * c.head_dim
    choice = 0
    if options.offload is not None:  # queries and sums of all the step's tokens (plugins/paged_attention/stored.h)
        choice += options.chunk * c.num_attention_heads * (2 * c.head_dim + 2)
    if c.sparse is not None:  # a score for each token and block of a tile, a bit for each of the step
        tile += max(1, TILE_ROWS // c.group_size) * pages_for(context)
        choice += options.chunk * c.num_key_value_heads * pages_for(context) // 32
    return 4 * (options.chunk * per_token + c.vocab_size + options.threads * tile + choice)


def make_plan(bundle: Bundle, options: EngineOptions) -> Plan:
    """The plan of a run on the CPU; `fit_plan` has the rules."""
    limit = bundle.manifest.limits["max_context"]
    fit = fit_plan if options.offload is None else fit_offloaded
    return fit(
        bundle,
        options,
        weights=_weights_bytes(bundle),
        activations=_activation_bytes(bundle, options, options.context or limit),
        process=PROCESS_BYTES,
        free=available_memory(),
        limit=limit,
    )


def fit_plan(
    bundle: Bundle, options: EngineOptions, *, weights: int, activations: int, process: int, free: int, limit: int
) -> Plan:
    """Fit the context into the budget: --memory, or else 90 % of the memory that is `free` before the model is loaded.

    A context that was asked for and does not fit is refused, though it may exceed what the model was trained for;
    one that was not asked for is `limit` tokens, or as many of them as fit.
    """
    budget = options.memory if options.memory is not None else int(free * 0.9)
    fixed = weights + activations + process
    page = kv_page_bytes(bundle)
    wanted = pages_for(options.context or limit)
    fitting = max(0, budget - fixed) // page
    if fitting < (1 if options.context is None else wanted):
        raise EdgeError(_refusal(bundle, options, budget, fixed, fitting))
    num_pages = min(wanted, fitting)
    max_context = min(options.context or limit, num_pages * PAGE_TOKENS)
    sparse = resolve_sparse(bundle, options)
    return Plan(max_context, num_pages, weights, num_pages * page, activations, process, sparse, num_pages)


def fit_offloaded(
    bundle: Bundle, options: EngineOptions, *, weights: int, activations: int, process: int, free: int, limit: int
) -> Plan:
    """As `fit_plan`, with keys and values of as many pages in memory as fit beside all pages' compressed keys.

    At least those that every token attends to, and the few that others are streamed through. The context is what was
    asked for, or `limit`.
    """
    budget = options.memory if options.memory is not None else int(free * 0.9)
    context, sparse = options.context or limit, resolve_sparse(bundle, options)
    num_pages = pages_for(context)
    layer_values = math.prod(pool_shapes(bundle.config)["kv_pool"])
    page = bundle.config.num_hidden_layers * layer_values * KV_BYTES[bundle.manifest.types["kv"]]
    compressed = kv_page_bytes(bundle) - page
    fixed = weights + activations + process
    always = 0 if sparse is None else min(num_pages, sparse.init_blocks + sparse.local_blocks + 1)
    least = always + MINIMUM_SLOTS
    needed = fixed + num_pages * compressed + least * page
    if needed > budget:
        allowed = "--memory allows" if options.memory is not None else "90 % of the free memory is"
        raise EdgeError(
            f"an offloaded context of {context} tokens needs {-(-needed // MIB)}MiB with its model, and {allowed} "
            f"{budget // MIB}MiB; give --memory {-(-needed // MIB)}MiB, or ask for a smaller --context or --chunk"
        )
    resident = max(least, min(num_pages, (budget - fixed - num_pages * compressed) // page))
    kv = num_pages * compressed + resident * page
    return Plan(context, num_pages, weights, kv, activations, process, sparse, resident)


def resolve_sparse(bundle: Bundle, options: EngineOptions) -> SparseConfig | None:
    """The bundle's sparse attention as the user wants it; None if the bundle has none and none was asked for."""
    if options.attention not in ("model", "dense", "sparse"):
        raise UsageError(f"unknown attention {options.attention!r}; choose dense or sparse")
    sparse = bundle.config.sparse
    if sparse is None:
        if options.attention == "sparse" or options.sparse:
            raise UsageError(
                f"{bundle.path} was exported with dense attention only; export its checkpoint with --attention sparse"
            )
        return None
    sparse = sparse.change(options.sparse, fixed=("kernel_size", "kernel_stride", "block_size", "use_nope"))
    return replace(sparse, dense_len=ALWAYS_DENSE) if options.attention == "dense" else sparse


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
    elif bundle.manifest.weights["kind"] in ("exact", "fp16"):
        other = "export with --weights w4a16"
    else:
        other = "use a smaller --chunk or model"
    return f"a context of {context} tokens needs {needed} with its model, and {problem}; {remedy}, or {other}"
