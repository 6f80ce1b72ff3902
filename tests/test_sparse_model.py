"""Sparse attention in a whole model: every cut of the same work, the switch, sessions, overrides, and the export."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import plugins.ort.library
from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat, make_target
from build_engine.long_context import LongContext
from edge.bundle import open_bundle
from edge.config import LongRope, SparseConfig
from edge.engine import Engine, open_engine
from edge.errors import UsageError
from edge.memory.fit import make_plan
from edge.memory.ledger import page_bytes
from edge.plan import ALWAYS_DENSE, EngineOptions
from edge.sampler import SamplingParams
from edge.scheduler import Sequence
from tests.reference import granite, read_safetensors, reference_logits
from tests.synthetic import tiny_config, write_hf_checkpoint

# 5 of up to 16 blocks; G = 2, two KV heads that choose for themselves.
SPARSE = SparseConfig(topk=3, window_size=128, dense_len=-1)
CONFIG = tiny_config(sparse=SPARSE, max_position_embeddings=1024, num_attention_heads=4, num_key_value_heads=2)
LENGTH = 900
CHUNKS = (1, 16, 63, 64, 100, 2048)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@dataclass(frozen=True)
class Model:
    """A checkpoint and its exact bundle."""

    checkpoint: Path
    bundle: Path

    def engine(self, chunk: int = 512, attention: str = "model", **sparse: int) -> Engine:
        options = EngineOptions(context=1024, chunk=chunk, threads=2, attention=attention, sparse=sparse)
        return open_engine(self.bundle, options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("sparse")
    checkpoint = write_hf_checkpoint(folder / "model", CONFIG)
    options = ExportOptions(weights=WeightFormat("exact"))
    return Model(checkpoint, export_bundle(open_checkpoint(checkpoint), folder / "bundle", options))


def ids_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()


@pytest.fixture(scope="module")
def whole(model: Model) -> np.ndarray:
    """Sparse logits of all positions, computed at once."""
    return model.engine(chunk=LENGTH).logits(ids_of(LENGTH), LENGTH)


@pytest.fixture(scope="module")
def dense(model: Model) -> np.ndarray:
    """Transformers' dense logits."""
    return reference_logits(granite(CONFIG, read_safetensors(model.checkpoint)), ids_of(LENGTH))


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def test_tokens_that_see_few_blocks_are_dense_and_later_ones_are_not(whole: np.ndarray, dense: np.ndarray) -> None:
    seen = SPARSE.selected_blocks * 64
    assert relative(whole[:seen], dense[:seen]) <= 1e-5
    assert relative(whole[seen:], dense[seen:]) >= 1e-3


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_of_any_size_give_the_same_logits(chunk: int, model: Model, whole: np.ndarray) -> None:
    assert relative(model.engine(chunk).logits(ids_of(LENGTH), LENGTH), whole) <= 1e-5


def test_decoding_token_by_token_equals_prefill(model: Model, whole: np.ndarray) -> None:
    engine = model.engine()
    ids = ids_of(LENGTH)
    sequence = Sequence(engine.cache.open(), ids[:1], prompt_length=1)
    for position in range(LENGTH):
        assert relative(engine.advance(sequence), whole[position]) <= 1e-5, f"position {position}"
        sequence.tokens += ids[position + 1 : position + 2]


def test_the_onnx_function_gives_the_same_logits(
    model: Model, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins.ort.library, "find_library", lambda: None)
    engine = model.engine(chunk=250)
    assert relative(engine.logits(ids_of(LENGTH), LENGTH), whole) <= 1e-5
    sequence = Sequence(engine.cache.open(), ids_of(LENGTH)[:-3], prompt_length=LENGTH - 3)
    for position in range(LENGTH - 4, LENGTH):
        assert relative(engine.advance(sequence), whole[position]) <= 1e-5
        sequence.tokens += ids_of(LENGTH)[position + 1 : position + 2]


@pytest.mark.parametrize("chunk", [64, 100, 2048])
@pytest.mark.parametrize(
    ("dense_len", "is_sparse"), [(LENGTH - 1, True), (LENGTH, True), (LENGTH + 1, False), (0, True)]
)
def test_the_prompts_length_decides_for_all_its_chunks(
    dense_len: int, is_sparse: bool, chunk: int, model: Model, whole: np.ndarray, dense: np.ndarray
) -> None:
    got = model.engine(chunk, dense_len=dense_len).logits(ids_of(LENGTH), LENGTH)
    assert relative(got, whole if is_sparse else dense) <= 1e-5


