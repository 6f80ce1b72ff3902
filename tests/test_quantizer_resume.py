"""`edge quantize` interrupted, resumed and run again: what is on disk, and what is never touched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_engine.checkpoint import Checkpoint, open_checkpoint
from build_engine.quantizer.place import partial_path
from build_engine.quantizer.run import quantize_checkpoint
from edge.errors import EdgeError, UsageError
from tests.quantizer_samples import OPTIONS, layered_checkpoint, sample_sequences, shards
from tests.synthetic import write_hf_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return layered_checkpoint(tmp_path_factory.mktemp("quantizer"))


@pytest.fixture(scope="module")
def sequences(source: Checkpoint) -> np.ndarray:
    return sample_sequences(source)


def quantize_until(stop: int, source: Checkpoint, out: Path, sequences: np.ndarray | None, **settings: Any) -> None:
    """Interrupted as by Ctrl-C when step `stop` begins."""

    def progress(done: int, total: int, name: str) -> None:
        if done == stop:
            raise KeyboardInterrupt

    options = settings.pop("options", OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, options, sequences, progress=progress, **settings)


@pytest.mark.parametrize("stop", [4, 7, 11])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    stop: int, source: Checkpoint, sequences: np.ndarray, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    quantize_checkpoint(source, whole, OPTIONS, sequences)
    quantize_until(stop, source, out, sequences)
    assert not out.exists()
    with pytest.raises(UsageError, match=r"interrupted run; add --resume to finish it or --overwrite"):
        quantize_checkpoint(source, out, OPTIONS, sequences)
    quantize_until(stop, source, out, sequences, resume=True)
    with pytest.raises(UsageError, match=r"begun with another damping \(0\.01, now 0\.02\)"):
        quantize_checkpoint(source, out, replace(OPTIONS, damping=0.02), sequences, resume=True)
    with pytest.raises(UsageError, match=r"begun with another calibration"):
        quantize_checkpoint(source, out, OPTIONS, sequences[:5], resume=True)
    report = quantize_checkpoint(source, out, OPTIONS, sequences, resume=True)
    assert len(report.linears) == 21
    assert shards(out) == shards(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_a_run_without_a_finished_layer_leaves_nothing(
    source: Checkpoint, sequences: np.ndarray, tmp_path: Path
) -> None:
    quantize_until(3, source, tmp_path / "out", sequences)
    assert list(tmp_path.iterdir()) == []
    quantize_checkpoint(source, tmp_path / "out", OPTIONS, sequences, resume=True)  # nothing to resume is fine


def test_another_checkpoint_does_not_go_on(source: Checkpoint, sequences: np.ndarray, tmp_path: Path) -> None:
    quantize_until(4, source, tmp_path / "out", sequences)
    other = open_checkpoint(write_hf_checkpoint(tmp_path / "other", source.config, seed=1, tokenizer=True))
    with pytest.raises(UsageError, match="begun with another checkpoint"):
        quantize_checkpoint(other, tmp_path / "out", OPTIONS, sequences, resume=True)


def test_damage_in_what_was_finished_is_named(source: Checkpoint, sequences: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_until(8, source, out, sequences)
    shard = partial_path(out) / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(EdgeError, match=r"model-00001-of-00004\.safetensors is missing or damaged .* --overwrite"):
        quantize_checkpoint(source, out, OPTIONS, sequences, resume=True)
    quantize_checkpoint(source, out, OPTIONS, sequences, overwrite=True)
    assert not partial_path(out).exists()


def test_only_its_own_results_are_replaced(source: Checkpoint, tmp_path: Path) -> None:
    rounding = replace(OPTIONS, method="rtn")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="exists"):
            quantize_checkpoint(source, tmp_path / "mine", rounding, None, overwrite=overwrite)
    quantize_checkpoint(source, tmp_path / "out", rounding, None)
    with pytest.raises(UsageError, match="already exists"):
        quantize_checkpoint(source, tmp_path / "out", rounding, None)
    quantize_until(4, source, tmp_path / "out", None, options=replace(rounding, group_size=64), overwrite=True)
    assert open_checkpoint(tmp_path / "out").tensors["model.layers.0.self_attn.q_proj.weight"].codes.group == 32
    quantize_checkpoint(source, tmp_path / "out", replace(rounding, group_size=64), None, overwrite=True, resume=True)
    assert open_checkpoint(tmp_path / "out").tensors["model.layers.0.self_attn.q_proj.weight"].codes.group == 64
    assert (tmp_path / "mine" / "letter.txt").read_text() == "precious"


def test_a_folder_in_the_way_is_nobody_elses_to_clear(source: Checkpoint, tmp_path: Path) -> None:
    """`OUT.partial` that no run of ours left keeps its files, whatever the options."""
    mine = partial_path(tmp_path / "out")
    (mine / "letters").mkdir(parents=True)
    (mine / "letter.txt").write_text("precious")
    for choice in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match=r"out\.partial, where .* holds something else; move it away"):
            quantize_checkpoint(source, tmp_path / "out", replace(OPTIONS, method="rtn"), None, **choice)
    assert (mine / "letter.txt").read_text() == "precious"
    shutil.rmtree(mine)
    mine.write_text("precious")
    with pytest.raises(UsageError, match="holds something else"):
        quantize_checkpoint(source, tmp_path / "out", replace(OPTIONS, method="rtn"), None)
    mine.unlink()
    mine.mkdir()
    (mine / "state.json.tmp").write_text("{")  # of a run that was killed at once
    quantize_checkpoint(source, tmp_path / "out", replace(OPTIONS, method="rtn"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
