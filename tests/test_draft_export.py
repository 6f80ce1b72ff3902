"""`edge export --draft`: what both models use is stored once, and a bundle without a draft is what it always was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from build_engine.checkpoint import Checkpoint, open_checkpoint
from build_engine.draft_export import choose_draft
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import DRAFT_GRAPH, DRAFT_VOCAB, GRAPH, MANIFEST, WEIGHTS, Bundle, Manifest, open_bundle
from edge.config import SparseConfig
from edge.engine import open_engine
from edge.errors import EdgeError, UsageError
from edge.executor import StepBatch
from edge.executors.draft import OnnxRuntimeDraft
from edge.executors.onnxruntime import OnnxRuntimeExecutor
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.speculation.draft import DraftBatch
from tests.command import edge
from tests.draft_samples import draft_config, draft_weights, write_draft
from tests.ledger_run import Always, paced
from tests.reference import granite, read_safetensors, reference_logits
from tests.synthetic import tiny_config, write_hf_checkpoint

IDS = np.array([7, 300, 2, 4, 31, 0, 150], np.int32)
FORMATS = {
    "exact": WeightFormat("exact"),
    "int4": WeightFormat("w4a16", 64, True, "int8"),
    "int4, exact head": WeightFormat("w4a16", 64, True, "exact"),
    "int8 embedding": WeightFormat("w4a16", 64, True, "int8", embedding="int8"),
}


def make(folder: Path, **base: Any) -> tuple[Checkpoint, Path]:
    """A base and the folder of its draft."""
    config = tiny_config(**base)
    write_hf_checkpoint(folder / "base", config, dtype="float32", tokenizer=True)
    draft = draft_config(config, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    write_draft(folder / "draft", draft, draft_weights(draft))
    return open_checkpoint(folder / "base"), folder / "draft"


def export(
    folder: Path,
    base: Checkpoint,
    draft: Path | None,
    weights: WeightFormat,
    ids: np.ndarray | None = None,
    **wishes: Any,
) -> Bundle:
    chosen = None if draft is None else choose_draft(draft, base, weights, "onnxruntime", ids, **wishes)
    return open_bundle(export_bundle(base, folder, ExportOptions(weights=weights, draft=chosen)))


def initializers(bundle: Bundle, graph: str) -> dict[str, tuple[int, int]]:
    """{name: (offset, length)} of the tensors that a graph has in the bundle's weights."""
    model = onnx.load(bundle.file(graph), load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert entries["location"] == WEIGHTS
            found[tensor.name] = (int(entries["offset"]), int(entries["length"]))
    return found


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "pruned"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_both_use_is_stored_once(name: str, ids: np.ndarray | None, tied: bool, tmp_path: Path) -> None:
    base, draft = make(tmp_path, tie_word_embeddings=tied)
    bundle = export(tmp_path / "bundle", base, draft, FORMATS[name], ids)
    ours, theirs = initializers(bundle, GRAPH), initializers(bundle, DRAFT_GRAPH)
    shared = {place for place in theirs.values() if place in ours.values()}
    table = {place for tensor, place in ours.items() if tensor.startswith("model.embed_tokens")}
    assert table <= shared
    head = {p for tensor, p in ours.items() if tensor.startswith(("logits.", "lm_head"))}
    assert shared == (table | head if ids is None else table)
    # All other tensors lie one after the other: nothing in the file is of no graph.
    ends = sorted({*ours.values(), *theirs.values()})
    assert all(a + length <= b for (a, length), (b, _) in pairwise(ends))
    assert sum(length for _, length in ends) > bundle.manifest.files[WEIGHTS].bytes - 4096 * len(ends)
    rows = 320 if ids is None else len(ids)
    result = OnnxRuntimeDraft(bundle, 4, 2).step(step_of(np.zeros((3, 64), np.float32)))
    assert result.logits.shape == (3, rows) and np.isfinite(result.logits).all() and result.logits.std() > 0


def step_of(hidden: np.ndarray) -> DraftBatch:
    count = len(hidden)
    one = np.zeros((1, 1), np.int32)
    ids, start = np.arange(3, 3 + count, dtype=np.int32), np.array([0, count], np.int32)
    places = np.arange(count, dtype=np.int32)
    return DraftBatch(ids, hidden, places, start, one, places, np.array([count], np.int32))


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "pruned"])
def test_formats_agree_with_exact_weights(ids: np.ndarray | None, tmp_path: Path) -> None:
    """int4 and int8 rounding is all that is between them, so that their largest logits mostly agree."""
    base, draft = make(tmp_path)
    hidden = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    results = {}
    for name, weights in FORMATS.items():
        bundle = export(tmp_path / name, base, draft, weights, ids)
        results[name] = OnnxRuntimeDraft(bundle, 4, 2).step(step_of(hidden))
    for name, error in (("int4", 0.35), ("int4, exact head", 0.35), ("int8 embedding", 0.35)):
        difference = results[name].hidden - results["exact"].hidden
        assert 0 < np.abs(difference).mean() < error * np.abs(results["exact"].hidden).mean(), name
    heads = [results[name].logits for name in ("int4", "int4, exact head")]
    assert np.abs(heads[0] - heads[1]).max() < 0.03 * np.abs(heads[1]).max()


