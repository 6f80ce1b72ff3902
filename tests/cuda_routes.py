"""The ways to run a kernel without a device, behind one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from plugins.launch import Launch
from plugins.simt import Report, emulator, interpreter

ROUTES = ("fast", "asan", "race", "ptx")
SEEDS = {"fast": range(4), "asan": range(4), "race": range(4), "ptx": range(1)}  # of the schedules of each route


def run_route(route: str, launches: Sequence[Launch], buffers: Mapping[str, np.ndarray], seed: int = 0) -> Report:
    """Runs `launches` in order; `buffers` are changed in place. PTX has one schedule, whatever the seed."""
    if route == "ptx":
        return interpreter.run(launches, buffers)
    return emulator.run(launches, buffers, build=route, seed=seed)