def test_attention_dense_is_dense(model: Model, dense: np.ndarray) -> None:
    engine = model.engine(attention="dense")
    assert engine.plan.sparse == replace(SPARSE, dense_len=ALWAYS_DENSE)
    assert engine.describe()["attention"] == "dense"
    assert model.engine().describe()["attention"] == "sparse, 5 blocks, from 0 tokens on"
    assert relative(engine.logits(ids_of(LENGTH), LENGTH), dense) <= 1e-5


def test_settings_can_be_changed_for_a_run(model: Model, whole: np.ndarray, dense: np.ndarray) -> None:
    assert relative(model.engine(topk=14).logits(ids_of(LENGTH), LENGTH), dense) <= 1e-5
    assert relative(model.engine(topk=5, window_size=0).logits(ids_of(LENGTH), LENGTH), whole) >= 1e-3


def test_a_reply_switches_when_its_context_reaches_dense_len(model: Model) -> None:
    """Each token of a reply is computed as its own context's length says."""
    prompt = ids_of(500)
    engine = model.engine(dense_len=506)
    tokens = [event.token_id for event in engine.generate(prompt, GREEDY)]
    sequence = Sequence(engine.cache.open(), list(prompt), prompt_length=len(prompt))
    pure = {kind: model.engine(attention=kind) for kind in ("dense", "sparse")}
    for token in tokens:
        assert int(engine.advance(sequence).argmax()) == token
        sequence.tokens.append(token)
    # The first token whose context has 506 tokens is the 7th; up to it all is dense.
    dense_logits = pure["dense"].logits([*prompt, *tokens[:6]], 7)
    assert [int(row.argmax()) for row in dense_logits[:6]] == tokens[:6]


@pytest.mark.parametrize(
    ("first", "second", "dense_len", "kept"),
    [
        (500, 600, -1, 511),  # sparse before and after: all but the reply's last token
        (500, 520, 700, 511),  # dense before and after
        (500, 800, 700, 320),  # dense, then sparse: what the selection cannot change
        (800, 400, 700, 320),  # sparse, then dense: the same
        (695, 900, 700, 320),  # the reply itself crossed the limit
        (300, 900, 700, 311),
    ],
)
def test_a_second_turn_keeps_what_it_would_compute_alike(
    first: int, second: int, dense_len: int, kept: int, model: Model
) -> None:
    engine = model.engine(chunk=64, dense_len=dense_len)
    session = engine.open_session()
    ids = ids_of(first)
    reply = [event.token_id for event in session.generate(ids, GREEDY)]
    prompt = [*ids, *reply, *ids_of(900, seed=1)][:second]
    progress: list[int] = []
    got = [event.token_id for event in session.generate(prompt, GREEDY, lambda done, _: progress.append(done))]
    assert got == [event.token_id for event in model.engine(dense_len=dense_len).generate(prompt, GREEDY)]
    assert progress[0] == min(kept + 64, second)


def test_the_plan_counts_compressed_keys(model: Model) -> None:
    bundle = open_bundle(model.bundle)
    c = bundle.config
    assert sum(
        page_bytes(c, {"activation": "float32", "kv": "float32"})
    ) == c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4 * (2 * 64 + 4 + 1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (EngineOptions(attention="flash"), "unknown attention 'flash'"),
        (EngineOptions(sparse={"kernel_size": 64}), "cannot set kernel_size here"),
        (EngineOptions(sparse={"top": 1}), "cannot set top"),
        (EngineOptions(sparse={"topk": 1}), "topk 1 must exceed init_blocks 1"),
        (EngineOptions(sparse={"window_size": 100}), "window_size 100 must be a multiple of block_size 64"),
    ],
)
def test_unusable_settings_are_refused(options: EngineOptions, problem: str, model: Model) -> None:
    with pytest.raises(UsageError, match=problem):
        make_plan(open_bundle(model.bundle), options)


# ---- the export's choices


ORIGINAL = LongRope((1.0,) * 64, (1.0,) * 64, 32768)


