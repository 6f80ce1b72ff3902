"""The report's tables that its three forms show alike: what is in each cell is decided here, once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from edge.bench.numbers import (
    NONE,
    SHORT_HASH,
    format_bytes,
    format_number,
    format_ratio,
    format_seconds,
    format_share,
    short_hash,
)
from edge.bench.report import Report
from edge.bench.roofline import Roofline
from edge.bench.samples import PERCENTILES, BenchCase, CaseResult, Summary
from edge.bench.table import Section
from edge.memory.ledger import MEMORY
from edge.memory.measured import Compared, totals


def sections(report: Report) -> list[Section]:
    """All that have something to say, in the order of reading."""
    makers: tuple[Callable[[Report], Section | None], ...] = (
        _skipped,
        _first_tokens,
        _confidence,
        _roofline,
        _speculation,
        _gate,
        _identity,
        _ledger,
    )
    return [section for make in makers if (section := make(report)) is not None]


def case_headings(report: Report) -> tuple[str, ...]:
    """Of the columns that name a case."""
    return ("Context\ntokens", "\nBatch") if report.has_batches else ("Context\ntokens",)


def case_cells(report: Report, case: BenchCase) -> tuple[str, ...]:
    """Prompt tokens, and sequences if any case has several."""
    context = f"{case.prompt_tokens:,}"
    return (context, f"{case.batch}") if report.has_batches else (context,)


def prompts_hash(report: Report) -> str:
    """sha256 over those of all cases: equal if two reports measured the same prompts; "" of an older report."""
    hashes = [result.prompts_sha256 for result in report.cases]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest() if all(hashes) else ""


def _skipped(report: Report) -> Section | None:
    if not report.skipped:
        return None
    rows = [(s.case.label, str(s.case.new_tokens), s.needs, s.has) for s in report.skipped]
    return Section(
        "Cases that do not fit",
        ("Case", "New tokens", "Needs", "Has"),
        rows,
        words=4,
        caption="They were not run; the others were.",
        identity="skipped",
    )


def _first_tokens(report: Report) -> Section:
    rows = []
    for result in report.cases:
        found = [format_seconds(value) for value in result.ttft_percentiles_s.values()]
        samples = sum(len(r.ttfts_s) for r in result.repetitions)
        rows.append((*case_cells(report, result.case), *found, str(samples)))
    headings = (*case_headings(report), *(f"\np{p}" for p in PERCENTILES), "\nSamples")
    caption = "Over all sequences and repetitions of a case."
    return Section("Time to first token", headings, rows, 0, caption, "first-tokens")


def _confidence(report: Report) -> Section | None:
    if all(len(result.repetitions) == 1 for result in report.cases):
        return None
    rows = [
        (
            *case_cells(report, result.case),
            *map(_interval, (result.ttft_s, result.prefill_tok_s, result.decode_tok_s)),
        )
        for result in report.cases
    ]
    headings = (*case_headings(report), "TTFT\ns", "Prefill\ntok/s", "Decode\ntok/s")
    caption = "Of the mean over the repetitions, by Student's t."
    return Section("95 % confidence intervals", headings, rows, 0, caption, "confidence")


def _interval(summary: Summary | None) -> str:
    if summary is None or summary.interval is None:
        return NONE
    return " to ".join(format_number(max(0.0, bound)) for bound in summary.interval)


def _roofline(report: Report) -> Section | None:
    found = report.roofline
    if found is None:
        return None
    rows = []
    for row in found.rows:
        read = (row.step.weights + row.step.head, row.step.kv + row.step.compressed)
        rows.append(
            (
                *case_cells(report, row.case),
                *map(format_bytes, read),
                format_number(row.decode_bound_tok_s),
                format_share(row.decode_share),
                format_number(row.prefill_bound_tok_s),
                format_share(row.prefill_share),
            )
        )
    names = ("Weights\nread", "KV\nread", "Decode\nbound", "Decode\nof it", "Prefill\nbound", "Prefill\nof it")
    headings = (*case_headings(report), *names)
    return Section("Share of the roofline", headings, rows, 0, roofline_text(found), "roofline")


def roofline_text(roofline: Roofline) -> str:
    """The limits, where they are from, and the formulas."""
    if roofline.limits is None:
        return roofline.problem
    limits = roofline.limits
    compute = f"No prefill bound: {limits.compute_source}."
    if limits.tflops is not None:
        compute = f"Peak {format_number(limits.tflops)} TFLOP/s ({limits.compute_source})."
    bandwidth = f"Bandwidth {format_number(limits.gb_s)} GB/s ({limits.bandwidth_source})."
    return f"{bandwidth} {compute} Bounds in tok/s. {'; '.join(roofline.formulas)}."


def _speculation(report: Report) -> Section | None:
    speculating = [result for result in report.cases if result.speculation is not None]
    if not speculating:
        return None
    names = ("Tokens a\nstep", "Accepted\n", "By depth\n1, 2, ...", "Drafting\n", "Plain\ntok/s", "Speed\n/ plain")
    return Section(
        "Speculation",
        (*case_headings(report), *names),
        [(*case_cells(report, result.case), *_speculation_cells(result)) for result in speculating],
        words=0,
        caption="Tokens a step: of those that verified a tree. By depth: share of the trees that go so deep of which "
        "that much was accepted. Drafting: share of the decode time. Plain: the same prompts without speculation, in "
        "turns. The prompts are random tokens, so that acceptance is not that of your texts.",
        identity="speculation",
    )


def _speculation_cells(result: CaseResult) -> list[str]:
    done = result.speculation
    assert done is not None
    plain, ours = done.plain_decode_tok_s, result.decode_tok_s
    return [
        format_number(done.tokens_per_step),
        format_share(done.accepted_share),
        " ".join(format_share(share) for share in done.depth_shares) or NONE,
        format_share(result.draft_share),
        format_number(plain.median if plain else None),
        format_ratio(ours.median / plain.median if ours and plain else None),
    ]


def _gate(report: Report) -> Section | None:
    if report.gate is None:
        return None
    rows = [(check.name, check.outcome, check.detail) for check in report.gate.checks]
    caption = "Whether the tokens can be trusted; a check that failed is exit code 1."
    return Section("Quality gate", ("Check", "Outcome", "Seen"), rows, 3, caption, "gate")


def _identity(report: Report) -> Section | None:
    found = report.identity
    if found is None:
        return None
    facts = {"Bundle": found.bundle}
    facts |= {f"  {name}": digest for name, digest in found.files.items()}
    facts |= {f"Engine {name}": value for name, value in found.engine.items() if value}
    facts |= {"CPU kernels": found.operators, "Plugins' sources": found.plugins, "All sources": found.sources}
    rows = [(name, short_hash(value)) for name, value in facts.items() if value]
    rows += [("Version", f"minicpm-edge {found.version}"), ("Power mode", found.power_mode)]
    if report.workload is not None:
        rows.append(("Workload", report.workload.name))
    if hashed := prompts_hash(report):
        rows.append((f"Prompts of seed {report.seed}", short_hash(hashed)))
    caption = f"The first {SHORT_HASH} digits of sha256; the JSON report has all."
    return Section("What exactly was measured", ("Fact", "Value"), rows, 2, caption, "identity")


def _ledger(report: Report) -> Section | None:
    """Line, planned, measured and difference; the last row is the total of what the budget is for."""
    if not report.ledger:
        return None
    rows = [
        (
            row.name if row.where == MEMORY else f"{row.name} ({row.where})",
            format_bytes(row.planned),
            format_bytes(row.measured),
            _difference(row),
        )
        for row in (*report.ledger, totals(report.ledger))
    ]
    return Section(
        "Memory, planned and measured",
        ("Memory", "Planned", "Measured", "Difference"),
        rows,
        caption="What the plan reserved before anything was loaded, and what all cases together took. Process and "
        "headroom are bounds; the total leaves out what is elsewhere.",
        identity="ledger",
    )


def _difference(row: Compared) -> str:
    """What was measured beyond the plan, in percent of it."""
    if row.difference is None or not row.planned:
        return NONE
    return f"{100 * row.difference / row.planned:+.1f} %".replace("-0.0", "0.0").replace("+0.0", "0.0")
