"""Budgets of the kernels: what their compiled code may use, in budgets.toml, and what is wrong with code beyond it.

`python -m plugins.build.budgets` checks. With --update it also writes what it measured into budgets.toml, below the
line that says so; the bars above it, the project's promises, stay as they are and are checked in any case.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from edge.errors import EdgeError
from plugins.build.cache import write_atomically
from plugins.build.cost import Cost, board_of, cost
from plugins.build.nvrtc import ARCHITECTURES, cubin
from plugins.build.registry import product_launches
from plugins.build.sass import KernelCode, read_cubin
from plugins.launch import Launch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUDGETS = Path(__file__).with_name("budgets.toml")
MEASURED = "# Measured; written by `python -m plugins.build.budgets --update`, not by hand.\n"

Costs = dict[str, dict[str, Cost]]  # kernel's symbol -> architecture -> cost of its launch with most shared memory


@dataclass(frozen=True)
class Budget:
    """What one kernel may use on one architecture: at most these registers and instructions, at least these blocks an
    SM, exactly these counts in the hot loop. None where it has no such figure. Spills and stack are 0 for all.
    """

    registers: int
    ctas_per_sm: int
    hmma: int
    ldsm: int
    ldgsts: int
    instructions_per_hmma: float | None = None
    instructions_per_byte: float | None = None


@dataclass(frozen=True)
class Bar:
    """A promise about the kernels whose symbols match one of the patterns, on one architecture: at most so many
    instructions per HMMA, or at least this ratio of DRAM cycles to those of the slowest pipe."""

    kernels: tuple[str, ...]
    architecture: str
    instructions_per_hmma: float | None = None
    memory_bound_ratio: float | None = None


@dataclass(frozen=True)
class Budgets:
    """The contents of budgets.toml; `kernels`: symbol -> architecture -> budget."""

    bars: dict[str, Bar]
    kernels: dict[str, dict[str, Budget]]


def load_budgets(path: Path = BUDGETS) -> Budgets:
    """Read budgets.toml."""
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    bars = {name: Bar(**{**bar, "kernels": tuple(bar["kernels"])}) for name, bar in values.pop("bars").items()}
    kernels = {
        name: {architecture: Budget(**row) for architecture, row in rows.items()} for name, rows in values.items()
    }
    return Budgets(bars, kernels)


def measure(
    launches: Iterable[Launch], progress: Callable[[int, int, str], None] = lambda done, total, what: None
) -> Costs:
    """Compile and read the launches' kernels for every architecture; those of one source file share a module."""
    kernels: dict[str, Launch] = {}
    for launch in launches:
        other = kernels.setdefault(launch.kernel.symbol, launch)
        if other.kernel != launch.kernel:
            raise ValueError(f"{launch.kernel} and {other.kernel} are both called {launch.kernel.symbol}")
        kernels[launch.kernel.symbol] = max(other, launch, key=lambda one: one.shared_bytes)
    sources = sorted({launch.kernel.source for launch in kernels.values()})
    modules = [(source, architecture) for architecture in ARCHITECTURES for source in sources]

    def read(source: str, architecture: str) -> dict[str, KernelCode]:
        ours = [launch.kernel for launch in kernels.values() if launch.kernel.source == source]
        return read_cubin(cubin(ours, architecture))

    code: dict[tuple[str, str], dict[str, KernelCode]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is NVRTC's and other processes'
        for module, found in zip(modules, pool.map(lambda module: read(*module), modules), strict=True):
            code[module] = found
            progress(len(code), len(modules), module[0])
    return {
        name: {arch: cost(code[launch.kernel.source, arch][name], launch) for arch in ARCHITECTURES}
        for name, launch in kernels.items()
    }


def budget_of(measured: Cost) -> Budget:
    """The budget that `measured` just meets; ratios are rounded up."""
    per_hmma, per_byte = measured.instructions_per_hmma, measured.instructions_per_byte
    return Budget(
        registers=measured.registers,
        ctas_per_sm=measured.ctas_per_sm,
        hmma=measured.hmma,
        ldsm=measured.ldsm,
        ldgsts=measured.ldgsts,
        instructions_per_hmma=None if per_hmma is None else math.ceil(per_hmma * 100) / 100,
        instructions_per_byte=None if per_byte is None or per_hmma is not None else math.ceil(per_byte * 10000) / 10000,
    )


def check(costs: Costs, budgets: Budgets) -> list[str]:
    """What breaks a budget or a bar, a sentence each."""
    problems = []
    for name, by_architecture in costs.items():
        for architecture, measured in by_architecture.items():
            budget = budgets.kernels.get(name, {}).get(architecture)
            problems += [f"{name} on {architecture}: {problem}" for problem in _excesses(measured, budget)]
    problems += [
        f"{name} has a budget but is no kernel of the product; --update removes it"
        for name in budgets.kernels
        if name not in costs
    ]
    for title, bar in budgets.bars.items():
        problems += check_bar(title, bar, costs)
    return problems


def check_bar(title: str, bar: Bar, costs: Costs) -> list[str]:
    """The kernels that miss a bar; a bar that no kernel has to take is a mistake too."""
    matching = [name for name in costs if any(fnmatchcase(name, pattern) for pattern in bar.kernels)]
    problems = [
        f"bar {title}: no kernel of the product is called {pattern}"
        for pattern in bar.kernels
        if not any(fnmatchcase(name, pattern) for name in matching)
    ]
    board = board_of(bar.architecture)
    for name in matching:
        measured = costs[name][bar.architecture]
        per_hmma, ratio = measured.instructions_per_hmma, measured.memory_bound_ratio(board)
        if bar.instructions_per_hmma is not None and (per_hmma is None or per_hmma > bar.instructions_per_hmma):
            has = "no HMMA" if per_hmma is None else f"{per_hmma:.2f} instructions per HMMA"
            problems.append(
                f"bar {title}: {name} on {bar.architecture} has {has}, more than {bar.instructions_per_hmma}"
            )
        if bar.memory_bound_ratio is not None and ratio < bar.memory_bound_ratio:
            problems.append(
                f"bar {title}: {name} on {board.name} needs {ratio:.2f} times as long for DRAM as for its slowest "
                f"pipe ({measured.bound}), less than {bar.memory_bound_ratio} times"
            )
    return problems


def _excesses(measured: Cost, budget: Budget | None) -> list[str]:
    problems = []
    if measured.spills:
        problems.append(f"{measured.spills} loads and stores of local memory, where registers must do")
    if measured.stack:
        problems.append(f"a stack of {measured.stack} bytes a thread, where no local array may be indexed at run time")
    if measured.ctas_per_sm == 0:
        problems.append(f"not one block fits on an SM ({measured.limit})")
    if budget is None:
        return [*problems, "no budget; run `python -m plugins.build.budgets --update` and look at what it adds"]
    if measured.registers > budget.registers:
        problems.append(f"{measured.registers} registers a thread, {budget.registers} are allowed")
    if measured.ctas_per_sm < budget.ctas_per_sm:
        problems.append(
            f"{measured.ctas_per_sm} blocks fit on an SM (limited by {measured.limit}), "
            f"{budget.ctas_per_sm} are required"
        )
    for name in ("hmma", "ldsm", "ldgsts"):
        if (has := getattr(measured, name)) != (expected := getattr(budget, name)):
            problems.append(f"{has} {name.upper()} in the hot loop, {expected} are expected")
    for name, per in (("instructions_per_hmma", "HMMA"), ("instructions_per_byte", "byte")):
        has, allowed = getattr(measured, name), getattr(budget, name)
        if allowed is not None and has is not None and has > allowed:
            problems.append(f"{has:.4g} instructions per {per}, {allowed} are allowed")
    return problems


def render(text: str, costs: Costs) -> str:
    """budgets.toml `text` with its measured part replaced."""
    above, line, _ = text.partition(MEASURED)
    if not line:
        raise EdgeError(f"{BUDGETS.name} lacks the line {MEASURED.strip()!r}, below which measured values go")
    lines = [above + MEASURED]
    for name in sorted(costs):
        lines.append(f"\n[{name}]\n")
        for architecture, measured in costs[name].items():
            values = {key: value for key, value in asdict(budget_of(measured)).items() if value is not None}
            row = ", ".join(f"{key} = {value}" for key, value in values.items())
            lines.append(f"{architecture} = {{ {row} }}\n")
    return "".join(lines)


def main() -> int:
    """Check, or update and then check; prints one problem a line -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m plugins.build.budgets", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the measured values")
    update = parser.parse_args().update
    try:
        costs = measure(product_launches().values())
        if update:
            write_atomically(BUDGETS, render(BUDGETS.read_text(encoding="utf-8"), costs).encode())
        problems = check(costs, load_budgets())
    except EdgeError as error:
        problems = [str(error)]
    print("\n".join(problems) or f"{len(costs)} kernels on {len(ARCHITECTURES)} architectures meet their budgets")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