def export(tmp_path: Path, long_context: LongContext, **overrides: object) -> Path:
    checkpoint = write_hf_checkpoint(tmp_path / "model", tiny_config(**overrides))
    options = ExportOptions(weights=WeightFormat("exact"), long_context=long_context)
    return export_bundle(open_checkpoint(checkpoint), tmp_path / "bundle", options)


def test_any_checkpoint_can_be_exported_sparse(tmp_path: Path) -> None:
    bundle = open_bundle(export(tmp_path, LongContext("sparse", {"topk": 16, "window_size": 512})))
    assert bundle.config.sparse == SparseConfig(topk=16, window_size=512)


def test_a_sparse_checkpoint_can_be_exported_dense(tmp_path: Path) -> None:
    path = export(tmp_path, LongContext("dense"), sparse=SPARSE)
    assert open_bundle(path).config.sparse is None
    with pytest.raises(UsageError, match="export its checkpoint with --attention sparse"):
        open_engine(path, EngineOptions(attention="sparse"))


@pytest.mark.parametrize(("original", "second"), [(32768, 1.014658295992452), (65536, 1.033048153422584)])
def test_rope_128k_replaces_both_lists_and_nothing_else(original: int, second: float, tmp_path: Path) -> None:
    rope = replace(ORIGINAL, original_max_position_embeddings=original)
    shape = {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": original}
    bundle = open_bundle(export(tmp_path, LongContext(rope="128k"), long_rope=rope, **shape))
    new = bundle.config.long_rope
    assert new is not None
    assert new.short_factor == new.long_factor
    assert new.short_factor[1] == second
    assert new.original_max_position_embeddings == bundle.config.max_position_embeddings == original
    assert bundle.config.rope_attention_factor == 1.0
    assert bundle.manifest.limits["max_context"] == 131072
    assert math.isclose(new.short_factor[-1], 124.09569231686116 if original == 32768 else 126.01712561287873)


@pytest.mark.parametrize(
    ("long_context", "problem"),
    [
        (LongContext(rope="128k"), "published for MiniCPM4-8B and MiniCPM4.1-8B"),
        (LongContext(rope="1m"), "unknown --rope '1m'"),
        (LongContext(attention="flash"), "unknown --attention 'flash'"),
        (LongContext(sparse={"topk": 16}), "add --attention sparse"),
        (LongContext("sparse", {"top": 16}), "cannot set top"),
        (LongContext("sparse", {"kernel_size": 64}), "kernel_size is 64, but the kernels are made for 32"),
    ],
)
def test_unusable_export_options_are_refused(long_context: LongContext, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=problem):
        export(tmp_path, long_context)
    assert not (tmp_path / "bundle").exists()


# ---- the type of the cache


@pytest.mark.parametrize("sparse", [None, SPARSE])
def test_a_bfloat16_cache_works_with_and_without_kernels(
    sparse: SparseConfig | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "model", replace(CONFIG, sparse=sparse, head_dim=32)))
    options = {kv: ExportOptions(weights=WeightFormat("exact"), kv=kv) for kv in ("float32", "bfloat16")}
    bundles = {kv: export_bundle(checkpoint, tmp_path / kv, options[kv]) for kv in options}
    ids = ids_of(200)
    wanted = open_engine(bundles["float32"], EngineOptions(context=256)).logits(ids, 200)
    engine = open_engine(bundles["bfloat16"], EngineOptions(context=256))
    assert engine.plan.kv * 2 == open_engine(bundles["float32"], EngineOptions(context=256)).plan.kv
    assert 0 < relative(engine.logits(ids, 200), wanted) <= 2e-2
    monkeypatch.setattr(plugins.ort.library, "find_library", lambda: None)
    function = open_engine(bundles["bfloat16"], EngineOptions(context=256))
    assert 0 < relative(function.logits(ids, 200), wanted) <= 2e-2


@pytest.mark.parametrize(
    ("target", "kv", "problem"),
    [
        ("onnxruntime", "int4", "unknown --kv 'int4'"),
        ("rtx", "bfloat16", "--target rtx stores keys and values as float16"),
    ],
)
def test_unknown_cache_types_are_refused(target: str, kv: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        make_target(target, WeightFormat("exact"), kv)
