"""The ledger of a run on the CPU: a line for everything that takes memory, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from edge.config import ModelConfig
from edge.kv_cache import COMPRESSED_POOLS, pool_layout
from edge.memory.attention import attention_bytes
from edge.memory.run import Run
from edge.memory.step import draft_step_bytes, step_bytes
from edge.memory.weights import (
    Matrix,
    StoredWeights,
    cpu_matrix_bytes,
    cpu_weight_bytes,
    draft_matrices,
    matrices,
)
from edge.speculation.eagle import CHUNK as DRAFT_TOKENS
from plugins import PAGE_TOKENS

# The interpreter with numpy, ONNX Runtime and a tokenizer, and its session's own structures; stated, not allocated.
PROCESS_BYTES = 160 << 20
# Each region's, for what the formulas miss: alignment of small tensors, constants; and in percent of activations.
HEADROOM_PERCENT, HEADROOM_BYTES = 5, 1 << 20
MEMORY, DISK, HOST = "memory", "disk", "host"


@dataclass(frozen=True)
class Line:
    """Bytes by purpose. where: 'memory' (counts towards the budget), 'disk', or 'host' (a GPU's host)."""

    name: str
    bytes: int
    note: str = ""
    where: str = MEMORY

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is not in the memory that the budget is for."""
        return self.where != MEMORY


@dataclass(frozen=True)
class DraftSubject:
    """A draft model as one of a single layer, how its weights are stored, and its types.

    reach: tokens that its window sees, whose hidden states may wait for it. rows: results that a step of it may give.
    """

    layer: ModelConfig
    weights: StoredWeights
    types: Mapping[str, str]
    reach: int
    rows: int


@dataclass(frozen=True)
class Subject:
    """What runs: the model, how its weights are stored, and the types of activations and cache ('activation', 'kv').

    draft: the draft model that runs beside it. gives_hidden: whether the model gives the hidden states of all rows.
    """

    config: ModelConfig
    weights: StoredWeights
    types: Mapping[str, str]
    draft: DraftSubject | None = None
    gives_hidden: bool = False

    @property
    def kv(self) -> str:
        """Type of the cache."""
        return self.types["kv"]


def total(lines: Iterable[Line]) -> int:
    """Bytes of the memory that the budget is for."""
    return sum(line.bytes for line in lines if not line.is_elsewhere)


def page_bytes(config: ModelConfig, types: Mapping[str, str]) -> tuple[int, int]:
    """Bytes of one page over all layers: 64 tokens of keys and values, and their compressed keys."""
    sizes = {name: page.nbytes for name, page in pool_layout(config, types).items()}
    keys = sum(size for name, size in sizes.items() if name in COMPRESSED_POOLS)
    return config.num_hidden_layers * (sum(sizes.values()) - keys), config.num_hidden_layers * keys


def scale_bytes(config: ModelConfig, types: Mapping[str, str]) -> int:
    """Bytes of an int8 cache's scales on one page over all layers; 0 of other caches."""
    scales = pool_layout(config, types).get("kv_scales")
    return 0 if scales is None else config.num_hidden_layers * scales.nbytes


def cache_lines(subject: Subject, run: Run, elsewhere: str = DISK) -> list[Line]:
    """KV pages, those offloaded, and compressed keys, which never are; nor are an int8 cache's scales to a disk."""
    values, keys = page_bytes(subject.config, subject.types)
    resident = run.pages if run.resident is None else min(run.resident, run.pages)
    lines = [Line("kv cache", resident * values, f"{resident} pages of {PAGE_TOKENS} tokens, {subject.kv}")]
    if keys:
        lines.append(Line("compressed keys", run.pages * keys, "for the choice of blocks"))
    if run.resident is not None:
        if elsewhere == DISK and (scales := scale_bytes(subject.config, subject.types)):
            lines.append(Line("scales", (run.pages - resident) * scales, "of the pages on disk"))
            values -= scales
        lines.append(Line("offloaded kv", run.pages * values, f"{run.pages} pages", elsewhere))
    if (draft := subject.draft) is not None:
        values, _ = page_bytes(draft.layer, draft.types)
        lines.append(Line("draft kv", run.pages * values, f"{run.pages} pages of its layer, {draft.types['kv']}"))
    return lines


def _draft_lines(draft: DraftSubject) -> list[Line]:
    """What a draft takes beside its cache."""
    layer = draft.layer
    step = draft_step_bytes(layer, draft.weights, DRAFT_TOKENS, draft.rows)
    results = 2 * 4 * draft.rows * (layer.vocab_size + layer.hidden_size)
    return [
        Line("draft activations", step, f"steps of {DRAFT_TOKENS} tokens"),
        Line("draft logits", results, f"{draft.rows} rows with their hidden states, and a copy"),
        Line("draft headroom", sum(regions(step)) - step, "for what the formulas miss"),
    ]


def _own_matrices(subject: Subject, draft: DraftSubject) -> list[Matrix]:
    """Those of a draft's matrices that lie in the file beside the model's: a whole head stored alike is the model's."""
    *layer, head = draft_matrices(draft.layer, draft.weights)
    *_, of_model = matrices(subject.config, subject.weights)
    return layer if head == of_model else [*layer, head]


def _draft_attention_bytes(subject: Subject, draft: DraftSubject, run: Run) -> int:
    """Its session has threads of its own, which keep tiles; the calling thread has one for each type of cache."""
    run = replace(run, chunk=min(run.chunk, DRAFT_TOKENS), resident=None)
    threads = run.threads if draft.types["kv"] != subject.kv else run.threads - 1
    lists, all_of_it = (attention_bytes(draft.layer, draft.types["kv"], replace(run, threads=n)) for n in (0, threads))
    return all_of_it - lists


def cpu_ledger(subject: Subject, run: Run) -> tuple[Line, ...]:
    """Every line of a run on ONNX Runtime's CPU provider."""
    config = subject.config
    weights = cpu_weight_bytes(config, subject.weights)
    step = step_bytes(config, subject.weights, run.tokens, run.rows, gives_hidden=subject.gives_hidden)
    attention = attention_bytes(config, subject.kv, run)
    draft = subject.draft
    if draft is not None:
        weights += cpu_matrix_bytes(_own_matrices(subject, draft))
        attention += _draft_attention_bytes(subject, draft, run)
    lines = [
        Line("weights, mapped", weights, "read from the bundle's file"),
        *cache_lines(subject, run),
        Line("activations", step, f"steps of {run.tokens} tokens"),
        Line("attention", attention, f"{run.threads} threads"),
        Line("logits", 2 * 4 * run.rows * config.vocab_size, f"{run.rows} rows, and a copy"),
        Line("headroom", sum(regions(step)) - step, "for what the formulas miss"),
    ]
    if subject.gives_hidden:
        waiting = 0 if draft is None else min(draft.reach, run.context)
        size = 4 * config.hidden_size * (run.tokens + waiting)
        lines.append(Line("hidden states", size, f"{run.tokens} rows of a step, {waiting} that wait"))
    if draft is not None:
        lines += _draft_lines(draft)
    return (*lines, Line("process", PROCESS_BYTES, "interpreter and libraries"))


def regions(step: int) -> tuple[int, int]:
    """Bytes that a session may take for constants, and for the tensors of a step, which are planned to be `step`."""
    return HEADROOM_BYTES, step + step * HEADROOM_PERCENT // 100 + HEADROOM_BYTES
