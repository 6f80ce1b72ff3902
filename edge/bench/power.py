"""What the sensors' values say of a case: figures with their spread, and notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from edge.bench.samples import CaseResult, Summary, summarise
from edge.telemetry.figures import CaseTelemetry, RunEnergy, Telemetry
from edge.telemetry.recording import LEAST_SAMPLES

UNSTEADY_CLOCK = 0.05
UNITS = ("GPU", "memory", "CPU")


def prefill_w(case: CaseTelemetry) -> Summary | None:
    """Mean power of the prefill, watts: joules over seconds of each repetition."""
    return _over_runs(case, lambda run: (run.prefill_j, run.prefill_s))


def decode_w(case: CaseTelemetry) -> Summary | None:
    """Mean power from the first token to the last, watts."""
    return _over_runs(case, lambda run: (run.decode_j, run.decode_s))


def prompt_j(case: CaseTelemetry, *, net: bool = False) -> Summary | None:
    """Joules a prompt token; net: without what the idle machine would have taken in that time."""
    idle = _idle(case, net)
    return _over_runs(case, lambda run: (_less(run.prefill_j, run.prefill_s, idle), case.prompt_tokens))


def decode_j(case: CaseTelemetry, *, net: bool = False) -> Summary | None:
    """Joules a generated token but the first, which the prefill makes; net as in `prompt_j`."""
    idle = _idle(case, net)
    return _over_runs(case, lambda run: (_less(run.decode_j, run.decode_s, idle), case.decode_tokens))


def power_figures(result: CaseResult) -> dict[str, Any]:
    """The derived figures of a case as JSON values; empty without telemetry."""
    case = result.telemetry
    if case is None:
        return {}
    figures = {
        "prefill_w": prefill_w(case),
        "decode_w": decode_w(case),
        "j_per_prompt_token": prompt_j(case),
        "j_per_prompt_token_net": prompt_j(case, net=True),
        "j_per_generated_token": decode_j(case),
        "j_per_generated_token_net": decode_j(case, net=True),
    }
    return {name: figure and asdict(figure) for name, figure in figures.items()}


def cases_with_telemetry(cases: Sequence[CaseResult]) -> list[tuple[str, CaseTelemetry]]:
    """The cases with telemetry, each with the context it is called by."""
    return [(f"{result.case.prompt_tokens:,}", result.telemetry) for result in cases if result.telemetry]


def power_notes(cases: Sequence[CaseResult], telemetry: Telemetry | None) -> list[str]:
    """What makes power or speed of these cases doubtful, one sentence each."""
    found = cases_with_telemetry(cases)
    notes = [
        f"Clocks were held down at {label} tokens: {', '.join(case.throttled)}."
        for label, case in found
        if case.throttled
    ]
    for unit in UNITS:
        moved = [(case.clocks[unit].moved, label) for label, case in found if unit in case.clocks]
        if moved and max(moved)[0] > UNSTEADY_CLOCK:
            share, tokens = max(moved)
            whose = f"The {unit}'s clock" if unit != "memory" else "The memory's clock"
            notes.append(f"{whose} moved by {share:.0%} within a case ({tokens} tokens), and speed with it.")
    if telemetry and telemetry.jetson:
        loose = [unit for unit, locked in telemetry.locked.items() if not locked]
        if loose or not telemetry.locked:
            whose = " and ".join(loose) or "GPU and memory, as far as is known"
            notes.append(f"Clocks are not locked ({whose}): run sudo jetson_clocks before measuring.")
    if telemetry and telemetry.scope:
        notes += _too_short(found, telemetry.interval_s)
    return notes


def _too_short(cases: Sequence[tuple[str, CaseTelemetry]], interval: float) -> list[str]:
    """Phases without energy, because fewer samples fell into them than it takes."""
    least = LEAST_SAMPLES * interval
    notes = []
    for phase in ("prefill", "decode"):
        missing = [
            label
            for label, case in cases
            if any(_phase(run, phase)[0] is None and _phase(run, phase)[1] > 0 for run in case.runs)
        ]
        if missing:
            notes.append(
                f"No energy of {phase} at {', '.join(missing)} tokens: a phase takes {LEAST_SAMPLES} samples, "
                f"{least:.1f} s; ask for more tokens."
            )
    return notes


def _phase(run: RunEnergy, phase: str) -> tuple[float | None, float]:
    return (run.prefill_j, run.prefill_s) if phase == "prefill" else (run.decode_j, run.decode_s)


def _over_runs(case: CaseTelemetry, ratio: Callable[[RunEnergy], tuple[float | None, float]]) -> Summary | None:
    """The quotient of each repetition; None if one of them has none."""
    pairs = [ratio(run) for run in case.runs]
    values = [joules / by for joules, by in pairs if joules is not None and by > 0]
    return summarise(values) if values and len(values) == len(pairs) else None


def _idle(case: CaseTelemetry, net: bool) -> float | None:
    """Watts to take off: none for gross figures, None if they are unknown."""
    return case.idle_w if net else 0.0


def _less(joules: float | None, seconds: float, idle: float | None) -> float | None:
    return None if joules is None or idle is None else joules - idle * seconds
