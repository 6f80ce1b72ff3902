"""Two or more reports beside each other: which case is faster, by how much, and whether that is shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp, log
from pathlib import Path
from statistics import fmean, median
from typing import Any

from edge.bench.checks import FAILED, Check
from edge.bench.options import PeerRow
from edge.bench.report import Report, load_report, notes, to_dict
from edge.bench.samples import BenchCase, CaseResult, Summary
from edge.bench.statistics import LEVEL, holm, welch_ratio
from edge.errors import EdgeError, UsageError

FASTER, SLOWER, NOT_SHOWN, NO_CLAIM = "faster", "slower", "no difference shown", "no claim"
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Side:
    """What is compared, under a name: one report, or several runs of the same thing."""

    name: str
    reports: tuple[Report, ...]

    @property
    def first(self) -> Report:
        """The report whose facts stand for all of them."""
        return self.reports[0]

    @cached_property
    def values(self) -> list[dict[str, Any]]:
        """The reports as JSON values."""
        return [to_dict(report) for report in self.reports]

    def results(self, case: BenchCase) -> list[CaseResult]:
        """A case in each report; empty if one of them lacks it."""
        found = [result for report in self.reports for result in report.cases if result.case == case]
        return found if len(found) == len(self.reports) else []

    def cases(self) -> list[BenchCase]:
        """The cases that all of its reports have, in the first one's order."""
        return [result.case for result in self.first.cases if self.results(result.case)]


@dataclass(frozen=True)
class Row:
    """One phase of one case, a candidate beside the baseline.

    Speeds are medians in tokens a second, `ratio` is of geometric means (above 1: the candidate is faster), `interval`
    its own 95 % interval. `p` is adjusted for all rows of the comparison. Interval and p are None, and the verdict is
    "no claim", if a side has a single sample. `samples`: how many the baseline and the candidate have.
    """

    candidate: str
    case: BenchCase
    phase: str
    baseline_tok_s: float
    candidate_tok_s: float
    samples: tuple[int, int]
    ratio: float
    interval: tuple[float, float] | None
    p: float | None

    @property
    def verdict(self) -> str:
        """faster or slower if that is significant at 5 %, else no difference shown; no claim without a spread."""
        if self.p is None:
            return NO_CLAIM
        if self.p >= LEVEL:
            return NOT_SHOWN
        return FASTER if self.ratio > 1 else SLOWER


@dataclass(frozen=True)
class Comparison:
    """Sides, the first of them the baseline; a row for each phase that a candidate shares with it."""

    sides: tuple[Side, ...]
    rows: tuple[Row, ...]
    peers: tuple[PeerRow, ...] = ()

    @property
    def baseline(self) -> Side:
        return self.sides[0]

    @property
    def candidates(self) -> tuple[Side, ...]:
        return self.sides[1:]


def compare_sides(sides: Sequence[Side], peers: Sequence[PeerRow] = ()) -> Comparison:
    """Compare every further side with the first. EdgeError if one of them shares no measured case with it."""
    if len(sides) < 2:
        raise UsageError("there is nothing to compare with: name at least two reports, the baseline first")
    rows: list[Row] = []
    for candidate in sides[1:]:
        found = [row for case in sides[0].cases() for row in _case_rows(sides[0], candidate, case)]
        if not found:
            raise EdgeError(
                f"{sides[0].name} and {candidate.name} have no case in common: measure both with the same --contexts "
                "and --new-tokens."
            )
        rows += found
    adjusted = iter(holm([row.p for row in rows if row.p is not None]))
    rows = [row if row.p is None else replace(row, p=next(adjusted)) for row in rows]
    known = dict.fromkeys(peer for side in sides for report in side.reports for peer in report.peers)
    return Comparison(tuple(sides), tuple(rows), tuple(known | dict.fromkeys(peers)))


def _case_rows(baseline: Side, candidate: Side, case: BenchCase) -> list[Row]:
    rows = []
    for phase in PHASES:
        ours, theirs = samples(baseline, case, phase), samples(candidate, case, phase)
        if ours and theirs:
            test = welch_ratio(ours, theirs)
            counts = (len(ours), len(theirs))
            speeds = (median(ours), median(theirs))
            rows.append(Row(candidate.name, case, phase, *speeds, counts, test.ratio, test.interval, test.p))
    return rows


def samples(side: Side, case: BenchCase, phase: str) -> list[float]:
    """Independent speeds of a phase: of each repetition, or, of several reports, each report's geometric mean.

    Repetitions of one process share its memory layout and its moment, so with several reports those are the unit.
    """
    found = [_speeds(result, phase) for result in side.results(case)]
    if not all(found):
        return []
    return found[0] if len(found) == 1 else [exp(fmean(map(log, speeds))) for speeds in found]


