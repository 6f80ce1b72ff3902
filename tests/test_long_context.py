"""131072 tokens end to end on this machine: a small model, prompt and reply, through the product (`make test-long`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.long_context import LongContext
from edge.engine import open_engine
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from tests.synthetic import tiny_config, write_hf_checkpoint

LENGTH = 131072
REPLY = 8


@pytest.mark.long
def test_131072_tokens_of_context(tmp_path: Path) -> None:
    """The default settings: 96 of 2048 blocks. The reply's tokens are those that a prompt of their length predicts."""
    config = tiny_config(max_position_embeddings=32768, head_dim=32)
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "model", config))
    options = ExportOptions(weights=WeightFormat("exact"), long_context=LongContext("sparse"))
    bundle = export_bundle(checkpoint, tmp_path / "bundle", options)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, LENGTH - REPLY).tolist()

    engine = open_engine(bundle, EngineOptions(context=LENGTH, chunk=2048))
    params = SamplingParams(temperature=0, max_tokens=REPLY, ignore_eos=True)
    reply = [event.token_id for event in engine.generate(prompt, params)]
    assert len(prompt) + len(reply) == engine.max_context == LENGTH
    engine = open_engine(bundle, EngineOptions(context=LENGTH, chunk=1000))
    assert engine.logits([*prompt, *reply], REPLY + 1)[:-1].argmax(axis=1).tolist() == reply
