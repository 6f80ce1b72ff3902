"""The benchmark report: its data, what the figures say, and its JSON form."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edge.bench.machine import Machine, MemoryUse, describe_machine, other_cpu_share, read_cpu_clock
from edge.bench.measure import (
    BenchCase,
    BenchEngine,
    CaseResult,
    Clock,
    Progress,
    Repetition,
    Summary,
    measure_cases,
)
from edge.bench.power import power_figures, power_notes
from edge.errors import EdgeError
from edge.memory.measured import Compared
from edge.telemetry.figures import Telemetry, case_from_dict, telemetry_from_dict
from edge.telemetry.recorder import Recorder

SCHEMA_VERSION = 1
BUSY_SHARE = 0.10
UNSTEADY_SPREAD = 0.10


@dataclass(frozen=True)
class PeerRow:
    """Another engine's speed on the same machine and context; None where it was not measured."""

    name: str
    prompt_tokens: int
    prefill_tok_s: float | None
    decode_tok_s: float | None


@dataclass(frozen=True)
class Report:
    """One benchmark: raw samples, the machine, the engine, and optional rows of other engines.

    `other_cpu` is the share (0..1) of the machine's CPU time that other processes took meanwhile. `ledger`: the lines
    of the plan beside what all cases together took. `telemetry`: how the sensors were read, if they were.
    """

    cases: Sequence[CaseResult]
    machine: Machine
    engine: dict[str, str]
    seed: int = 0
    other_cpu: float | None = None
    peers: Sequence[PeerRow] = ()
    ledger: Sequence[Compared] = ()
    telemetry: Telemetry | None = None


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
    cases: Sequence[BenchCase],
    *,
    repeat: int = 3,
    seed: int = 0,
    peers: Sequence[PeerRow] = (),
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
    meter: Recorder | None = None,
) -> Report:
    """Measure `cases` on `engine` (see `measure_cases`) and add the facts of machine and engine.

    `meter`, which must go by `clock`, adds power, clocks and temperatures.
    """
    if meter:
        meter.idle()
    before = read_cpu_clock()
    results = measure_cases(engine, cases, repeat=repeat, seed=seed, clock=clock, progress=progress, meter=meter)
    after, machine = read_cpu_clock(), describe_machine()
    other = other_cpu_share(before, after, machine.logical_cores)
    telemetry = meter.summary() if meter else None
    ledger = tuple(engine.ledger())
    return Report(results, machine, engine.describe(), seed, other, tuple(peers), ledger, telemetry)


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
    percentiles = result.interval_percentiles_s
    figures["interval_s"] = percentiles and {f"p{p}": value for p, value in percentiles.items()}
    return figures | power_figures(result)


def compare_peers(report: Report) -> list[Comparison]:
    """The peer rows by context, with our figures at the same context (None if we did not measure it)."""
    ours = {result.case.prompt_tokens: result for result in report.cases}
    rows = []
    for peer in sorted(report.peers, key=lambda row: (row.prompt_tokens, row.name)):
        result = ours.get(peer.prompt_tokens)
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
                    f"{what} at {result.case.prompt_tokens:,} tokens varied by {spread:.0%} between "
                    "repetitions: repeat on a quieter machine."
                )
    if any(0 < len(result.intervals_s) < 100 for result in report.cases):
        found.append("Fewer than 100 inter-token intervals in some cases: their p99 is close to the maximum.")
    if any(result.memory.peak_scope == "process" for result in report.cases):
        found.append("The kernel did not let the peak be reset: peak memory is that of the whole process.")
    return found + power_notes(report.cases, report.telemetry)


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def to_dict(report: Report) -> dict[str, Any]:
    """Plain JSON values: raw samples plus the figures derived from them (`summary`, ignored on reading)."""
    values: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "execution": execution(report)}
    values |= asdict(report)
    values["cases"] = [asdict(result) | {"summary": case_figures(result)} for result in report.cases]
    values["notes"] = notes(report)
    return values


def from_dict(values: dict[str, Any], source: str = "report") -> Report:
    """The inverse of `to_dict`; EdgeError names `source` and the field that is missing or wrong."""
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise EdgeError(f"{source} is not a benchmark report: it has no schema_version.")
    if version > SCHEMA_VERSION:
        raise EdgeError(f"{source} has schema version {version}, newer than {SCHEMA_VERSION}: update edge to read it.")
    try:
        cases = tuple(_case_from_dict(case) for case in values["cases"])
        if not cases:
            raise ValueError("it has no cases")
        machine = {name.name: values["machine"][name.name] for name in fields(Machine)}
        machine["instruction_sets"] = tuple(machine["instruction_sets"])
        peers = tuple(PeerRow(**peer) for peer in values["peers"])
        ledger = tuple(Compared(**row) for row in values.get("ledger", ()))  # older reports have none
        telemetry = telemetry_from_dict(values["telemetry"]) if values.get("telemetry") else None
        return Report(
            cases, Machine(**machine), values["engine"], values["seed"], values["other_cpu"], peers, ledger, telemetry
        )
    except KeyError as error:
        raise EdgeError(f"{source} is damaged: field {error} is missing.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise EdgeError(f"{source} is damaged: {error}.") from error


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


def _case_from_dict(values: dict[str, Any]) -> CaseResult:
    runs = values["repetitions"]
    if not runs:
        raise ValueError("a case has no repetitions")
    repetitions = tuple(Repetition(float(r["ttft_s"]), tuple(map(float, r["intervals_s"]))) for r in runs)
    telemetry = case_from_dict(values["telemetry"]) if values.get("telemetry") else None  # older reports have none
    return CaseResult(BenchCase(**values["case"]), repetitions, MemoryUse(**values["memory"]), telemetry)
