"""The benchmark report: its data, what the figures say, and its JSON form."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge.bench.checks import Gate
from edge.bench.decode import decode
from edge.bench.fit import Skipped
from edge.bench.identity import Identity
from edge.bench.machine import Machine, describe_machine, other_cpu_share, read_cpu_clock
from edge.bench.measure import BenchEngine, Clock, Progress, measure_cases
from edge.bench.options import BenchOptions, PeerRow, WorkloadFacts
from edge.bench.roofline import Roofline
from edge.bench.samples import CaseResult, Summary
from edge.errors import EdgeError
from edge.memory.measured import Compared

SCHEMA_VERSION = 2  # report.schema.json describes it; reports of version 1 lack fields that have defaults
BUSY_SHARE = 0.10
UNSTEADY_SPREAD = 0.10


@dataclass(frozen=True)
class Report:
    """One benchmark: raw samples, the machine, the engine, and optional rows of other engines.

    `other_cpu` is the share (0..1) of the machine's CPU time that other processes took meanwhile. `ledger`: the lines
    of the plan beside what all cases together took. `skipped`: cases that do not fit. None: roofline, gate and identity
    were not asked for, or the report is older than they are.
    """

    cases: Sequence[CaseResult]
    machine: Machine
    engine: dict[str, str]
    seed: int = 0
    other_cpu: float | None = None
    peers: Sequence[PeerRow] = ()
    ledger: Sequence[Compared] = ()
    skipped: Sequence[Skipped] = ()
    workload: WorkloadFacts | None = None
    roofline: Roofline | None = None
    gate: Gate | None = None
    identity: Identity | None = None

    @property
    def has_batches(self) -> bool:
        """Whether any case has several sequences."""
        return any(result.case.batch > 1 for result in self.cases)


@dataclass(frozen=True)
class Comparison:
    """A peer beside our medians at its context; a ratio above 1 means this engine is faster."""

    peer: PeerRow
    prefill_tok_s: float | None
    decode_tok_s: float | None

    @property
    def prefill_ratio(self) -> float | None:
        """Our prefill speed over the peer's."""
        return _ratio(self.prefill_tok_s, self.peer.prefill_tok_s)

    @property
    def decode_ratio(self) -> float | None:
        """Our decode speed over the peer's."""
        return _ratio(self.decode_tok_s, self.peer.decode_tok_s)


