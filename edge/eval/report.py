"""The evaluation's report: settings, raw answers, the scores that follow from them, as JSON and for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edge.bench import report as bench
from edge.bench.machine import Machine
from edge.bench.tables import format_number, machine_line, model_line
from edge.config import SparseConfig
from edge.eval.tasks import HaystackPlan

SCHEMA_VERSION = 1
NONE = "-"


@dataclass(frozen=True)
class EvalSettings:
    """What was asked, and how. `prompt`: chat or raw; `haystack`: invented, or the name of a user's file.

    `sparse`: the sparse attention in force, None if every token was computed densely.
    """

    tasks: tuple[str, ...]
    plan: HaystackPlan
    language: str
    prompt: str
    haystack: str
    sparse: SparseConfig | None


@dataclass(frozen=True)
class Answer:
    """One question, its references with their depths (0..1) and whether the reply holds them.

    `first_token_s`: seconds to the reply's first token; with `prefill` that includes the whole haystack, else the
    haystack was in the cache.
    """

    task: str
    length: int
    haystack: int
    key: str
    references: tuple[str, ...]
    depths: tuple[float, ...]
    found: tuple[bool, ...]
    reply: str
    prompt_tokens: int
    prefill: bool
    first_token_s: float

    @property
    def score(self) -> float:
        """RULER's string_match_all: the share of the references that the reply holds."""
        return fmean(self.found)


@dataclass(frozen=True)
class PerplexityResult:
    """A text cut into windows that know nothing of each other; `windows` holds the perplexity of each."""

    file: str
    tokens: int
    scored: int
    window: int
    perplexity: float
    windows: tuple[float, ...]
    seconds: float

    @property
    def tok_s(self) -> float | None:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True)
class EvalReport:
    """One evaluation: raw answers, and where they were given."""

    settings: EvalSettings
    machine: Machine
    engine: dict[str, str]
    answers: tuple[Answer, ...]
    perplexity: PerplexityResult | None = None


@dataclass(frozen=True)
class Cell:
    """The references at depths from `low` to `high` (0..1): how many, and the share found (None of none)."""

    low: float
    high: float
    score: float | None
    count: int


@dataclass(frozen=True)
class Result:
    """All answers of a task at a length. `interval`: 95 % around the mean score (`wilson`)."""

    task: str
    length: int
    questions: int
    score: float
    interval: tuple[float, float]
    prefill_tok_s: float | None
    cells: tuple[Cell, ...]


