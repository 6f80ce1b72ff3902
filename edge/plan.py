"""What a user decides about a run, and the plan of its memory (made by edge/memory/fit.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge.bundle import Bundle
from edge.config import SparseConfig
from edge.errors import UsageError
from edge.machine import usable_cores
from edge.memory.ledger import DraftSubject, Line, Subject, total
from edge.memory.run import Run
from edge.memory.weights import StoredWeights
from plugins import PAGE_TOKENS

MIB = 1 << 20
ALWAYS_DENSE = 2**31 - 1  # a dense_len that no sequence reaches


@dataclass(frozen=True)
class EngineOptions:
    """What a user may decide about a run. context in tokens, memory in bytes; None lets the plan choose.

    attention: 'model' (as the bundle says), 'dense' or 'sparse'. sparse: fields of SparseConfig to change.
    logits_rows: tokens of a step whose logits are wanted at once, at most. offload: where KV pages go that memory does
    not hold: a folder on a disk; on a GPU, whatever it says, the host's memory. prefix_cache: whether a prompt takes
    over what an earlier one computed; measurements of prompts must not. speculative: 'off', 'lookup' (guesses what
    followed the same words before) or 'eagle' (with the bundle's draft model); the tokens are the same with all three.
    sequences: at most so many are computed at once; they share the KV pages. An engine built for fewer has as many.
    """

    context: int | None = None
    memory: int | None = None
    threads: int = field(default_factory=usable_cores)
    chunk: int = 512  # prompt tokens a step
    attention: str = "model"
    sparse: Mapping[str, int] = field(default_factory=dict)
    logits_rows: int = 16
    offload: Path | None = None
    prefix_cache: bool = True
    speculative: str = "off"
    sequences: int = 1


@dataclass(frozen=True)
class Plan:
    """A run that fits its budget, line by line, and the sparse attention in force (None: the model has none)."""

    run: Run
    lines: tuple[Line, ...]
    budget: int
    sparse: SparseConfig | None = None

    @property
    def max_context(self) -> int:
        """Tokens one sequence may hold."""
        return self.run.context

    @property
    def num_pages(self) -> int:
        """KV pages in all, in memory and offloaded."""
        return self.run.pages

    @property
    def resident_pages(self) -> int | None:
        """KV pages in memory while the others are offloaded; None if none is."""
        return self.run.resident

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return total(self.lines)

    @property
    def kv(self) -> int:
        """Bytes of KV pages in memory and of compressed keys."""
        return self.bytes("kv cache") + self.bytes("compressed keys")

    def bytes(self, name: str) -> int:
        """Bytes of one line; 0 if there is none of this name."""
        return sum(line.bytes for line in self.lines if line.name == name)


def subject_of(bundle: Bundle, options: EngineOptions | None = None) -> Subject:
    """What a bundle runs; with options, its draft model only if they want it."""
    manifest = bundle.manifest
    weights = StoredWeights.from_manifest(manifest.weights, manifest.types)
    subject = Subject(bundle.config, weights, manifest.types, gives_hidden=manifest.draft is not None)
    section = manifest.draft
    if section is None or (options is not None and options.speculative != "eagle"):
        return subject
    draft = DraftSubject(
        section.model.layer_config(bundle.config),
        StoredWeights.from_manifest(section.weights, section.types),
        section.types,
        section.model.window * PAGE_TOKENS or manifest.limits["max_context"],
        section.tree["top_k"],
    )
    return replace(subject, draft=draft)


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
