"""`edge logits --exact` on random MiniCPM4 checkpoints against transformers, and every way to cut the same work."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import plugins.ort.library
from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import open_bundle
from edge.cli import main
from edge.config import LongRope, ModelConfig
from edge.engine import Engine, open_engine
from edge.errors import EdgeError, UsageError
from edge.executors.onnxruntime import OnnxRuntimeExecutor
from edge.kv_cache import KVCache
from edge.perplexity import perplexity
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.scheduler import Scheduler, Sequence
from tests.reference import folded_llama, granite, greedy_tokens, read_safetensors, reference_logits, reference_loss
from tests.synthetic import tiny_config, tiny_llama_config, write_hf_checkpoint

# The product promises 1e-3. These models show below 1e-5, and most mistakes show above 1e-2.
LIMIT = 1e-4
CHUNKS = (1, 16, 63, 64, 100, 512)
LENGTHS = (1, 5, 64, 65, 130, 300)


def long_rope(original: int, head_dim: int = 16) -> LongRope:
    half = range(head_dim // 2)
    return LongRope(tuple(1 + 0.1 * i for i in half), tuple(1 + 1.5 * i for i in half), original)


@dataclass(frozen=True)
class Case:
    """A model, how it is stored, and a length of prompt."""

    overrides: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    shards: int = 1
    length: int = 130
    config: Callable[..., ModelConfig] = tiny_config


HEADS = {"hidden_size": 96, "intermediate_size": 160}
CASES = {
    "tied": Case(length=300),
    "untied, 3 shards": Case({"tie_word_embeddings": False}, shards=3),
    "float16": Case(dtype="float16"),
    "float32": Case(dtype="float32", shards=2),
    "a llama": Case(config=tiny_llama_config),
    "G=3, d=64": Case(HEADS | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}),
    "G=4, d=32": Case(HEADS | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}),
    "G=8, d=64": Case(HEADS | {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64}),
    "G=16, d=16": Case(HEADS | {"num_attention_heads": 32, "num_key_value_heads": 2, "rope_theta": 1e6}),
    "longrope, short list": Case({"long_rope": long_rope(128), "max_position_embeddings": 128}, length=128),
    "longrope, long list": Case({"long_rope": long_rope(128), "max_position_embeddings": 512}, length=129),
    "longrope, attention factor": Case({"long_rope": long_rope(64), "max_position_embeddings": 4096}, length=60),
    "5 layers": Case({"num_hidden_layers": 5, "scale_depth": 1.1, "scale_emb": 8.0, "rms_norm_eps": 1e-6}),
}


def ids_of(config: ModelConfig, length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, config.vocab_size, length).tolist()


def logits_arguments(checkpoint: Path, folder: Path, ids: list[int], *options: str) -> list[str]:
    """`edge logits` for all of `ids`; it writes folder/logits.npy."""
    np.save(folder / "ids.npy", np.array(ids))
    files = ["--ids-file", str(folder / "ids.npy"), "--out", str(folder / "logits.npy")]
    return ["logits", str(checkpoint), *files, "--last", str(len(ids)), *options]


def run_edge(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """The real command in this process."""
    monkeypatch.setattr(sys, "argv", ["edge", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 0


@pytest.mark.parametrize("name", CASES)
def test_exact_logits_equal_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    config = case.config(**case.overrides)
    checkpoint = write_hf_checkpoint(tmp_path / "model", config, dtype=case.dtype, shards=case.shards)
    ids = ids_of(config, case.length)
    run_edge(monkeypatch, logits_arguments(checkpoint, tmp_path, ids, "--exact"))
    got = np.load(tmp_path / "logits.npy")
    assert got.shape == (len(ids), config.vocab_size)
    assert got.dtype == np.float32
    state = read_safetensors(checkpoint)
    for reference in (granite, folded_llama):
        difference = np.abs(got - reference_logits(reference(config, state), ids)).max()
        assert difference < LIMIT, f"max |edge - {reference.__name__}| = {difference:.2e}, limit {LIMIT}"


def test_the_installed_command_writes_the_same_logits(tmp_path: Path) -> None:
    config = tiny_config()
    checkpoint = write_hf_checkpoint(tmp_path / "model", config)
    ids = ids_of(config, 20)
    command = [sys.executable, "-m", "edge", *logits_arguments(checkpoint, tmp_path, ids, "--exact", "--threads", "1")]
    subprocess.run(command, check=True, capture_output=True)
    difference = np.abs(np.load(tmp_path / "logits.npy") - transformers_logits(checkpoint, config, ids)).max()
    assert difference < LIMIT, f"max |difference| = {difference:.2e}, limit {LIMIT}"


def transformers_logits(checkpoint: Path, config: ModelConfig, ids: list[int]) -> np.ndarray:
    return reference_logits(granite(config, read_safetensors(checkpoint)), ids)


# ---- the same work cut in every way: one small model with LongRoPE's lists switching in the middle of the lengths


SWITCHING = tiny_config(long_rope=long_rope(100), max_position_embeddings=512, num_attention_heads=6)


@dataclass(frozen=True)
class Model:
    """A checkpoint and its exact bundle."""

    checkpoint: Path
    bundle: Path

    def engine(self, chunk: int = 512) -> Engine:
        return open_engine(self.bundle, EngineOptions(context=512, chunk=chunk, threads=2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("parity")
    checkpoint = write_hf_checkpoint(folder / "model", SWITCHING)
    options = ExportOptions(weights=WeightFormat("exact"))
    return Model(checkpoint, export_bundle(open_checkpoint(checkpoint), folder / "bundle", options))


@pytest.fixture(scope="module")
def whole(model: Model) -> dict[int, np.ndarray]:
    """Transformers' logits by prompt length."""
    reference = granite(SWITCHING, read_safetensors(model.checkpoint))
    return {length: reference_logits(reference, ids_of(SWITCHING, length)) for length in LENGTHS}


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_of_any_size_give_the_same_logits(chunk: int, model: Model, whole: dict[int, np.ndarray]) -> None:
    engine = model.engine(chunk)
    for length in LENGTHS:
        ids = ids_of(SWITCHING, length)
        error = relative(engine.logits(ids, length), whole[length])
        assert error <= 1e-5, f"{length} tokens in chunks of {chunk}: relative difference {error:.2e}"
        part = engine.logits(ids, min(3, length))
        assert relative(part, whole[length][-3:]) <= 1e-5
    assert engine.cache.free_pages == engine.cache.num_pages