def run_bench(
    engine: BenchEngine,
    options: BenchOptions,
    *,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> Report:
    """Measure the cases on `engine` (see `measure_cases`) and add the facts of machine and engine."""
    before = read_cpu_clock()
    cases, repeat, seed = options.cases, options.repeat, options.seed
    results = measure_cases(engine, cases, repeat=repeat, seed=seed, clock=clock, progress=progress)
    after, machine = read_cpu_clock(), describe_machine()
    return Report(
        results,
        machine,
        engine.describe(),
        seed,
        other_cpu_share(before, after, machine.logical_cores),
        tuple(options.peers),
        tuple(engine.ledger()),
        tuple(options.skipped),
        options.workload,
    )


def execution(report: Report) -> str:
    """Where the model ran; a CPU run says that no device was used."""
    target = report.engine.get("target", "unknown target")
    if target.lower().startswith(("onnxruntime", "onnx runtime", "cpu")) and "cuda" not in target.lower():
        return "ONNX Runtime CPU; no device was used"
    return f"{target} on {report.machine.accelerator}"


def case_figures(result: CaseResult) -> dict[str, Any]:
    """The derived figures of one case as JSON values."""
    names = ("ttft_s", "prefill_tok_s", "decode_tok_s")
    summaries: dict[str, Summary | None] = {name: getattr(result, name) for name in names}
    figures: dict[str, Any] = {name: summary and asdict(summary) for name, summary in summaries.items()}
    percentiles = {"ttft_percentiles_s": result.ttft_percentiles_s, "interval_s": result.interval_percentiles_s}
    for name, found in percentiles.items():
        figures[name] = found and {f"p{p}": value for p, value in found.items()}
    if (done := result.speculation) is not None:
        figures["speculation"] = {
            "tokens_per_step": done.tokens_per_step,
            "accepted_share": done.accepted_share,
            "depth_shares": done.depth_shares,
            "draft_share": result.draft_share,
            "plain_decode_tok_s": done.plain_decode_tok_s and asdict(done.plain_decode_tok_s),
        }
    return figures


def compare_peers(report: Report) -> list[Comparison]:
    """The peer rows by context, with our figures at the same context and batch (None if we did not measure it)."""
    ours = {(result.case.prompt_tokens, result.case.batch): result for result in report.cases}
    rows = []
    for peer in sorted(report.peers, key=lambda row: (row.batch, row.prompt_tokens, row.name)):
        result = ours.get((peer.prompt_tokens, peer.batch))
        prefill = result.prefill_tok_s if result else None
        decode = result.decode_tok_s if result else None
        rows.append(Comparison(peer, prefill.median if prefill else None, decode.median if decode else None))
    return rows


def notes(report: Report) -> list[str]:
    """What a reader must know before trusting the figures, one sentence each."""
    found = []
    if report.other_cpu is not None and report.other_cpu >= BUSY_SHARE:
        found.append(
            f"Other processes took {report.other_cpu:.0%} of the CPU meanwhile: read the speeds as a lower bound."
        )
    if any(len(result.repetitions) == 1 for result in report.cases):
        found.append("One repetition per case: the spread is unknown.")
    for result in report.cases:
        for what, rate in (("Prefill", result.prefill_tok_s), ("Decode", result.decode_tok_s)):
            if rate and (rate.high - rate.low) / rate.median > UNSTEADY_SPREAD:
                spread = (rate.high - rate.low) / rate.median
                found.append(
                    f"{what} at {result.case.label} varied by {spread:.0%} between "
                    "repetitions: repeat on a quieter machine."
                )
    if any(0 < len(result.intervals_s) < 100 for result in report.cases):
        found.append("Fewer than 100 inter-token intervals in some cases: their p99 is close to the maximum.")
    if any(result.memory.peak_scope == "process" for result in report.cases):
        found.append("The kernel did not let the peak be reset: peak memory is that of the whole process.")
    return found


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def to_dict(report: Report) -> dict[str, Any]:
    """Plain JSON values: raw samples plus the figures derived from them (`summary`, ignored on reading)."""
    values: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "execution": execution(report)}
    values |= asdict(report)
    values["cases"] = [asdict(result) | {"summary": case_figures(result)} for result in report.cases]
    values["notes"] = notes(report)
    return values


def from_dict(values: Any, source: str = "report") -> Report:
    """The inverse of `to_dict`; EdgeError names `source` and the field that is missing or wrong."""
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise EdgeError(f"{source} is not a benchmark report: it has no schema_version.")
    if version > SCHEMA_VERSION:
        raise EdgeError(f"{source} has schema version {version}, newer than {SCHEMA_VERSION}: update edge to read it.")
    derived = ("schema_version", "execution", "notes")
    stored = {key: value for key, value in values.items() if key not in derived}
    try:
        stored["cases"] = [{key: case[key] for key in case if key != "summary"} for case in stored["cases"]]
        report = decode(Report, stored)
        if not report.cases or not all(result.repetitions for result in report.cases):
            raise ValueError("it has no cases" if not report.cases else "a case has no repetitions")
    except KeyError as error:
        raise EdgeError(f"{source} is damaged: field {error} is missing.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise EdgeError(f"{source} is damaged: {error}.") from error
    return report


def to_json(report: Report) -> str:
    """The report as JSON text."""
    return json.dumps(to_dict(report), indent=1, allow_nan=False) + "\n"


def load_report(path: Path) -> Report:
    """Read a JSON report; EdgeError if it is missing, not JSON, of a newer schema, or incomplete."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EdgeError(f"cannot read the report {path}: {error.strerror}.") from error
    except ValueError as error:
        raise EdgeError(f"{path} is not a benchmark report: it is not JSON ({error}).") from error
    return from_dict(values, str(path))


def write_text(path: Path, text: str) -> None:
    """Write a report file whole or not at all; EdgeError if the place cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise EdgeError(f"cannot write the report {path}: {error.strerror}.") from error
