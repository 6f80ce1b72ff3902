"""Small checkpoints and calibration texts for the tests of `edge quantize`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from build_engine.checkpoint import Checkpoint, open_checkpoint
from build_engine.quantizer import gptq, write
from build_engine.quantizer.calibrate import SAMPLE, calibration_sequences
from build_engine.quantizer.run import QuantizeOptions
from edge.config import LongRope
from tests.synthetic import tiny_config, write_hf_checkpoint

OPTIONS = QuantizeOptions(group_size=32)


def activations(rng: np.random.Generator, tokens: int, inputs: int) -> np.ndarray:
    """Inputs that depend on one another and differ in size, as real ones do."""
    mixing = rng.standard_normal((inputs, inputs)) * rng.uniform(0.1, 2, inputs)
    return (rng.standard_normal((tokens, inputs)) @ mixing / np.sqrt(inputs)).astype(np.float32)


def fitted(weight: np.ndarray, scales: np.ndarray, hessian: np.ndarray) -> gptq.Int4Matrix:
    """GPTQ with the damping that `edge quantize` has unless told otherwise."""
    order = gptq.input_order(hessian)
    return gptq.gptq(weight, scales, gptq.inverse_factor("w", hessian, order, 0.01), order)


def long_rope(original: int) -> LongRope:
    """Factors of a small head; the long list begins to count beyond `original` positions."""
    return LongRope(tuple(1 + 0.1 * i for i in range(8)), tuple(1 + 1.5 * i for i in range(8)), original)


def shards(folder: Path) -> dict[str, bytes]:
    """All files of a result but its report, which has times in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != write.REPORT}


def layered_checkpoint(folder: Path) -> Checkpoint:
    """Three layers, with a tokenizer and LongRoPE."""
    config = tiny_config(num_hidden_layers=3, long_rope=long_rope(64), max_position_embeddings=256)
    return open_checkpoint(write_hf_checkpoint(folder / "checkpoint", config, tokenizer=True))


def sample_sequences(checkpoint: Checkpoint) -> np.ndarray:
    """Six sequences [6, 48] of the calibration text that is used unless another is given."""
    return calibration_sequences(checkpoint, SAMPLE.read_text(encoding="utf-8"), samples=6, length=48)