def _speeds(result: CaseResult, phase: str) -> list[float]:
    """The speed of each repetition, by the formula of the report; empty if one has none."""
    alone: list[Summary | None] = [
        getattr(replace(result, repetitions=(run,)), f"{phase}_tok_s") for run in result.repetitions
    ]
    return [summary.median for summary in alone if summary] if all(alone) else []


def slower_rows(comparison: Comparison, percent: float) -> list[Row]:
    """The rows that are significantly slower, by more than this by their ratio. UsageError if none can be judged."""
    if all(row.p is None for row in comparison.rows):
        raise UsageError(
            "--fail-if-slower has nothing to judge: every case has one repetition on a side; measure with --repeat 3 "
            "or more"
        )
    return [row for row in comparison.rows if row.verdict == SLOWER and row.ratio < 1 - percent / 100]


def warnings(comparison: Comparison) -> list[str]:
    """What stands in the way, worst first: failed gates, other prompts, missing cases, single samples, notes."""
    found = [
        f"{side.name} failed its quality gate ({check.name}: {check.detail}): its speeds are of no use."
        for side in comparison.sides
        for check in gate_checks(side)
        if check.outcome == FAILED
    ]
    for side in comparison.candidates:
        found += _other_prompts(comparison.baseline, side)
    for side in comparison.candidates:
        for one, other in ((comparison.baseline, side), (side, comparison.baseline)):
            if alone := [case_label(case) for case in one.cases() if not other.results(case)]:
                found.append(f"Only {one.name} has {', '.join(alone)}.")
    if any(row.p is None for row in comparison.rows):
        found.append("A single sample has no spread: where a side has one, no claim is made.")
    said: dict[str, list[str]] = {}
    for side in comparison.sides:
        for sentence in dict.fromkeys(note for report in side.reports for note in notes(report)):
            said.setdefault(sentence, []).append(side.name)
    return found + [f"{', '.join(names)}: {sentence}" for sentence, names in said.items()]


def gate_checks(side: Side) -> list[Check]:
    """The checks of the quality gate, in all reports of a side; none in older ones."""
    gates = [report.gate for report in side.reports if report.gate is not None]
    return list(dict.fromkeys(check for gate in gates for check in gate.checks))


def _other_prompts(baseline: Side, side: Side) -> list[str]:
    """A sentence if the two did not read the same prompts, by their hashes or, in reports without, their seeds."""
    differing = [
        case_label(case)
        for case in baseline.cases()
        if (ours := _hashes(baseline, case)) and (theirs := _hashes(side, case)) and ours != theirs
    ]
    seeds = [sorted({report.seed for report in one.reports}) for one in (baseline, side)]
    if differing:
        return [f"{side.name} read other prompts than {baseline.name} at {', '.join(differing)}: not comparable."]
    if seeds[0] != seeds[1]:
        return [f"{side.name} read other prompts than {baseline.name} (another seed): not comparable."]
    return []


def _hashes(side: Side, case: BenchCase) -> set[str]:
    return {value for result in side.results(case) if (value := result.prompts_sha256)}


def case_label(case: BenchCase) -> str:
    """2,048+32: prompt and new tokens; 2,048+32 x4: of four sequences at once."""
    return f"{case.prompt_tokens:,}+{case.new_tokens:,}" + (f" x{case.batch}" if case.batch > 1 else "")


def load_sides(words: Sequence[str]) -> list[Side]:
    """Sides from what the user typed: FILE, NAME=FILE, or FILE,FILE,... for runs of one thing.

    Without a name, a side has its file's name without the ending; of equal ones, as much of the path as tells them
    apart. EdgeError: a file is missing or no report.
    """
    named = [split_name(word) for word in words]
    files = [[Path(text)] if Path(text).exists() else [Path(part) for part in text.split(",")] for _, text in named]
    short = _distinct([paths[0] for paths in files])
    names = [name or own for (name, _), own in zip(named, short, strict=True)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"two sides are named {twice!r}; give them names, as old=A.json new=B.json")
    return [Side(name, tuple(map(load_report, paths))) for name, paths in zip(names, files, strict=True)]


def split_name(word: str) -> tuple[str | None, str]:
    """'NAME=FILE' -> (NAME, FILE); a file that exists under the whole word has no name."""
    match = re.fullmatch(r"([^=/\\]+)=(.+)", word)
    return (match[1].strip(), match[2]) if match and not Path(word).exists() else (None, word)


def _distinct(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as make them differ."""
    parts = [path.absolute().with_suffix("").parts[1:] for path in paths]
    names = ["/".join(part[-1:]) for part in parts]
    for depth in range(2, max(map(len, parts), default=1) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(part[-depth:]) for part in parts]
    return names