def test_the_head_may_be_cheaper(tmp_path: Path) -> None:
    base, draft = make(tmp_path)
    sizes = {}
    for head in ("exact", "int8", "int4"):
        bundle = export(tmp_path / head, base, draft, FORMATS["int4"], IDS, head=head)
        section = bundle.manifest.draft
        assert section is not None and section.weights["head"] == head
        named = {n: length for n, (_, length) in initializers(bundle, DRAFT_GRAPH).items()}
        sizes[head] = sum(length for n, length in named.items() if n.startswith("draft."))
    assert sizes["int4"] < sizes["int8"] < sizes["exact"] == 2 * 16 * 64  # a whole tile of float16


def test_a_bundle_without_a_draft_is_what_it_was(tmp_path: Path) -> None:
    """Its manifest says nothing of drafts, its graph gives no hidden states, and its weights are the same bytes."""
    base, draft = make(tmp_path)
    plain = export(tmp_path / "plain", base, None, FORMATS["int4"])
    drafted = export(tmp_path / "drafted", base, draft, FORMATS["int4"], IDS)
    assert "draft" not in json.loads((plain.path / MANIFEST).read_text())
    outputs = [
        {value.name for value in onnx.load(bundle.file(GRAPH), load_external_data=False).graph.output}
        for bundle in (plain, drafted)
    ]
    assert outputs[1] - outputs[0] == {"hidden"} and not outputs[0] - outputs[1]
    assert initializers(plain, GRAPH) == initializers(drafted, GRAPH)
    mine, theirs = (bundle.file(WEIGHTS).read_bytes() for bundle in (plain, drafted))
    assert theirs.startswith(mine) and len(theirs) > len(mine)


def test_the_manifest_comes_back(tmp_path: Path) -> None:
    base, draft = make(tmp_path)
    bundle = export(tmp_path / "bundle", base, draft, FORMATS["int4"], IDS, window=192, logit_scale=0.25)
    section = bundle.manifest.draft
    assert section is not None and section.name == "draft"
    assert (section.model.vocab_size, section.model.window, section.model.logit_scale) == (len(IDS), 3, 0.25)
    assert section.tree == {"depth": 2, "top_k": 10, "size": 12}
    assert section.weights["description"].startswith("w4a16 g64 symmetric, int8 head, 4.50 bits a weight")
    assert section.weights["description"].endswith(f"{len(IDS)} tokens")
    assert np.array_equal(np.load(bundle.file(DRAFT_VOCAB)), IDS)
    assert Manifest.from_json(bundle.manifest.to_json()) == bundle.manifest
    other = export(tmp_path / "other", base, draft, FORMATS["int4"], IDS[::-1].copy(), window=192, logit_scale=0.25)
    assert other.manifest.key != bundle.manifest.key


