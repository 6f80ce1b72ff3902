"""How much memory a run may take, decided before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge.bundle import Bundle
from edge.config import SparseConfig
from edge.errors import EdgeError, UsageError
from edge.kv_cache import pages_for
from edge.machine import available_memory, usable_cores
from edge.memory.ledger import Line, Run, Subject, cpu_ledger, total
from edge.memory.weights import StoredWeights
from plugins import PAGE_TOKENS

MIB = 1 << 20
ALWAYS_DENSE = 2**31 - 1  # a dense_len that no sequence reaches
Ledger = Callable[[Run], tuple[Line, ...]]


@dataclass(frozen=True)
class EngineOptions:
    """What a user may decide about a run. context in tokens, memory in bytes; None lets the plan choose.

    attention: 'model' (as the bundle says), 'dense' or 'sparse'. sparse: fields of SparseConfig to change.
    logits_rows: tokens of a step whose logits are wanted at once, at most. offload: a folder on a disk for KV pages
    that memory does not hold.
    """

    context: int | None = None
    memory: int | None = None
    threads: int = field(default_factory=usable_cores)
    chunk: int = 512  # prompt tokens a step
    attention: str = "model"
    sparse: Mapping[str, int] = field(default_factory=dict)
    logits_rows: int = 16
    offload: Path | None = None


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
    def total(self) -> int:
        """Bytes of memory."""
        return total(self.lines)

    def bytes(self, name: str) -> int:
        """Bytes of one line; 0 if there is none of this name."""
        return sum(line.bytes for line in self.lines if line.name == name)


def subject_of(bundle: Bundle) -> Subject:
    """What a bundle runs."""
    manifest = bundle.manifest
    return Subject(bundle.config, StoredWeights.from_manifest(manifest.weights, manifest.types), manifest.types["kv"])


def make_plan(bundle: Bundle, options: EngineOptions) -> Plan:
    """The plan of a run on the CPU; `fit_plan` has the rules."""
    subject, limit = subject_of(bundle), bundle.manifest.limits["max_context"]
    run = Run(options.context or limit, chunk=options.chunk, rows=options.logits_rows, threads=options.threads)
    return fit_plan(bundle, options, lambda r: cpu_ledger(subject, r), run, free=available_memory())


def fit_plan(bundle: Bundle, options: EngineOptions, ledger: Ledger, run: Run, *, free: int) -> Plan:
    """Fit the context of `run` into the budget: --memory, or else 90 % of the memory that is `free` before the model
    is loaded.

    A context that was asked for and does not fit is refused, though it may exceed what the model was trained for;
    one that was not asked for is the run's, or as much of it as fits.
    """
    budget = options.memory if options.memory is not None else int(free * 0.9)
    fitting = largest_context(ledger, run, budget)
    if fitting < (1 if options.context is None else run.context):
        raise EdgeError(_refusal(bundle, options, ledger, run, budget, fitting))
    run = replace(run, context=fitting)
    return Plan(run, ledger(run), budget, resolve_sparse(bundle, options))


def largest_context(ledger: Ledger, run: Run, budget: int) -> int:
    """Most tokens, up to those of `run`, whose ledger fits: all of them, or whole pages; 0 if not even one page."""
    if total(ledger(run)) <= budget:
        return run.context
    low, high = 0, pages_for(run.context)
    while high - low > 1:
        middle = (low + high) // 2
        fits = total(ledger(replace(run, context=middle * PAGE_TOKENS))) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low * PAGE_TOKENS


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


def _refusal(bundle: Bundle, options: EngineOptions, ledger: Ledger, run: Run, budget: int, fitting: int) -> str:
    """What does not fit, and what would: a --memory or --context that the sentence names is enough."""
    context = options.context or PAGE_TOKENS
    needed = f"{-(-total(ledger(replace(run, context=context))) // MIB)}MiB"
    if options.memory is None:
        problem, remedy = f"90 % of the free memory is {budget // MIB}MiB", "free some"
    else:
        problem, remedy = f"--memory allows {budget // MIB}MiB", f"give --memory {needed}"
    if fitting:
        other = f"ask for --context {fitting}"
    elif bundle.manifest.weights["kind"] in ("exact", "fp16"):
        other = "export with --weights w4a16"
    else:
        other = "use a smaller --chunk or model"
    return f"a context of {context} tokens needs {needed} with its model, and {problem}; {remedy}, or {other}"
