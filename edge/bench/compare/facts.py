"""What else two reports say: the facts in which they differ, and figures without repetitions beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge.bench.compare.comparison import Comparison, Side, gate_checks
from edge.bench.numbers import NONE, format_bytes, format_number, short_hash
from edge.bench.samples import BenchCase

# What is measured, or said elsewhere in the comparison.
_NOT_FACTS = {"cases", "ledger", "notes", "other_cpu", "peers", "timestamp", "gate", "roofline", "skipped"}
_IN_ROWS = {"ttft_s", "ttft_percentiles_s", "prefill_tok_s", "decode_tok_s", "interval_s"}
# Of a case's telemetry, what is a workload's length or a sample.
_NOT_FIGURES = {"prompt_tokens", "decode_tokens", "runs", "trace"}


@dataclass(frozen=True)
class Difference:
    """A fact that is not the same on all sides: its place in the report, and its value on each ("-": none)."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A measured figure on each side, None where it is not there; `unit` is "bytes" or a word."""

    name: str
    unit: str
    values: tuple[float | None, ...]

    @property
    def changes(self) -> tuple[float | None, ...]:
        """Each candidate's figure over the baseline's, minus 1."""
        first = self.values[0]
        return tuple(None if not first or value is None else value / first - 1 for value in self.values[1:])

    def cells(self) -> list[str]:
        """The values as text, each candidate's with its change: "1.76 GiB", "1.80 GiB (+2.3 %)"."""
        show = format_bytes if self.unit == "bytes" else format_number
        texts = [show(value) for value in self.values]
        changes = [None, *self.changes]
        return [f"{t} ({format_change(c)})" if c is not None else t for t, c in zip(texts, changes, strict=True)]


def format_change(change: float) -> str:
    """+2.3 %, -0.1 %, 0.0 %."""
    text = f"{100 * change:+.1f} %"
    return text[1:] if float(text[:-2]) == 0 else text


def differences(comparison: Comparison) -> list[Difference]:
    """Facts of machine, engine, options and workload that differ, in the reports' order."""
    facts = [_facts(side) for side in comparison.sides]
    names = dict.fromkeys(name for side in facts for name in side)
    rows = [Difference(name, tuple(side.get(name, NONE) for side in facts)) for name in names]
    return [row for row in rows if len(set(row.values)) > 1]


def _facts(side: Side) -> dict[str, str]:
    """Names like "machine: packages numpy"; runs of one side that differ have all their values."""
    merged: dict[str, list[str]] = {}
    for values in side.values:
        for name, value in _flat(values):
            merged.setdefault(name, []).append(value)
    return {name: " / ".join(dict.fromkeys(values)) for name, values in merged.items()}


def _flat(values: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Texts, whole numbers and lists of them under their place; fractions are measures, lists of objects samples."""
    for key, value in values.items():
        path = (*place, key.replace("_", " "))
        if key in _NOT_FACTS or value is None or isinstance(value, float):
            continue
        name = ": ".join(filter(None, (path[0], " ".join(path[1:]))))
        if isinstance(value, Mapping):
            yield from _flat(value, path)
        elif isinstance(value, str | int):
            yield name, short_hash(str(value))
        elif all(isinstance(item, str | int) for item in value):
            yield name, ", ".join(map(str, value))


def figures(comparison: Comparison) -> list[tuple[BenchCase, list[Figure]]]:
    """For each case of the baseline that another side has, the figures that have no repetitions."""
    shared = [case for case in comparison.baseline.cases() if any(side.results(case) for side in comparison.candidates)]
    return [(case, _case_figures(comparison.sides, case)) for case in shared]


def _case_figures(sides: Sequence[Side], case: BenchCase) -> list[Figure]:
    results = [side.results(case) for side in sides]
    peaks = tuple(max((r.memory.peak_bytes for r in found), default=None) for found in results)
    found = [Figure("peak memory", "bytes", peaks)]
    slowest = [r[0].interval_percentiles_s if r else None for r in results]
    if any(slowest):
        found.append(Figure("p99 between tokens", "ms", tuple(1000 * s[99] if s else None for s in slowest)))
    others = [_other_figures(_case_values(side, case)) for side in sides]
    for name in dict.fromkeys(name for side in others for name in side):
        found.append(Figure(name, "", tuple(side.get(name) for side in others)))
    return found


def _other_figures(values: Mapping[str, Any]) -> dict[str, float]:
    """Whatever else a report derives from a case, and its telemetry: power, energy, clocks, temperature."""
    summary = {key: value for key, value in values.get("summary", {}).items() if key not in _IN_ROWS}
    telemetry = {key: v for key, v in (values.get("telemetry") or {}).items() if key not in _NOT_FIGURES}
    return dict(_numbers(summary)) | dict(_numbers(telemetry))


def _case_values(side: Side, case: BenchCase) -> dict[str, Any]:
    """The case of the side's first report as JSON values."""
    for result, values in zip(side.first.cases, side.values[0]["cases"], strict=True):
        if result.case == case:
            return values
    return {}


def _numbers(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested objects under their place; of what has a median that; lists are samples."""
    for key, value in values.items():
        name = f"{place} {key.replace('_', ' ')}".strip()
        if isinstance(value, Mapping) and "median" in value:
            yield from _numbers({key: value["median"]}, place)
        elif isinstance(value, Mapping):
            yield from _numbers(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


def ledger_figures(comparison: Comparison) -> list[Figure]:
    """The lines of the memory ledger, measured, or planned where nothing measures them."""
    sides = [{row.name: row for row in side.first.ledger} for side in comparison.sides]
    found = []
    for name in dict.fromkeys(name for side in sides for name in side):
        rows = [side.get(name) for side in sides]
        measured = all(row is None or row.measured is not None for row in rows)
        values = tuple((row.measured if measured else row.planned) if row else None for row in rows)
        found.append(Figure(name if measured else f"{name} (planned)", "bytes", values))
    return found


def gates(comparison: Comparison) -> list[str]:
    """Each side's quality gate as one line: what every check found; none for reports without a gate."""
    said = {side.name: [f"{check.name} {check.outcome}" for check in gate_checks(side)] for side in comparison.sides}
    return [f"{side}: {', '.join(checks)}." for side, checks in said.items() if checks]