def test_decoding_token_by_token_equals_prefill(model: Model) -> None:
    """Up to LongRoPE's original length: past it, cached keys keep the short list they were rotated with."""
    ids = ids_of(SWITCHING, 100)
    wanted = transformers_logits(model.checkpoint, SWITCHING, ids)
    engine = model.engine()
    sequence = Sequence(engine.cache.open(), ids[:63], prompt_length=63)
    for position in range(62, 100):
        assert relative(engine.advance(sequence), wanted[position]) <= 1e-5, f"position {position}"
        sequence.tokens += ids[position + 1 : position + 2]


def test_greedy_generation_equals_transformers(model: Model) -> None:
    prompt = ids_of(SWITCHING, 60)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    got = [event.token_id for event in model.engine(chunk=16).generate(prompt, params)]
    assert got == greedy_tokens(granite(SWITCHING, read_safetensors(model.checkpoint)), prompt, 40)


def test_a_second_turn_computes_only_what_is_new(model: Model) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine = model.engine(chunk=4)
    session = engine.open_session()
    first, other = ids_of(SWITCHING, 45), ids_of(SWITCHING, 40)
    reply = [event.token_id for event in session.generate(first, params)]
    progress: list[int] = []
    # The second turn goes on (the last token of a reply is not in the cache yet); the third takes another way.
    for prompt, shared in (([*first, *reply, 7, 8, 9], 45 + 19), ([*first[:30], *other], 30)):
        progress.clear()
        got = [event.token_id for event in session.generate(prompt, params, lambda done, _: progress.append(done))]
        assert got == [event.token_id for event in engine.generate(prompt, params)]
        assert progress[0] == min(shared + 4, len(prompt))
    session.close()
    assert engine.cache.free_pages == engine.cache.num_pages


