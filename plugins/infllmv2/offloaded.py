"""edge.InfLLMv2Attention where only some pages of kv_pool are on the device: the launches, run by run of tokens.

All compressed keys are on the device, so that one launch each scores and chooses for the whole step. Appending and
attending go by runs (plugins/plugin.py: PageOffload), with the addresses of each run's first token.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from plugins.infllmv2.launch import compress, score_coarse, score_fine, select
from plugins.paged_attention.launch import AttentionShape, append, attend
from plugins.plugin import Call, PackedLaunch, PageOffload, pack_launch

_RUN = {"query_start": "run_start"}
_SLOTS = {**_RUN, "page_table": "slot_table"}
_RUN_LENGTHS = 1024  # launches are packed once for each length of a run, as far as these suffice


def run_offloaded(shape: AttentionShape, scale: float, call: Call, offload: PageOffload) -> None:
    """Queue a step; as often as `offload` reads what was chosen, it waits for the stream."""
    tables = {"slot_table": offload.slot_table, "run_start": offload.run_start}
    pool, blocks, counts = (call.addresses[name] for name in ("kv_pool", "blocks", "block_counts"))
    for run in offload.writing(pool, call.stream):
        call.queue(_write(replace(shape, tokens=len(run))), {**tables, **_from_token(call, shape, run.start)})
    call.queue(_choose(shape, scale), {})
    for run in offload.reading(pool, blocks, counts, shape.columns, call.stream):
        launches = _read(replace(shape, tokens=len(run)), scale, call.launcher.multiprocessors)
        call.queue(launches, {**tables, **_from_token(call, shape, run.start)})


@lru_cache(_RUN_LENGTHS)
def _write(shape: AttentionShape) -> tuple[PackedLaunch, ...]:
    # Windows stay on their logical pages; what they average lies in slots.
    return pack_launch(append(shape).bind(_SLOTS)), pack_launch(compress(shape, "slot_table").bind(_RUN))


@lru_cache(_RUN_LENGTHS)
def _choose(shape: AttentionShape, scale: float) -> tuple[PackedLaunch, ...]:
    return tuple(map(pack_launch, (score_coarse(shape, scale), score_fine(shape, scale), select(shape))))


@lru_cache(_RUN_LENGTHS)
def _read(shape: AttentionShape, scale: float, multiprocessors: int) -> tuple[PackedLaunch, ...]:
    return tuple(pack_launch(launch.bind(_SLOTS)) for launch in attend(shape, scale, multiprocessors))


def _from_token(call: Call, shape: AttentionShape, first: int) -> dict[str, int]:
    """Addresses, from token `first` on, of all that has a row for each token."""
    value, real, integer = 2, 4, 4  # bytes
    row = {
        "qkv": (shape.heads + 2 * shape.kv_heads) * shape.head_dim * value,
        "cos": shape.head_dim // 2 * real,
        "sin": shape.head_dim // 2 * real,
        "positions": integer,
        "slots": integer,
        "tree_mask": 8,
        "q": shape.heads * shape.head_dim * value,
        "blocks": shape.kv_heads * shape.columns * integer,
        "block_counts": shape.kv_heads * integer,
        "output": shape.heads * shape.head_dim * value,
    }
    return {name: call.addresses[name] + first * size for name, size in row.items()}
