"""Calibration text as sequences of tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from build_engine.checkpoint import Checkpoint
from build_engine.quantizer import calibrate
from build_engine.quantizer.calibrate import calibration_sequences
from build_engine.quantizer.run import quantize_checkpoint
from edge.errors import UsageError
from tests.quantizer_samples import OPTIONS, layered_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return layered_checkpoint(tmp_path_factory.mktemp("quantizer"))


def test_sequences_cover_the_text_and_begin_like_prompts(source: Checkpoint) -> None:
    text = "".join(f"word{i} " for i in range(2000))
    ids = calibration_sequences(source, text, samples=10**6, length=33)
    assert ids.shape[1] == 33
    assert (ids[:, 0] == source.config.bos_token_id).all()
    few = calibration_sequences(source, text, samples=5, length=33)
    places = [int(np.flatnonzero((ids == sequence).all(axis=1))[0]) for sequence in few]
    assert places == [len(ids) * i // 5 for i in range(5)]
    short = calibration_sequences(source, "the fox", samples=4, length=512)
    assert short.shape[0] == 1
    assert 2 < short.shape[1] < 10
    with pytest.raises(UsageError, match="holds no tokens"):
        calibration_sequences(source, "", samples=4, length=512)
    with pytest.raises(UsageError, match=r"has no tokenizer .* --method rtn"):
        calibration_sequences(replace(source, text=None), text, samples=4, length=512)


def test_a_long_text_is_read_in_excerpts(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many sequences from all over it as of a text that is tokenised whole."""
    text = "".join(f"word{i} " for i in range(40_000))
    whole = calibration_sequences(source, text, samples=8, length=33)
    monkeypatch.setattr(calibrate, "_WHOLE", 1000)
    parts = calibrate._excerpts(text, 8, 528)
    assert [len(part) for part in parts] == [528] * 8
    starts = [text.index(part) for part in parts]
    assert starts[0] == 0 and starts[-1] == len(text) - 528 and min(np.diff(starts)) > 10_000
    assert calibration_sequences(source, text, samples=8, length=33).shape == whole.shape == (8, 33)


def test_sequences_stay_within_the_models_positions(source: Checkpoint) -> None:
    text, most = "the fox " * 2000, source.config.max_position_embeddings
    assert calibration_sequences(source, text, samples=2, length=most).shape == (2, most)
    with pytest.raises(UsageError, match=rf"--length {most + 1} is beyond the {most} positions"):
        calibration_sequences(source, text, samples=2, length=most + 1)


def test_a_text_shorter_than_what_is_skipped_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    ids = calibration_sequences(source, "the", samples=4, length=512)
    with pytest.raises(UsageError, match="leave nothing after the 4 of --skip-tokens"):
        quantize_checkpoint(source, tmp_path / "out", OPTIONS, ids)