def test_sequences_of_one_step_do_not_see_each_other(model: Model) -> None:
    """Prompts and decodes of six sequences share every step; each must get what it gets alone."""
    prompts, lengths = [1, 64, 65, 130, 99, 120], [30, 70, 65, 140, 100, 125]
    texts = [ids_of(SWITCHING, length) for length in lengths]
    cache = KVCache(24)
    executor = OnnxRuntimeExecutor(open_bundle(model.bundle), cache.num_pages, threads=2)
    scheduler = Scheduler(cache, chunk=90)
    sequences = [Sequence(cache.open(), ids[:n], 0, n, 0) for ids, n in zip(texts, prompts, strict=True)]
    rows: dict[int, list[np.ndarray]] = {sequence.cache_id: [] for sequence in sequences}
    most_shared = 0
    while step := scheduler.next_step(sequences):
        start, logits = 0, executor.step(step.batch).logits
        for sequence, count, wanted in zip(step.sequences, step.counts, step.logits_counts, strict=True):
            sequence.computed += count
            rows[sequence.cache_id].append(logits[start : start + wanted])
            start += wanted
        for sequence, ids in zip(sequences, texts, strict=True):
            if not sequence.pending:
                sequence.tokens += ids[sequence.computed : sequence.computed + 1]
        most_shared = max(most_shared, len(step.sequences))
    assert most_shared >= 4
    reference = granite(SWITCHING, read_safetensors(model.checkpoint))
    for sequence, ids in zip(sequences, texts, strict=True):
        error = relative(np.concatenate(rows[sequence.cache_id]), reference_logits(reference, ids))
        assert error <= 1e-5, f"the sequence of {len(ids)} tokens differs by {error:.2e}"


def test_functions_replace_missing_kernels(
    model: Model, whole: dict[int, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins.ort.library, "find_library", lambda: None)
    engine = model.engine(chunk=100)
    assert "functions" in engine.describe()["kernels"]
    for length in (5, 130):
        assert relative(engine.logits(ids_of(SWITCHING, length), length), whole[length]) <= 1e-5


@pytest.mark.parametrize(("tokens", "window"), [(90, 90), (91, 90), (300, 70), (2, 2)])
def test_perplexity_equals_transformers_loss(tokens: int, window: int, model: Model) -> None:
    ids = ids_of(SWITCHING, tokens)
    reference = granite(SWITCHING, read_safetensors(model.checkpoint))
    windows = [part for start in range(0, tokens, window) if len(part := ids[start : start + window]) > 1]
    total = sum(reference_loss(reference, part) * (len(part) - 1) for part in windows)
    wanted = math.exp(total / sum(len(part) - 1 for part in windows))
    assert perplexity(model.engine(chunk=32), ids, window) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("tokens", "window"), [(1, 64), (0, 64), (50, 1)])
def test_perplexity_needs_a_token_to_predict(tokens: int, window: int, model: Model) -> None:
    with pytest.raises(UsageError, match="2 tokens or more"):
        perplexity(model.engine(), [5] * tokens, window)


@pytest.mark.parametrize("head_dim", [8, 24, 1040])
def test_head_sizes_without_a_kernel_are_refused(head_dim: int, tmp_path: Path) -> None:
    config = tiny_config(head_dim=head_dim, num_attention_heads=1, num_key_value_heads=1)
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "model", config))
    with pytest.raises(EdgeError, match=f"head_dim is {head_dim}"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
