"""Power, clocks and heat as the report shows them: tables, sentences, facts of the machine."""

from __future__ import annotations

from collections.abc import Sequence

from edge.bench.numbers import NONE, format_number, format_summary
from edge.bench.power import UNITS, cases_with_telemetry, decode_j, decode_w, prefill_w, prompt_j
from edge.bench.samples import CaseResult
from edge.bench.table import Section
from edge.telemetry.figures import Telemetry

POWER_HEADINGS = ("Context", "Prefill\nW", "Decode\nW", "J/prompt\ntoken", "\nnet", "J/generated\ntoken", "\nnet")


def power_sections(cases: Sequence[CaseResult]) -> list[Section]:
    """Tables of power and of clocks, without a heading; those of which the machine showed nothing are left out."""
    return [section for section in (_power_section(cases), _clock_section(cases)) if section is not None]


def _power_section(cases: Sequence[CaseResult]) -> Section | None:
    rows = []
    for label, case in cases_with_telemetry(cases):
        powers = [format_summary(figure) for figure in (prefill_w(case), decode_w(case))]
        prompt, generated = prompt_j(case), decode_j(case)
        found = prompt_j(case, net=True), decode_j(case, net=True)
        nets = [format_number(net.median if net else None) for net in found]
        energies = (format_summary(prompt), nets[0], format_summary(generated), nets[1])
        rows.append((label, *powers, *energies))
    caption = "Medians of the repetitions, and the lowest to the highest."
    return Section("", POWER_HEADINGS, rows, caption=caption) if _says_something(rows) else None


def _clock_section(cases: Sequence[CaseResult]) -> Section | None:
    """Clocks, heat and throttling."""
    found = cases_with_telemetry(cases)
    units = [unit for unit in UNITS if any(unit in case.clocks for _, case in found)]
    headings = ["Context", *(f"{unit[:1].upper()}{unit[1:]} MHz" for unit in units), "Hottest", "Throttled"]
    rows = []
    for label, case in found:
        cells = [label]
        for unit in units:
            clock = case.clocks.get(unit)
            cells.append(f"{clock.median / 1e6:,.0f} ({clock.lowest / 1e6:,.0f})" if clock else NONE)
        zone = next(iter(case.hottest.items()), None)
        cells.append(f"{zone[1]:.1f} °C ({zone[0]})" if zone else NONE)
        cells.append(NONE if case.throttled is None else "yes" if case.throttled else "no")
        rows.append(cells)
    caption = "Clocks over all repetitions: the median, in brackets the lowest."
    return Section("", headings, rows, caption=caption) if _says_something(rows) else None


def _says_something(rows: Sequence[Sequence[str]]) -> bool:
    return any(cell != NONE for row in rows for cell in row[1:])


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
