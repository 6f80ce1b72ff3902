"""Fits a run into the memory there is: the longest context whose ledger does not exceed the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edge.bundle import Bundle
from edge.errors import EdgeError, NoRoomError
from edge.kv_cache import pages_for
from edge.machine import available_memory
from edge.memory.attended import least_streamed
from edge.memory.ledger import Line, cpu_ledger, total
from edge.memory.measured import anonymous_bytes
from edge.memory.run import Run
from edge.plan import MIB, EngineOptions, Plan, resolve_sparse, subject_of
from plugins import PAGE_TOKENS

Ledger = Callable[[Run], tuple[Line, ...]]


def make_plan(bundle: Bundle, options: EngineOptions, free: int | None = None) -> Plan:
    """The plan of a run on the CPU; `fit_plan` has the rules. free: bytes that there are, of this machine if None."""
    from plugins.ort.library import multiplies_packed

    subject, limit, sparse = (
        subject_of(bundle, options),
        bundle.manifest.limits["max_context"],
        resolve_sparse(bundle, options),
    )
    subject = replace(subject, config=replace(subject.config, sparse=sparse))
    run = Run(
        options.context or limit,
        sequences=options.sequences,
        chunk=options.chunk,
        rows=options.logits_rows,
        threads=options.threads,
        packed=multiplies_packed(),
        spare=0 if options.sequences > 1 else None,
    )
    if free is None:
        free = available_memory() + (anonymous_bytes() or 0)  # the plan has a line for what this process has already

    def ledger(run: Run) -> tuple[Line, ...]:
        return cpu_ledger(subject, run)

    if options.offload is None:
        return fit_plan(bundle, options, ledger, run, free=free)
    return fit_offloaded(bundle, options, ledger, run, free=free, least=least_streamed(sparse))


def fit_plan(bundle: Bundle, options: EngineOptions, ledger: Ledger, run: Run, *, free: int) -> Plan:
    """Fit the context of `run` into the budget: --memory, or else 90 % of the memory that is `free` before the model
    is loaded.

    A context that was asked for and does not fit is refused, though it may exceed what the model was trained for;
    one that was not asked for is the run's, or as much of it as fits. Sequences that share a pool get the rest, up to a
    context for each.
    """
    budget = budget_of(options, free)
    fitting = largest_context(ledger, run, budget)
    if fitting < (1 if options.context is None else run.context):
        raise NoRoomError(
            _refusal(bundle, options, ledger, run, budget, fitting),
            fitting,
            "memory",
            budget,
            lambda context: total(ledger(replace(run, context=context))),
        )
    run = most_spare(ledger, replace(run, context=fitting), budget)
    return Plan(run, ledger(run), budget, resolve_sparse(bundle, options))


def fit_offloaded(
    bundle: Bundle, options: EngineOptions, ledger: Ledger, run: Run, *, free: int, least: int, room: int | None = None
) -> Plan:
    """`fit_plan`, with KV pages elsewhere of which `least` at least are in memory, and as many as the budget allows.

    room: bytes that there are elsewhere; None: whoever makes the place finds out. If all pages fit, none is elsewhere.
    """
    budget = budget_of(options, free)
    if run.pages <= least or total(ledger(run)) <= budget:
        return fit_plan(bundle, options, ledger, run, free=free)
    leanest = replace(run, resident=least)
    fitting = largest_context(ledger, leanest, budget)
    if room is not None:
        page = _offloaded(ledger(leanest)).bytes // run.pages
        contexts = run.sequences if run.spare is None else 1
        fitting = min(fitting, room // page // contexts * PAGE_TOKENS)
    if fitting < (least * PAGE_TOKENS if options.context is None else run.context):
        plain = largest_context(ledger, run, budget)
        raise NoRoomError(
            _offload_refusal(options, ledger, leanest, budget, room, max(fitting, plain)),
            max(fitting, plain),
            "memory, with offloaded pages",
            budget if total(ledger(leanest)) > budget else None,
            lambda context: total(ledger(replace(leanest, context=context))),
        )
    run = most_resident(ledger, replace(run, context=min(fitting, run.context)), budget, least)
    return Plan(run, ledger(run), budget, resolve_sparse(bundle, options))


def budget_of(options: EngineOptions, free: int) -> int:
    """Bytes that a run may take; EdgeError if more was promised to it than can be had: nothing shrinks unasked."""
    if options.memory is None:
        return int(free * 0.9)
    if options.memory > free:
        raise EdgeError(
            f"--memory {_mib(options.memory)} is more than the {free // MIB}MiB that can be had here; close other "
            f"programs, or give --memory {free // MIB}MiB"
        )
    return options.memory


def largest_context(ledger: Ledger, run: Run, budget: int) -> int:
    """Most tokens, up to those of `run`, whose ledger fits: all of them, or whole pages; 0 if not even one page."""
    if total(ledger(run)) <= budget:
        return run.context
    return PAGE_TOKENS * largest(
        lambda pages: total(ledger(replace(run, context=pages * PAGE_TOKENS))) <= budget, 0, pages_for(run.context) - 1
    )


def most_resident(ledger: Ledger, run: Run, budget: int, least: int) -> Run:
    """The run with as many pages in memory as fit, at least `least`, and the others elsewhere."""
    resident = largest(lambda pages: total(ledger(replace(run, resident=pages))) <= budget, least, run.pages)
    return replace(run, resident=resident)


def most_spare(ledger: Ledger, run: Run, budget: int) -> Run:
    """The run with as many pages that its sequences share as fit; without a shared pool, as it is."""
    if run.spare is None:
        return run
    most = (run.sequences - 1) * pages_for(run.context)
    return replace(run, spare=largest(lambda n: total(ledger(replace(run, spare=n))) <= budget, 0, most))


def largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number above `least` and up to `most` that fits, as all between do; `least` if none does."""
    low, high = least, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _refusal(bundle: Bundle, options: EngineOptions, ledger: Ledger, run: Run, budget: int, fitting: int) -> str:
    """What does not fit, and what would: a --memory or --context that the sentence names is enough."""
    context = options.context or PAGE_TOKENS
    needed = _mib(total(ledger(replace(run, context=context))))
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


def _offload_refusal(
    options: EngineOptions, ledger: Ledger, leanest: Run, budget: int, room: int | None, fitting: int
) -> str:
    lines = ledger(leanest)
    needed, elsewhere = total(lines), _offloaded(lines)
    other = f", or ask for --context {fitting}" if fitting > 0 else ""
    if needed > budget:
        source = "--memory allows" if options.memory is not None else "90 % of the free memory is"
        return (
            f"a context of {leanest.context} tokens needs {_mib(needed)} though its pages are offloaded: for the "
            f"model, compressed keys and the {leanest.resident} pages that must be in memory at once; {source} "
            f"{budget // MIB}MiB; give --memory {_mib(needed)}{other}"
        )
    return (
        f"the pages of {leanest.context} tokens need {_mib(elsewhere.bytes)} of {elsewhere.where} memory, and "
        f"{(room or 0) // MIB}MiB of it can be had; close programs{other}"
    )


def _offloaded(lines: tuple[Line, ...]) -> Line:
    return next(line for line in lines if line.name == "offloaded kv")


def _mib(size: int) -> str:
    return f"{-(-size // MIB)}MiB"
