"""What `edge bench compare` can show: false alarms between equal reports, and how often a true difference is seen.

    python -m bench.compare_power                          # simulated: log-normal speeds, three contexts, two phases
    python -m bench.compare_power --bundle BUNDLE --runs 8 # measured: one bundle, again and again, each pair compared

A report is called wrongly if any of its six rows gets a verdict that is not true; a difference is seen if its row does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from edge.bench.compare.comparison import NOT_SHOWN, Side, compare_sides, load_sides
from edge.bench.statistics import LEVEL, holm, welch_ratio

ROWS = 6  # three contexts, prefill and decode
REPETITIONS = (2, 3, 5, 10)
CHANGES = (0.01, 0.02, 0.05, 0.10)


def simulate(repetitions: int, noise: float, change: float, trials: int) -> tuple[float, float]:
    """Shares of the trials: with a false verdict on any row when all are equal, and with a changed row seen as faster.

    The change is on one row, the other five are equal; noise is the standard deviation of a speed's logarithm.
    """
    draw = np.random.default_rng(repetitions)
    wrong = seen = 0
    for _ in range(trials):
        samples = np.exp(noise * draw.standard_normal((2, ROWS, repetitions)))
        tests = [welch_ratio(a, b) for a, b in zip(*samples.tolist(), strict=True)]
        wrong += min(holm([test.p or 0.0 for test in tests])) < LEVEL
        tests[0] = welch_ratio(samples[0, 0].tolist(), (samples[1, 0] * (1 + change)).tolist())
        seen += holm([test.p or 0.0 for test in tests])[0] < LEVEL and tests[0].ratio > 1
    return wrong / trials, seen / trials


def simulated_table(noise: float, trials: int) -> Table:
    """A row for each number of repetitions."""
    title = f"noise {noise:.0%} of a speed, {trials} trials"
    table = Table(title=title, title_justify="left")
    for column in ("repetitions", "false alarms", *(f"+{change:.0%} seen" for change in CHANGES)):
        table.add_column(column, justify="right")
    for repetitions in REPETITIONS:
        found = [simulate(repetitions, noise, change, trials) for change in CHANGES]
        table.add_row(str(repetitions), f"{found[0][0]:.1%}", *(f"{seen:.0%}" for _, seen in found))
    return table


def measured_lines(bundle: Path, runs: int, repeat: int) -> list[str]:
    """`edge bench` of one bundle, `runs` times: pairs of single runs that are called different, and the two halves."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"run{index}.json") for index in range(runs)]
        for file in files:
            words = ["bench", str(bundle), "--contexts", "64,256", "--new-tokens", "16", "--repeat", str(repeat)]
            command = [sys.executable, "-m", "edge", *words, "--output", file]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        sides = load_sides(files)
        busy = [json.loads(Path(file).read_text())["other_cpu"] for file in files]
    pairs = list(combinations(sides, 2))
    different = sum(any(row.verdict != NOT_SHOWN for row in compare_sides(pair).rows) for pair in pairs)
    halves = [Side(name, tuple(side.first for side in sides[start::2])) for name, start in (("even", 0), ("odd", 1))]
    rows = compare_sides(halves).rows
    called = sum(row.verdict != NOT_SHOWN for row in rows)
    return [
        f"{runs} runs of {repeat} repetitions; other processes took {min(busy):.0%} to {max(busy):.0%} of the CPU",
        f"pairs of single runs called different in any row: {different} of {len(pairs)}",
        f"rows called different when every second run is one side: {called} of {len(rows)}",
    ]


def main(
    bundle: Annotated[Path | None, typer.Option(help="Measure this bundle instead of simulating.")] = None,
    runs: Annotated[int, typer.Option(min=4, help="How often it is measured.")] = 8,
    repeat: Annotated[int, typer.Option(min=2, help="Repetitions of a run.")] = 3,
    trials: Annotated[int, typer.Option(min=10, help="Simulated comparisons for each figure.")] = 1000,
) -> None:
    """Print what `edge bench compare` finds between equal reports, and of differences."""
    console = Console()
    if bundle is not None:
        for line in measured_lines(bundle, runs, repeat):
            console.print(line)
        return
    for noise in (0.01, 0.05):
        console.print(simulated_table(noise, trials))


if __name__ == "__main__":
    typer.run(main)
