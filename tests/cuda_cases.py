"""Many launches of one kernel family in a single run, so that a route compiles and starts once for all shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from plugins.launch import Launch
from plugins.vectors import poisoned
from tests.cuda_routes import Report, run_route


@dataclass(frozen=True)
class Case:
    """A launch, its inputs, the (shape, dtype) of its outputs, which start as junk, and what it updates."""

    name: str
    launch: Launch
    inputs: dict[str, np.ndarray]
    outputs: dict[str, tuple[tuple[int, ...], np.dtype]]
    updated: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The outputs and updated buffers of a case, and the bytes it moved per buffer (0 where the route counts none)."""

    outputs: dict[str, np.ndarray]
    read: dict[str, int]
    written: dict[str, int]


def run_cases(route: str, cases: Sequence[Case], seed: int = 0) -> list[Result]:
    """Runs all cases one after the other; inputs must be left as they were."""
    launches, buffers = [], {}
    for i, case in enumerate(cases):
        names = tuple(f"{i}.{a}" if isinstance(a, str) else a for a in case.launch.arguments)
        launches.append(replace(case.launch, arguments=names))
        buffers |= {f"{i}.{name}": array.copy() for name, array in (case.inputs | case.updated).items()}
        buffers |= {f"{i}.{name}": poisoned(*output) for name, output in case.outputs.items()}
    report = run_route(route, launches, buffers, seed=seed)
    for i, case in enumerate(cases):
        for name, array in case.inputs.items():
            assert buffers[f"{i}.{name}"].tobytes() == array.tobytes(), f"{case.name} changed {name}"
    return [_result(i, case, buffers, report) for i, case in enumerate(cases)]


def _result(i: int, case: Case, buffers: dict[str, np.ndarray], report: Report) -> Result:
    return Result(
        {name: buffers[f"{i}.{name}"] for name in (*case.outputs, *case.updated)},
        {name: report.read.get(f"{i}.{name}", 0) for name in case.inputs},
        {name: report.written.get(f"{i}.{name}", 0) for name in case.outputs},
    )
