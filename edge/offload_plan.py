"""How many KV pages of a sparse model are on the device while the others are in host memory. Numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge.bundle import Bundle
from edge.config import ModelConfig, SparseConfig
from edge.errors import EdgeError, UsageError
from edge.kv_cache import COMPRESSED_POOLS, KV_BYTES, pages_for, pool_shapes
from edge.plan import MIB, EngineOptions, Plan, fit_plan, kv_page_bytes
from plugins import PAGE_TOKENS


def forced_pages(sparse: SparseConfig) -> int:
    """Pages that a token attends to whatever their scores: initial and local ones, and its own."""
    return sparse.init_blocks + sparse.local_blocks + 1


def token_pages(config: ModelConfig, sparse: SparseConfig, context: int) -> int:
    """Pages that one token may need at once: KV heads choose apart; below dense_len it attends to all there are."""
    chosen = config.num_key_value_heads * (sparse.selected_blocks - forced_pages(sparse))
    dense = pages_for(min(max(sparse.dense_len - 1, 0), context))
    return max(forced_pages(sparse) + chosen, dense, 2)  # 2: a token's own page, and one whose keys are averaged


def least_slots(config: ModelConfig, sparse: SparseConfig, context: int) -> int:
    """Pages that must be on the device: any token's, beside the initial and local ones of a sequence, which stay."""
    return token_pages(config, sparse, context) + forced_pages(sparse)


def fit_offload(
    bundle: Bundle, options: EngineOptions, *, weights: int, activations: int, free: int, host_free: int, limit: int
) -> Plan:
    """`fit_plan`, whose pages beyond the budget have room in 90 % of the `host_free` bytes of the host's memory.

    Once some do not fit on the device, all pages get a place on the host; if all fit, none does. EdgeError has numbers.
    """
    config, sparse = bundle.config, bundle.config.sparse
    if sparse is None:
        raise UsageError(
            f"{bundle.path} has dense attention, which reads every page for every token; leave out --offload, or "
            "export a checkpoint with sparse attention"
        )
    context = options.context or limit
    fixed, wanted, least = weights + activations, pages_for(context), least_slots(config, sparse, context)
    sizes = _PageSizes.of(bundle)
    room = (options.memory if options.memory is not None else int(free * 0.9)) - fixed
    if wanted <= least or wanted * (sizes.values + sizes.compressed) <= room:
        return fit_plan(bundle, options, weights=weights, activations=activations, process=0, free=free, limit=limit)
    on_device, on_host = (room - least * sizes.values) // sizes.compressed, int(host_free * 0.9) // sizes.values
    pages = min(wanted, on_device, on_host)
    if pages < (wanted if options.context is not None else least):
        needed = fixed + least * sizes.values + wanted * sizes.compressed
        problem = (
            f"{_mib(needed)} on the device, though its pages are offloaded: its model, all compressed keys, and the "
            f"{least} pages that a token may need at once; the budget is {_mib(room + fixed)}; give --memory "
            f"{_mib(needed)}"
        )
        if on_host < on_device:
            there = _mib(on_host * sizes.values)
            problem = f"{_mib(wanted * sizes.values)} of host memory, and pages of {there} have room; close programs"
        fitting = max(pages, room // (sizes.values + sizes.compressed))
        other = f", or ask for --context {fitting * PAGE_TOKENS}" if fitting > 0 else ""
        raise EdgeError(f"a context of {context} tokens needs {problem}{other}")
    slots = min(pages, (room - pages * sizes.compressed) // sizes.values)
    return Plan(
        max_context=min(context, pages * PAGE_TOKENS),
        num_pages=pages,
        weights=weights,
        kv=slots * sizes.values + pages * sizes.compressed,
        activations=activations,
        process=0,
        sparse=sparse,
        resident_pages=slots,
        host=pages * sizes.values,
    )


@dataclass(frozen=True)
class _PageSizes:
    """Bytes of one page in all layers: keys and values, which may be offloaded, and compressed keys."""

    values: int
    compressed: int

    @staticmethod
    def of(bundle: Bundle) -> _PageSizes:
        shapes = pool_shapes(bundle.config)
        numbers = sum(math.prod(shape) for name, shape in shapes.items() if name in COMPRESSED_POOLS)
        compressed = bundle.config.num_hidden_layers * numbers * KV_BYTES[bundle.manifest.types["kv"]]
        return _PageSizes(kv_page_bytes(bundle) - compressed, compressed)


def _mib(size: int) -> str:
    return f"{-(-size // MIB)}MiB"
