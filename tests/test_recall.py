"""What sparse attention costs in accuracy, measured: the model of tests/recall, trained with the selection in the loop.

Every answer depends on the block of one needle, so a wrong selection shows. All through `edge eval`, as a user runs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.config import SparseConfig
from edge.engine import open_engine
from edge.plan import EngineOptions
from tests.command import edge
from tests.recall import task
from tests.recall.checkpoint import load_checkpoint
from tests.recall.model import Attention, dense_attention, forward, sparse_attention

MODEL = Path(__file__).parent / "recall" / "model"
QUESTIONS = 224  # 7 texts of 32 needles, all asked for
# Sparse from the first token on: a prompt of 8192 tokens less its reply is shorter than the default dense_len.
DEFAULT_BUDGET = "dense_len=-1"
SMALL_BUDGET = "dense_len=-1,topk=16,window_size=512"
TINY_BUDGET = "dense_len=-1,topk=2,window_size=64"
Score = Callable[..., float]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    return export_bundle(open_checkpoint(MODEL), folder / "bundle", ExportOptions(weights=WeightFormat("exact")))


@pytest.fixture(scope="module")
def score(bundle: Path) -> Score:
    """score(length, options...): percent of the value words that greedy replies have right."""

    @cache
    def measure(length: int, *options: str) -> float:
        workload = ["--tasks", "niah_single", "--lengths", str(length), "--samples", str(QUESTIONS)]
        result = edge(
            "eval", bundle, *workload, "--questions-per-haystack", "32", "--chunk", "1024", "--json", *options
        )
        assert result.returncode == 0, result.stderr.decode()
        (row,) = json.loads(result.stdout)["results"]
        assert row["questions"] == QUESTIONS
        return float(row["score"])

    return measure


@pytest.mark.parametrize(
    ("length", "share"), [(8192, 0.99), (16384, 0.95), pytest.param(32768, 0.90, marks=pytest.mark.long)]
)
def test_sparse_attention_recalls_what_dense_attention_does(length: int, share: float, score: Score) -> None:
    dense = score(length, "--attention", "dense")
    assert dense >= 0.95
    assert score(length, "--sparse", DEFAULT_BUDGET) >= share * dense


def test_a_quarter_of_the_budget_is_enough_at_8k(score: Score) -> None:
    assert score(8192, "--sparse", SMALL_BUDGET) >= 0.99 * score(8192, "--attention", "dense")


def test_too_small_a_budget_shows(score: Score) -> None:
    """The measure can fail: with one block to choose besides the first and the last two, many needles are lost."""
    assert score(8192, "--sparse", TINY_BUDGET) <= 0.9


@pytest.mark.parametrize(
    ("attention", "settings"),
    [("dense", SparseConfig()), ("sparse", SparseConfig(topk=4, window_size=128, dense_len=-1))],
)
def test_logits_equal_an_independent_torch_implementation(attention: str, settings: SparseConfig, bundle: Path) -> None:
    config, weights = load_checkpoint(MODEL)
    ids = task.haystack(np.random.default_rng(0), 2000, 32).ids
    positions, rows = torch.arange(len(ids))[None], torch.arange(len(ids) - 200, len(ids))[None]
    kind: Attention = dense_attention if attention == "dense" else sparse_attention(settings)
    with torch.inference_mode():
        wanted = forward(weights, config, torch.from_numpy(ids)[None], positions, rows, kind)[0].numpy()
    changes = {"topk": settings.topk, "window_size": settings.window_size, "dense_len": settings.dense_len}
    engine = open_engine(bundle, EngineOptions(context=2048, attention=attention, sparse=changes))
    np.testing.assert_allclose(engine.logits(ids.tolist(), 200), wanted, rtol=0, atol=2e-4)