@pytest.mark.parametrize("file", [DRAFT_GRAPH, DRAFT_VOCAB])
def test_missing_and_damaged_parts_are_named(file: str, tmp_path: Path) -> None:
    base, draft = make(tmp_path)
    bundle = export(tmp_path / "bundle", base, draft, FORMATS["int4"], IDS)
    data = bundle.file(file).read_bytes()
    bundle.file(file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(EdgeError, match=f"{file} is damaged"):
        open_bundle(bundle.path)
    with pytest.raises(ValueError, match="unusable draft"):
        files = {name: entry for name, entry in bundle.manifest.files.items() if name != file}
        Manifest.from_json(replace(bundle.manifest, files=files).to_json())
    plain = export(tmp_path / "plain", base, None, FORMATS["int4"])
    with pytest.raises(UsageError, match="has no draft model"):
        OnnxRuntimeDraft(plain, 4, 2)


def test_hidden_states_are_the_final_norms_output(tmp_path: Path) -> None:
    """Of all rows: with the head they give transformers' logits, though only some rows' logits were asked for."""
    base, draft = make(tmp_path)
    bundle = export(tmp_path / "bundle", base, draft, FORMATS["exact"], IDS)
    tokens = np.random.default_rng(1).integers(0, 320, 70).astype(np.int32)
    executor = OnnxRuntimeExecutor(bundle, 4, 2)
    batch = StepBatch(
        tokens,
        np.arange(70, dtype=np.int32),
        np.array([0, 70], np.int32),
        np.array([[2, 0]], np.int32),
        np.array([3, 69], np.int32),
        np.array([70], np.int32),
    )
    result = executor.step(batch)
    expected = reference_logits(granite(base.config, read_safetensors(tmp_path / "base")), tokens.tolist())
    assert result.hidden is not None and result.hidden.shape == (70, 64)
    head = base.tensors["model.embed_tokens.weight"].read(slice(None))
    np.testing.assert_allclose(result.hidden @ head.T / base.config.logit_divisor, expected, atol=2e-4)
    np.testing.assert_allclose(result.logits, expected[[3, 69]], atol=2e-4)


def test_the_command_exports_a_draft(tmp_path: Path) -> None:
    make(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 30)
    made = edge("freq", text, "--model", tmp_path / "base", "--size", 64, "--out", tmp_path / "f.npy")
    assert made.returncode == 0, made.stderr
    out = tmp_path / "bundle"
    wishes = ("--draft-weights", "exact", "--draft-window", "0", "--draft-logit-scale", "1")
    result = edge(
        "export",
        tmp_path / "base",
        "--out",
        out,
        "--draft",
        tmp_path / "draft",
        "--frspec",
        tmp_path / "f.npy",
        *wishes,
        "--json",
    )
    assert result.returncode == 0, result.stderr
    section = json.loads(result.stdout)["draft"]
    assert section["model"]["vocab_size"] == 64 and section["model"]["window"] == 0
    assert section["model"]["logit_scale"] == 1 and section["weights"]["kind"] == "exact"
    # The eos tokens can be guessed.
    assert {2, 4} <= set(np.load(out / DRAFT_VOCAB).tolist())
    ran = edge("run", out, "--prompt", "fox", "--max-tokens", "3")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--frspec", "f.txt"), "add --draft FOLDER"),
        (("--draft-head", "int4"), "add --draft FOLDER"),
        (("--draft", "draft", "--frspec", "none.npy"), "does not exist"),
        (("--draft", "draft", "--draft-window", "100"), "must be a multiple of 64"),
        (("--draft", "draft", "--draft-logit-scale", "0"), "must be a positive number"),
        (("--draft", "draft", "--draft-weights", "ternary"), "cannot be ternary"),
        (("--draft", "draft", "--draft-weights", "fp16", "--draft-head", "int8"), "leave out --draft-head int8"),
        (("--draft", "base"), "num_hidden_layers is 2"),
        (("--draft", "nowhere"), "has no config.json"),
    ],
)
def test_the_command_refuses_in_a_sentence(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "f.txt").write_text("1 2 3")
    here = [
        str(tmp_path / part) if part in ("draft", "base", "nowhere", "f.txt", "none.npy") else part
        for part in arguments
    ]
    result = edge("export", tmp_path / "base", "--out", tmp_path / "bundle", *here)
    assert result.returncode in (1, 2)
    assert words in " ".join(result.stderr.decode().split())
    assert not (tmp_path / "bundle").exists()


