"""The ledger of a run: every line that was planned beside what was measured, on the CPU and on the emulated driver."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.ternary import recover
from edge.bundle import GRAPH, open_bundle
from edge.config import SparseConfig
from edge.cuda import open_device
from edge.engine import Engine
from edge.executors.tensorrt_open import open_executor
from edge.memory.fit import make_plan
from edge.memory.ledger import Line
from edge.memory.measured import Compared, compare, resident_bytes
from edge.plan import EngineOptions
from edge.tensorrt import Flavour
from tests.device_engine import BUILD, device_bundle, engine_file, kernels_of
from tests.emulated import emulated_gpu
from tests.engine_stand_in import NAME, Api
from tests.engine_stand_in import Engine as StandIn
from tests.ledger_run import generate_all
from tests.synthetic import tiny_config, write_hf_checkpoint
from tests.ternary_samples import write_ternary_checkpoint

TOLERANCE = 0.03
BOUNDS = ("headroom", "process")  # not to be exceeded; all other lines are to be met
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "head_dim": 64,
    "vocab_size": 4096,
}
SPARSE = SparseConfig(window_size=128, topk=6, dense_len=256)
SYMMETRIC = WeightFormat("w4a16", 64, symmetric=True, head="int4")
PLAIN: dict[str, Any] = {"context": 2048}
UNEVEN: dict[str, Any] = {"context": 1500, "chunk": 100, "logits_rows": 64}


def export(folder: Path, weights: WeightFormat, kv: str | None = None, **changes: Any) -> Path:
    """A model of SHAPE; ternary weights come from a checkpoint that is."""
    config = tiny_config(**SHAPE, **changes)
    write = write_ternary_checkpoint if weights.kind == "ternary" else write_hf_checkpoint
    write(folder / "checkpoint", config)
    checkpoint = open_checkpoint(folder / "checkpoint")
    if weights.kind == "ternary":
        checkpoint = recover(checkpoint).checkpoint
    return export_bundle(checkpoint, folder / "bundle", ExportOptions(weights=weights, kv=kv))


def run(bundle: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What tests/ledger_run.py prints."""
    command = [sys.executable, "-m", "tests.ledger_run", str(bundle), json.dumps({"threads": 2, **options})]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def check(rows: list[Compared]) -> None:
    """Every line is measured, and within the tolerance or its bound."""
    for row in rows:
        assert row.measured is not None, row
        assert row.measured <= row.planned * (1 + TOLERANCE), row
        assert row.name in BOUNDS or row.measured >= row.planned * (1 - TOLERANCE), row