def wilson(mean: float, number: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion; for scores between 0 and 1 it is on the wide side."""
    z = NormalDist().inv_cdf(0.975)
    centre = mean + z * z / (2 * number)
    half = z * math.sqrt(mean * (1 - mean) / number + z * z / (4 * number * number))
    low, high = ((centre + side * half) / (1 + z * z / number) for side in (-1, 1))
    return max(0.0, round(low, 12)), min(1.0, round(high, 12))  # all and none are exactly 1 and 0


def results(report: EvalReport) -> list[Result]:
    """The scores by task and length, in the order they were asked."""
    groups: dict[tuple[str, int], list[Answer]] = {}
    for answer in report.answers:
        groups.setdefault((answer.task, answer.length), []).append(answer)
    return [_result(*key, answers, report.settings.plan.depths) for key, answers in groups.items()]


def _result(task: str, length: int, answers: Sequence[Answer], depths: int) -> Result:
    mean = fmean(answer.score for answer in answers)
    prefills = [answer for answer in answers if answer.prefill]
    seconds = sum(answer.first_token_s for answer in prefills)
    speed = sum(answer.prompt_tokens for answer in prefills) / seconds if seconds > 0 else None
    buckets: list[list[bool]] = [[] for _ in range(depths)]
    for answer in answers:
        for depth, found in zip(answer.depths, answer.found, strict=True):
            buckets[min(int(depth * depths), depths - 1)].append(found)
    cells = tuple(
        Cell(i / depths, (i + 1) / depths, fmean(found) if found else None, len(found))
        for i, found in enumerate(buckets)
    )
    return Result(task, length, len(answers), mean, wilson(mean, len(answers)), speed, cells)


def percent(score: float | None) -> str:
    """Whole percent, but 100 only for everything and 0 only for nothing."""
    if score is None:
        return NONE
    rounded = round(100 * score)
    if 0 < score < 1:
        rounded = min(max(rounded, 1), 99)
    return str(rounded)


def where_lines(report: EvalReport) -> list[str]:
    """The model, the machine and the executor, a line each."""
    setting = bench.Report((), report.machine, report.engine)
    return [model_line(setting), machine_line(report.machine), bench.execution(setting)]


def attention_line(sparse: SparseConfig | None) -> str:
    """Dense, or the settings of sparse attention."""
    if sparse is None:
        return "dense attention"
    below = f", dense below {sparse.dense_len:,} tokens" if sparse.dense_len > 0 else ""
    return f"sparse attention (topk {sparse.topk}, window_size {sparse.window_size:,}{below})"


def workload_line(report: EvalReport) -> str:
    """How the questions were asked."""
    settings, plan = report.settings, report.settings.plan
    return (
        f"{settings.language.capitalize()}, {settings.prompt} prompts, {settings.haystack} filler; "
        f"up to {plan.questions_per_haystack} questions a haystack, seed {plan.seed}"
    )


def to_dict(report: EvalReport) -> dict[str, Any]:
    """Plain JSON values: scores from 0 to 1, and every raw answer with its score."""
    return {
        "schema_version": SCHEMA_VERSION,
        "execution": where_lines(report)[-1],
        "settings": asdict(report.settings),
        "machine": asdict(report.machine),
        "engine": report.engine,
        "results": [asdict(result) for result in results(report)],
        "perplexity": report.perplexity and asdict(report.perplexity) | {"tok_s": report.perplexity.tok_s},
        "answers": [asdict(answer) | {"score": answer.score} for answer in report.answers],
    }


def to_json(report: EvalReport) -> str:
    """The report as JSON text."""
    return json.dumps(to_dict(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def terminal(report: EvalReport) -> RenderableType:
    """The report for a terminal of 80 columns; readable without colour and when piped into a file."""
    model, machine, execution = where_lines(report)
    parts: list[RenderableType] = [
        Text(f"Evaluation of {model}", style="bold"),
        Text(f"Run on this machine: {machine}.\n{execution}; {attention_line(report.settings.sparse)}."),
    ]
    if report.answers:
        parts += [
            Text(f"{workload_line(report)}.\n"),
            _table(report),
            Text("Percent of the references found; depth from the top of the haystack.\n", style="dim"),
        ]
    if report.perplexity is not None:
        parts.append(Text(perplexity_line(report.perplexity)))
    return Group(*parts)


def perplexity_line(result: PerplexityResult) -> str:
    """Perplexity and what it was taken over."""
    return (
        f"Perplexity of {result.file}: {result.perplexity:.4f} ({result.scored:,} of {result.tokens:,} tokens scored, "
        f"{len(result.windows):,} windows of {result.window:,}, {format_number(result.tok_s)} tok/s)"
    )


def _table(report: EvalReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\nTask", no_wrap=True)
    depths = report.settings.plan.depths
    by_depth = f"Score by depth,\n{depths} equal parts"
    for heading in ("Length\ntokens", "\nScore", "95 %\ninterval", "Ques-\ntions", "Prefill\ntok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(by_depth)
    for row in results(report):
        table.add_row(
            row.task,
            f"{row.length:,}",
            percent(row.score),
            " to ".join(percent(bound) for bound in row.interval),
            f"{row.questions:,}",
            format_number(row.prefill_tok_s),
            " ".join(f"{percent(cell.score):>3}" for cell in row.cells),
        )
    return table
