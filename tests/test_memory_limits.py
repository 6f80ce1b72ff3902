"""A run under a hard limit of its memory: the kernel enforces what the plan promised, and the run gets through."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge import machine
from edge.bundle import Bundle, open_bundle
from edge.config import SparseConfig
from edge.memory.fit import make_plan
from edge.plan import EngineOptions, Plan
from tests.synthetic import tiny_config, write_hf_checkpoint

MIB = 1 << 20
# Beside a plan, a control group counts what the kernel keeps for the process: page tables, stacks, open files.
KERNEL = 8 * MIB


@pytest.fixture(scope="module", params=["int4, sparse", "exact"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model whose lines are larger than the part of a plan that is only stated."""
    folder = tmp_path_factory.mktemp("limits")
    is_exact = request.param == "exact"
    config = tiny_config(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=16384,
        max_position_embeddings=65536,
        sparse=None if is_exact else SparseConfig(window_size=128, topk=6, dense_len=256),
    )
    write_hf_checkpoint(folder / "checkpoint", config)
    weights = WeightFormat("exact" if is_exact else "w4a16", 64, symmetric=True)
    options = ExportOptions(weights=weights, kv="float32")
    return open_bundle(export_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle", options))


@dataclass(frozen=True)
class Group:
    """A control group of this test's own, below the one that the test is in."""

    path: Path
    limit_files: tuple[str, ...]
    peak_file: str

    def limit(self, size: int) -> None:
        """Memory and, with the same limit, memory and swap."""
        for name in self.limit_files:
            if (self.path / name).exists():
                (self.path / name).write_text(str(size))

    @property
    def enter(self) -> str:
        """For a shell: go into it."""
        return f"echo $$ > {self.path}/cgroup.procs && "

    @property
    def peak(self) -> int:
        return int((self.path / self.peak_file).read_text())


@pytest.fixture
def group() -> Generator[Group, None, None]:
    """Skips where no group can be made."""
    own = [path for path in machine._control_groups() if (path / "cgroup.procs").exists()]
    for parent in own[:1]:
        path = parent / f"edge-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        try:
            if (path / "memory.limit_in_bytes").exists():
                files = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
                yield Group(path, files, "memory.max_usage_in_bytes")
            elif (path / "memory.peak").exists():
                yield Group(path, ("memory.max", "memory.swap.max"), "memory.peak")
            else:
                pytest.skip("control groups made here do not count memory")
        finally:
            _remove(path)
        return
    pytest.skip("this process is in no control group of memory")


def _remove(path: Path) -> None:
    for _ in range(50):  # the kernel may take a moment to forget a process that ended
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    path.rmdir()


def planned(bundle: Bundle) -> tuple[Plan, dict[str, Any]]:
    """The plan of a run whose cache is most of its memory, and the options that ask for exactly that."""
    options: dict[str, Any] = {"context": 8192, "threads": 2, "chunk": 256}
    plan = make_plan(bundle, EngineOptions(**options))
    return plan, {**options, "memory": plan.total}


def start(bundle: Bundle, options: dict[str, Any], before: str = "") -> subprocess.CompletedProcess[str]:
    """tests/ledger_run.py, from a shell that does `before` first."""
    command = f'{before}exec "$0" -m tests.ledger_run "$1" "$2"'
    words = ["sh", "-c", command, sys.executable, str(bundle.path), json.dumps(options)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_a_control_group_of_the_plans_size_is_enough(
    bundle: Bundle, group: Group, record_property: Callable[[str, object], None]
) -> None:
    plan, options = planned(bundle)
    group.limit(plan.total + KERNEL)
    result = start(bundle, options, group.enter)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["context"] == plan.max_context
    record_property("planned", plan.total)
    record_property("peak", group.peak)
    stated = plan.bytes("process") + plan.bytes("headroom") + plan.bytes("weights, mapped")
    assert plan.total - stated < group.peak <= plan.total + KERNEL


def test_a_run_that_its_group_has_no_room_for_does_not_begin(bundle: Bundle, group: Group) -> None:
    """And the limit is real: the kernel ends who takes more."""
    plan, options = planned(bundle)
    room = plan.bytes("kv cache")
    group.limit(room)
    greedy = f"{group.enter}exec {sys.executable} -c 'b = bytes([1]) * {2 * room}'"
    assert subprocess.run(["sh", "-c", greedy], capture_output=True, check=False).returncode != 0
    for memory, sentence in ((None, "90 % of the free memory is"), (plan.total, "is more than the")):
        result = start(bundle, {**options, "memory": memory}, group.enter)
        assert result.returncode == 1 and sentence in result.stderr
        named = int(re.findall(rf"{sentence} (\d+)MiB", result.stderr)[-1])
        assert room * 0.5 < named * MIB < room * 1.2


def test_a_limit_of_private_memory_is_enough(bundle: Bundle) -> None:
    """Everywhere on Linux: RLIMIT_DATA, which counts address space, whether it is touched or not."""
    plan, options = planned(bundle)
    result = start(bundle, options, f"ulimit -d {plan.total >> 10} && ")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["context"] == plan.max_context
    tight = plan.bytes("kv cache") + plan.bytes("weights")
    assert start(bundle, options, f"ulimit -d {tight >> 10} && ").returncode != 0