@pytest.mark.parametrize(
    ("weights", "changes", "options"),
    [
        pytest.param(SYMMETRIC, {}, PLAIN, id="int4"),
        pytest.param(SYMMETRIC, {}, UNEVEN, id="int4, uneven"),
        pytest.param(WeightFormat("w4a16", 32, head="int8"), {}, PLAIN, id="asymmetric"),
        pytest.param(WeightFormat("w4a16", 64, symmetric=True, embedding="int8"), {}, UNEVEN, id="int8 embedding"),
        pytest.param(WeightFormat("ternary", 0), {}, PLAIN, id="ternary"),
        pytest.param(WeightFormat("exact"), {}, PLAIN, id="exact"),
        pytest.param(SYMMETRIC, {"sparse": SPARSE}, PLAIN, id="sparse"),
        pytest.param(SYMMETRIC, {"sparse": SPARSE}, UNEVEN, id="sparse, uneven"),
        pytest.param(SYMMETRIC, {"sparse": SPARSE}, {**PLAIN, "attention": "dense"}, id="sparse made dense"),
        pytest.param(SYMMETRIC, {"kv": "float16", "num_key_value_heads": 1}, PLAIN, id="float16 cache"),
        pytest.param(SYMMETRIC, {"kv": "int8", "sparse": SPARSE}, {**PLAIN, "threads": 1}, id="int8 cache"),
    ],
)
def test_a_cpu_run_takes_what_was_planned(
    weights: WeightFormat, changes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    result = run(export(tmp_path, weights, **changes), options)
    rows = [Compared(**row) for row in result["lines"]]
    assert {"weights, mapped", "kv cache", "activations", "attention", "logits"} < {r.name for r in rows}
    assert result["context"] == options["context"] and result["replied"] == 3
    check(rows)


@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_a_cpu_run_with_pages_on_disk_takes_what_was_planned(
    sparse: SparseConfig | None, kv: str, tmp_path: Path
) -> None:
    bundle = export(tmp_path, SYMMETRIC, kv, sparse=sparse)
    options = {"context": 4096, "chunk": 128}
    plan = make_plan(open_bundle(bundle), EngineOptions(**options, threads=2))
    offload = {"memory": plan.total - plan.bytes("kv cache") // 4, "offload": str(tmp_path)}
    rows = [Compared(**row) for row in run(bundle, {**options, **offload})["lines"]]
    planned = {row.name: row for row in rows}
    assert planned["offloaded kv"].where == "disk"
    assert planned["kv cache"].planned < planned["offloaded kv"].planned
    check(rows)


def test_what_a_region_has_beyond_its_line_is_the_headrooms() -> None:
    lines = [Line("weights", 100), Line("activations", 50), Line("headroom", 20), Line("loading", 5)]
    rows = compare(lines, {"weights": 110, "activations": 45})
    assert [(row.name, row.measured, row.difference) for row in rows] == [
        ("weights", 100, 0),
        ("activations", 45, -5),
        ("headroom", 10, -10),
        ("loading", None, None),
    ]
    without_line = compare([Line("activations", 50), Line("headroom", 20)], {"weights": 7, "activations": 52})
    assert [(row.name, row.measured) for row in without_line] == [("activations", 50), ("headroom", 9)]


def test_pages_of_an_array_count_once_they_are_written() -> None:
    from edge.executors.pools import lazy_zeros

    values = lazy_zeros((64, 1 << 20), np.uint8)
    assert resident_bytes(values) == 0
    values[5] = values[9, 7] = 1
    assert 1 << 20 < resident_bytes(values) <= 6 << 20  # huge pages are 2 MiB


@pytest.mark.parametrize(("architecture", "target"), [("sm_86", "rtx"), ("sm_87", "jetson")])
def test_a_device_run_takes_what_was_planned(architecture: str, target: str, tmp_path: Path) -> None:
    """The driver's own counts are the measure; an integrated GPU's page-locked memory is of the budget, too."""
    config = tiny_config(sparse=SPARSE, **SHAPE)
    write_hf_checkpoint(tmp_path / "checkpoint", config)
    bundle = device_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", target)
    with emulated_gpu(architecture, kernels_of(config)) as driver:
        device, file = open_device(), engine_file(bundle, BUILD)
        before = driver.counts().bytes
        stand_in = StandIn(Api(), bundle.file(GRAPH), [])
        weights = driver.counts().bytes - before
        del stand_in
        file = replace(file, measured=replace(file.measured, bytes=weights))
        options = EngineOptions(context=448, chunk=64)
        executor, plan, chunk = open_executor(bundle, options, device, Flavour(NAME, Api()), file)
        engine = Engine(bundle, executor, plan, chunk)
        assert generate_all(engine) == 3
        counts, rows = driver.counts(), {row.name: row for row in engine.ledger()}
        check(list(rows.values()))
        pinned = rows.pop("pinned buffers")
        assert pinned.measured == pytest.approx(counts.pinned_bytes, rel=TOLERANCE)
        assert sum(row.measured or 0 for row in rows.values()) == pytest.approx(counts.bytes - before, abs=512)
        is_counted = pinned.where == "memory"
        assert is_counted == (architecture == "sm_87")
        assert plan.total == sum(row.planned for row in rows.values()) + is_counted * pinned.planned


def test_offloaded_pages_of_a_device_are_page_locked(tmp_path: Path) -> None:
    config = tiny_config(
        sparse=SparseConfig(init_blocks=1, window_size=0, topk=3, dense_len=128),
        num_attention_heads=4,
        head_dim=64,
        hidden_size=256,
        intermediate_size=512,
    )
    write_hf_checkpoint(tmp_path / "checkpoint", config)
    bundle = device_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle")
    with emulated_gpu("sm_86", kernels_of(config)) as driver:
        file = engine_file(bundle, BUILD)
        whole = EngineOptions(context=512, chunk=64)
        _, plan, _ = open_executor(bundle, whole, open_device(), Flavour(NAME, Api()), file)
        tight = replace(whole, memory=plan.total - plan.bytes("kv cache") // 8, offload=tmp_path)
        executor, plan, chunk = open_executor(bundle, tight, open_device(), Flavour(NAME, Api()), file)
        assert plan.resident_pages is not None and plan.resident_pages < plan.num_pages
        rows = {row.name: row for row in Engine(bundle, executor, plan, chunk).ledger()}
        del rows["weights"]  # of a file that only names the graph
        check(list(rows.values()))
        measured = sum(rows[name].measured or 0 for name in ("offloaded kv", "pinned buffers"))
        assert measured == pytest.approx(driver.counts().pinned_bytes, rel=TOLERANCE)
