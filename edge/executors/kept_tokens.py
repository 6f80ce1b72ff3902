"""Accepted tokens of a tree close up on the device: launches outside the engine, the same for every layer."""

from __future__ import annotations

from functools import lru_cache

from edge.bundle import Bundle
from plugins.infllmv2 import STRIDE
from plugins.infllmv2.launch import compress
from plugins.paged_attention.launch import AttentionShape, keep
from plugins.plugin import ELEMENTS, PackedLaunch, pack_launch

# Both kernels find the tokens' new places in the buffer of a step's positions, the old ones in that of its slots.
_MOVE = {"kept": "positions"}
_AVERAGE = {"slots": "positions"}
_OFFLOADED = {"page_table": "slot_table"}


def kept_shape(bundle: Bundle, tokens: int, table_width: int) -> AttentionShape:
    """So many tokens of one sequence."""
    config, types = bundle.config, bundle.manifest.types
    element, sparse = ELEMENTS[types["activation"]], config.sparse
    return AttentionShape(
        tokens,
        1,
        table_width,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        element,
        "uint8_t" if types["kv"] == "int8" else ELEMENTS[types["kv"]],
        limit=0 if sparse is None else sparse.selected_blocks,
        use_nope=sparse is not None and sparse.use_nope,
    )


@lru_cache(maxsize=256)
def keep_launches(shape: AttentionShape, moves: bool, averages: bool, offloaded: bool) -> tuple[PackedLaunch, ...]:
    """One layer's: the tokens move, then the windows that end with them are averaged."""
    launches = []
    if moves:
        launches.append(keep(shape).bind(_MOVE | (_OFFLOADED if offloaded else {})))
    if averages:
        launches.append(compress(shape, "slot_table" if offloaded else "page_table").bind(_AVERAGE))
    return tuple(map(pack_launch, launches))


def ends_window(first: int, tokens: int) -> bool:
    """Is one of `tokens` tokens from slot `first` on the last of a window?"""
    return (first + tokens) // STRIDE > first // STRIDE
