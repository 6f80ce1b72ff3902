"""What a draft takes beside its base: every line that was planned is met, and only who wants a draft plans for one."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.draft_export import choose_draft
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import open_bundle
from edge.executors.draft import OnnxRuntimeDraft
from edge.executors.ort_session import Reserved
from edge.memory.device import device_ledger
from edge.memory.devices import find_device
from edge.memory.fit import make_plan
from edge.memory.ledger import cpu_ledger
from edge.memory.measured import Compared, mapped_bytes
from edge.memory.run import Run
from edge.plan import EngineOptions, subject_of
from tests.draft_samples import draft_config, draft_weights, write_draft
from tests.synthetic import tiny_config, write_hf_checkpoint
from tests.test_draft import batch
from tests.test_ledger import SHAPE, SPARSE, SYMMETRIC, TOLERANCE, check, run

IDS = np.arange(1000, 2024, dtype=np.int32)


def export(folder: Path, weights: WeightFormat, ids: np.ndarray | None, kv: str | None = None, **changes: Any) -> Path:
    config = tiny_config(**SHAPE, **changes)
    write_hf_checkpoint(folder / "base", config)
    draft = draft_config(config, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=2)
    write_draft(folder / "draft", draft, draft_weights(draft))
    base = open_checkpoint(folder / "base")
    chosen = choose_draft(folder / "draft", base, weights, "onnxruntime", ids)
    return export_bundle(base, folder / "bundle", ExportOptions(weights=weights, kv=kv, draft=chosen))


@pytest.mark.parametrize(
    ("weights", "ids", "changes"),
    [
        pytest.param(SYMMETRIC, IDS, {}, id="int4"),
        pytest.param(SYMMETRIC, None, {}, id="int4, whole head"),
        pytest.param(WeightFormat("exact"), IDS, {"tie_word_embeddings": False}, id="exact"),
        pytest.param(replace(SYMMETRIC, embedding="int8"), IDS, {"kv": "int8", "sparse": SPARSE}, id="int8 and sparse"),
    ],
)
def test_a_run_with_a_draft_takes_what_was_planned(
    weights: WeightFormat, ids: np.ndarray | None, changes: dict[str, Any], tmp_path: Path
) -> None:
    bundle = export(tmp_path, weights, ids, **changes)
    result = run(bundle, {"context": 1024, "chunk": 256, "speculative": "eagle"})
    rows = {row["name"]: Compared(**row) for row in result["lines"]}
    states = rows.pop("hidden states")  # lists of arrays: within the process
    assert states.planned == 4 * 512 * (256 + 1024)
    assert {"draft kv", "draft activations", "draft logits"} < rows.keys()
    assert rows["draft kv"].planned == 16 * 2 * 2 * 64 * 64 * (2 if weights.is_low_bit else 4)
    headroom = rows.pop("draft headroom")
    assert headroom.measured is not None and headroom.measured <= headroom.planned
    check(list(rows.values()))


def test_only_who_wants_the_draft_plans_for_it(tmp_path: Path) -> None:
    bundle = open_bundle(export(tmp_path, SYMMETRIC, IDS))
    options = EngineOptions(context=1024, threads=2)
    plain = make_plan(bundle, options)
    eagle = make_plan(bundle, replace(options, speculative="eagle"))
    assert plain.bytes("hidden states") > 0
    assert not [line for line in plain.lines if line.name.startswith("draft")]
    assert eagle.total > plain.total + eagle.bytes("draft kv")
    # A budget that holds the base alone is refused with the draft, or gives it less context.
    tight = replace(options, context=None, memory=eagle.total)
    contexts = [make_plan(bundle, replace(tight, speculative=how)).max_context for how in ("off", "eagle")]
    assert contexts[0] > contexts[1] == 1024


def test_edge_plan_shows_the_draft_of_a_bundle(tmp_path: Path) -> None:
    subject = subject_of(open_bundle(export(tmp_path, SYMMETRIC, IDS)))
    for lines in (cpu_ledger(subject, Run(1024)), device_ledger(subject, Run(1024), find_device("AGX Orin 32GB"))):
        names = {line.name for line in lines}
        assert "draft kv" in names


def test_what_two_mappings_share_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "data"
    np.zeros(1 << 20, np.uint8).tofile(path)
    assert mapped_bytes(path) == 0
    first = np.memmap(path, np.uint8, "r", offset=0, shape=1 << 19)
    second = np.memmap(path, np.uint8, "r", offset=1 << 18, shape=1 << 19)
    assert mapped_bytes(path) == (1 << 18) + (1 << 19)
    assert first[0] == second[0] == 0


def measured_and_planned(path: Path) -> dict[str, tuple[int, int]]:
    """The draft's regions after its largest step, and their lines."""
    bundle = open_bundle(path)
    plan = make_plan(bundle, EngineOptions(context=1024, threads=2, speculative="eagle"))
    names = ("draft weights", "draft activations")
    draft = OnnxRuntimeDraft(bundle, 16, 2, Reserved(*(2 * plan.bytes(name) + (1 << 20) for name in names), 10))
    rows = np.arange(10)
    draft.step(batch(np.arange(256), np.zeros((256, 512), np.float32), range(256), np.arange(16), rows))
    return {name: (draft.memory()[name], plan.bytes(name)) for name in names}


@pytest.mark.parametrize("weights", [SYMMETRIC, WeightFormat("exact")], ids=["int4", "exact"])
def test_the_drafts_regions_are_planned_to_three_percent(weights: WeightFormat, tmp_path: Path) -> None:
    """What a run hides in its headroom. A process of its own, since of several libraries the last has the regions."""
    path = export(tmp_path, weights, IDS)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(measured_and_planned, path).result()
    for name, (measured, planned) in found.items():
        assert measured == pytest.approx(planned, rel=TOLERANCE, abs=1 << 10), name
