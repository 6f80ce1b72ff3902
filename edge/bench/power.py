"""What the sensors' values say in a report: figures with their spread, tables, facts and notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from edge.bench.samples import CaseResult, Summary, summarise
from edge.telemetry.figures import CaseTelemetry, RunEnergy, Telemetry
from edge.telemetry.recording import LEAST_SAMPLES

UNSTEADY_CLOCK = 0.05
POWER_HEADINGS = ("Context", "Prefill\nW", "Decode\nW", "J/prompt\ntoken", "\nnet", "J/generated\ntoken", "\nnet")
UNITS = ("GPU", "memory", "CPU")

Number = Callable[[float | None], str]
Spread = Callable[[Summary | None], str]


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


def power_cells(
    cases: Sequence[CaseResult], number: Number, spread: Spread, around: tuple[str, str]
) -> list[list[str]]:
    """Rows under POWER_HEADINGS; none where no case has power. `around` encloses a spread."""
    rows = []
    for label, case in _read(cases):
        figures = (
            prefill_w(case),
            decode_w(case),
            prompt_j(case),
            prompt_j(case, net=True),
            decode_j(case),
            decode_j(case, net=True),
        )
        cells = [number(figure.median if figure else None) for figure in figures]
        for index in (0, 1, 2, 4):
            if text := spread(figures[index]):
                cells[index] += f"{around[0]}{text}{around[1]}"
        rows.append([label, *cells])
    return rows if any(cell != number(None) for row in rows for cell in row[1:]) else []


def clock_table(cases: Sequence[CaseResult], none: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of clocks, heat and throttling; no rows where nothing of it was readable."""
    found = _read(cases)
    units = [unit for unit in UNITS if any(unit in case.clocks for _, case in found)]
    headings = ["Context", *(f"{unit[:1].upper()}{unit[1:]} MHz" for unit in units), "Hottest", "Throttled"]
    rows = []
    for label, case in found:
        cells = [label]
        for unit in units:
            clock = case.clocks.get(unit)
            cells.append(f"{clock.median / 1e6:,.0f} ({clock.lowest / 1e6:,.0f})" if clock else none)
        zone = next(iter(case.hottest.items()), None)
        cells.append(f"{zone[1]:.1f} °C ({zone[0]})" if zone else none)
        cells.append(none if case.throttled is None else "yes" if case.throttled else "no")
        rows.append(cells)
    return headings, rows if any(cell != none for row in rows for cell in row[1:]) else []


def power_lines(telemetry: Telemetry | None) -> list[str]:
    """Of what the power is, how it was read and at what cost, and what this machine does not show; a sentence each."""
    if telemetry is None:
        return []
    lines = []
    if telemetry.scope:
        idle = "unknown power" if telemetry.idle_w is None else f"{telemetry.idle_w:.2f} W"
        lines.append(
            f"Power is that of {telemetry.scope}. Net: without the {idle} of the idle machine before the warm-up."
        )
    if telemetry.sources:
        lines.append(
            f"Sensors: {', '.join(telemetry.sources)}; every {telemetry.interval_s * 1e3:.0f} ms, "
            f"{telemetry.reading_s * 1e3:.2f} ms each time, {telemetry.cpu_share:.1%} of a core."
        )
    if telemetry.unreadable:
        lines.append(f"Not readable: {', '.join(f'{what} ({why})' for what, why in telemetry.unreadable.items())}.")
    return lines


def sensor_facts(telemetry: Telemetry | None) -> dict[str, str]:
    """Facts of the machine: what its speed and power are set to."""
    if telemetry is None:
        return {}
    facts = {"Power mode": telemetry.power_mode} if telemetry.power_mode else {}
    if telemetry.locked:
        states = (f"{unit} {'locked' if locked else 'not locked'}" for unit, locked in telemetry.locked.items())
        facts["Clocks"] = ", ".join(states)
    return facts


def power_notes(cases: Sequence[CaseResult], telemetry: Telemetry | None) -> list[str]:
    """What makes power or speed of these cases doubtful, one sentence each."""
    found = _read(cases)
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


def _read(cases: Sequence[CaseResult]) -> list[tuple[str, CaseTelemetry]]:
    """The cases with telemetry, each with the context it is called by."""
    return [(f"{result.case.prompt_tokens:,}", result.telemetry) for result in cases if result.telemetry]


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
