"""Ragged steps through a bundle's graph in ONNX Runtime, every `edge` operator as its function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge.bundle import GRAPH, open_bundle
from edge.executor import StepBatch
from edge.kv_cache import KVCache
from edge.scheduler import Scheduler, Sequence


def ragged_steps(vocab_size: int, prompts: tuple[int, ...]) -> tuple[list[StepBatch], int]:
    """Prompts of these lengths prefilled in chunks, then three tokens decoded; and the pool's size in pages."""
    rng = np.random.default_rng(7)
    cache = KVCache(sum(-(-(length + 3) // 64) for length in prompts))
    scheduler = Scheduler(cache, chunk=48)
    sequences = []
    for length in prompts:
        tokens = [int(token) for token in rng.integers(0, vocab_size, length)]
        sequences.append(Sequence(cache.open(), tokens, prompt_length=length, logits_from=0))
    steps = []
    for extra in range(3):
        while (step := scheduler.next_step(sequences)) is not None:
            steps.append(step.batch)
            for sequence, count in zip(step.sequences, step.counts, strict=True):
                sequence.computed += count
        for sequence in sequences:
            sequence.tokens.append(5 + extra)
    return steps, cache.num_pages


def run_steps(bundle: Path, steps: list[StepBatch], num_pages: int) -> list[dict[str, np.ndarray]]:
    """{output: value} of each step without the pools, which start empty."""
    manifest = open_bundle(bundle).manifest
    session = ort.InferenceSession(bundle / GRAPH, providers=["CPUExecutionProvider"])
    pools = {
        value.name: np.zeros((num_pages, *value.shape[1:]), manifest.types["kv"])
        for value in session.get_inputs()
        if "_pool." in value.name
    }
    outputs = [value.name for value in session.get_outputs()]
    names = [value.name for value in session.get_inputs() if value.name not in pools]
    results = []
    for step in steps:
        feeds = {name: settings(bundle) if name == "sparse_settings" else step.inputs()[name] for name in names}
        values = dict(zip(outputs, session.run(None, feeds | pools), strict=True))
        pools = {name: values.pop(name.replace("_pool.", "_pool_out.")) for name in pools}
        results.append(values)
    return results


def settings(bundle: Path) -> np.ndarray:
    """The input sparse_settings as the model's configuration has it."""
    sparse = open_bundle(bundle).manifest.model.sparse
    assert sparse is not None
    return np.array([sparse.dense_len, sparse.init_blocks, sparse.local_blocks, sparse.selected_blocks], np.int32)