def test_the_published_list_beside_a_draft_is_mentioned(tmp_path: Path) -> None:
    make(tmp_path)
    import torch

    torch.save([5, 2, 4], tmp_path / "draft" / "freq_3.pt")
    result = edge("export", tmp_path / "base", "--out", tmp_path / "bundle", "--draft", tmp_path / "draft")
    assert result.returncode == 0 and b"freq_3.pt" in result.stderr
    shutil.rmtree(tmp_path / "bundle")
    path = tmp_path / "draft" / "freq_3.pt"
    result = edge(
        "export", tmp_path / "base", "--out", tmp_path / "bundle", "--draft", tmp_path / "draft", "--frspec", path
    )
    assert result.returncode == 0, result.stderr
    assert np.load(tmp_path / "bundle" / DRAFT_VOCAB).tolist() == [5, 2, 4]


def test_the_draft_constants_are_the_specs(tmp_path: Path) -> None:
    """r = scale_depth / sqrt(layers + 1), and the base's logit scale, as they stand in the graph."""
    base, draft = make(tmp_path)
    bundle = export(tmp_path / "bundle", base, draft, FORMATS["int4"], IDS)
    graph = onnx.load(bundle.file(DRAFT_GRAPH), load_external_data=False).graph
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer if not t.external_data}
    assert values["residual_scale"] == pytest.approx(1.4 / 3**0.5)
    assert values["head.scale"] == pytest.approx(32 / 64)
    norm = next(node for node in graph.node if node.op_type == "AddRMSNorm")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in norm.attribute}
    assert attributes["scale"] == pytest.approx(1.4 / 3**0.5)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["exact", "int4"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_reply_with_the_draft_is_the_reply(temperature: float, kind: str, sparse: bool, tmp_path: Path) -> None:
    """Of a draft whose vocabulary is what the reply says: the right token is always among ten guesses, and accepted."""
    settings = {"sparse": SparseConfig(window_size=64, topk=3, dense_len=128)} if sparse else {}
    base, draft = make(tmp_path, tie_word_embeddings=False, **settings)
    prompt = np.random.default_rng(8).integers(5, 320, 150).tolist()
    params = SamplingParams(temperature=temperature, max_tokens=24, seed=5, ignore_eos=True)
    plain = export(tmp_path / "plain", base, None, FORMATS[kind])
    engine = open_engine(plain.path, EngineOptions(context=256, threads=2))
    expected = [event.token_id for event in engine.generate(prompt, params)]
    # A tree's ten children of the root are all of this vocabulary for the first tokens of the reply.
    ids = np.array(list(dict.fromkeys(expected))[:10], np.int32)
    bundle = export(tmp_path / "bundle", base, draft, FORMATS[kind], ids)
    engine = open_engine(bundle.path, EngineOptions(context=256, threads=2, speculative="eagle"))
    assert engine.speculation is not None
    engine.speculation = paced(engine.speculation, Always())
    assert [event.token_id for event in engine.generate(prompt, params)] == expected
    totals = engine.speculation.totals
    assert totals.accepted >= 3 and len(totals.lengths) > 1
