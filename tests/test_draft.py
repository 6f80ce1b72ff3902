"""A draft in a bundle computes what the spec says: chunks, tree levels, windows, pruned heads, shared pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.draft_export import choose_draft
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import open_bundle
from edge.config import LongRope, ModelConfig, SparseConfig
from edge.executor import TreeRows
from edge.executors.draft import OnnxRuntimeDraft
from edge.speculation.draft import DraftBatch
from plugins.ort import library
from tests.draft_reference import DraftReference
from tests.draft_samples import draft_config, draft_weights, write_draft, write_int4_draft
from tests.synthetic import random_weights, tiny_config, write_hf_checkpoint

EXACT = WeightFormat("exact")
ROPE = LongRope(tuple(np.linspace(1, 2, 8)), tuple(np.linspace(2, 5, 8)), 100)
IDS = np.array([7, 300, 2, 4, 31, 0, 150], np.int32)


@dataclass
class Case:
    """A bundle's draft beside its reference."""

    draft: OnnxRuntimeDraft
    reference: DraftReference


def make_case(
    folder: Path,
    base: ModelConfig,
    *,
    ids: np.ndarray | None = None,
    kv: str | None = None,
    changes: dict[str, Any] | None = None,
    norms: dict[str, bool] | None = None,
    **choices: Any,
) -> Case:
    """Exact weights, so that only rounding to float32 is left."""
    write_hf_checkpoint(folder / "base", base, dtype="float32")
    config = draft_config(base, **(changes or {}))
    stored = write_draft(folder / "draft", config, draft_weights(config, **(norms or {})))
    checkpoint = open_checkpoint(folder / "base")
    chosen = choose_draft(folder / "draft", checkpoint, EXACT, "onnxruntime", ids, **choices)
    options = ExportOptions(weights=EXACT, kv=kv, draft=chosen)
    bundle = open_bundle(export_bundle(checkpoint, folder / "bundle", options))
    return Case(OnnxRuntimeDraft(bundle, 40, 2), reference_of(bundle.config, config, stored, base, ids, chosen))


def reference_of(
    base: ModelConfig, config: dict[str, Any], weights: dict[str, np.ndarray], made: ModelConfig, ids: Any, chosen: Any
) -> DraftReference:
    of_base = random_weights(made)
    head = of_base["model.embed_tokens.weight" if base.tie_word_embeddings else "lm_head.weight"]
    return DraftReference(
        base,
        weights,
        of_base["model.embed_tokens.weight"],
        head if ids is None else head[ids],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["rms_norm_eps"],
        chosen.checkpoint.config.logit_scale,
        chosen.checkpoint.config.window,
    )


def batch(
    tokens: np.ndarray,
    hidden: np.ndarray,
    positions: Any,
    pages: np.ndarray,
    rows: Any,
    length: int = 1,
    tree: TreeRows | None = None,
) -> DraftBatch:
    """One sequence."""
    return DraftBatch(
        np.asarray(tokens, np.int32),
        hidden,
        np.asarray(positions, np.int32),
        np.array([0, len(tokens)], np.int32),
        np.asarray(pages, np.int32)[None],
        np.asarray(rows, np.int32),
        np.array([length], np.int32),
        tree,
    )


def check_rows(
    case: Case, tokens: Any, hidden: np.ndarray, result: Any, rows: Any, base: int = 0, tolerance: float = 2e-5
) -> None:
    """Plain rows of a chunk that begins at position `base`."""
    for i, (token, h) in enumerate(zip(tokens, hidden, strict=True)):
        logits, y = case.reference.row(int(token), h, base + i, base + i, range(base + i))
        if i in rows:
            at = list(rows).index(i)
            np.testing.assert_allclose(result.hidden[at], y, atol=tolerance * np.abs(y).max())
            np.testing.assert_allclose(result.logits[at], logits, atol=tolerance * np.abs(logits).max())


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"base": {"tie_word_embeddings": False}},
    "pruned": {"ids": IDS},
    "pruned, untied": {"ids": IDS, "base": {"tie_word_embeddings": False}},
    "scale of CPM.cu": {"logit_scale": 1.0},
    "other scale": {"logit_scale": 0.3},
    "no input norms": {"norms": {"norms": False}},
    "no norm before attention": {"norms": {"attention_norm": False}},
    "small window": {"window": 64},
    "no window": {"window": 0},
    "heads of its own": {"changes": {"num_attention_heads": 6, "num_key_value_heads": 3}},
    "long rope": {"base": {"long_rope": ROPE}},
    "sparse base": {"base": {"sparse": SparseConfig(window_size=128, topk=6, dense_len=256)}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_chunk_a_step_and_two_tree_levels(name: str, tmp_path: Path) -> None:
    """A prompt in two chunks, one token, then levels whose rows see the tree's earlier levels along their paths."""
    settings = dict(CASES[name])
    base = tiny_config(**settings.pop("base", {}))
    case = make_case(tmp_path, base, **settings)
    rng = np.random.default_rng(1)
    length, window = 150, case.reference.window_blocks or 1000
    case.reference.window_blocks = window
    case.reference.is_long = base.long_rope is not None
    tokens = rng.integers(0, base.vocab_size, length)
    hidden = rng.standard_normal((length, base.hidden_size)).astype(np.float32)
    pages = rng.permutation(40)[:5]
    for first, last, rows in ((0, 97, [0, 40, 96]), (97, 149, [51]), (149, 150, [0])):
        part = slice(first, last)
        result = case.draft.step(batch(tokens[part], hidden[part], range(first, last), pages, rows, length))
        check_rows(case, tokens[part], hidden[part], result, rows, first)
    y = result.hidden[0]
    # Two levels of three rows: slots go on one after the other, positions go by levels.
    paths = {150: [150], 151: [151], 152: [152], 153: [150, 153], 154: [152, 154], 155: [150, 155]}
    level = y[None].repeat(3, axis=0)
    for depth, slots in enumerate(([150, 151, 152], [153, 154, 155])):
        guesses = rng.integers(0, base.vocab_size, 3)
        mask = np.array([sum(1 << (slot - 150) for slot in paths[s]) for s in slots], np.uint64)
        tree = TreeRows(np.array(slots, np.int32), np.array([150], np.int32), mask)
        result = case.draft.step(batch(guesses, level, [150 + depth] * 3, pages, [0, 1, 2], length, tree))
        for i, slot in enumerate(slots):
            seen = [*range(150), *paths[slot]]
            logits, expected = case.reference.row(int(guesses[i]), level[i], 150 + depth, slot, seen)
            np.testing.assert_allclose(result.hidden[i], expected, atol=2e-5 * np.abs(expected).max())
            np.testing.assert_allclose(result.logits[i], logits, atol=2e-5 * np.abs(logits).max())
        level = result.hidden[[0, 2, 0]]


def test_sequences_of_one_step_do_not_see_each_other(tmp_path: Path) -> None:
    case = make_case(tmp_path, tiny_config(), ids=IDS)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 320, 100)
    hidden = rng.standard_normal((100, 64)).astype(np.float32)
    both = DraftBatch(
        tokens.astype(np.int32),
        hidden,
        np.array([*range(70), *range(30)], np.int32),
        np.array([0, 70, 100], np.int32),
        np.array([[3, 9], [5, 5]], np.int32),
        np.array([69, 99], np.int32),
        np.array([70, 30], np.int32),
    )
    result = case.draft.step(both)
    assert result.logits.shape == (2, len(IDS)) and result.hidden.shape == (2, 64)
    for row, part in enumerate((slice(0, 70), slice(70, 100))):
        case.reference.cache.clear()
        alone = replace(result, logits=result.logits[[row]], hidden=result.hidden[[row]])
        check_rows(case, tokens[part], hidden[part], alone, [part.stop - part.start - 1])


def test_a_copied_page_is_seen_like_its_source(tmp_path: Path) -> None:
    case = make_case(tmp_path, tiny_config())
    rng = np.random.default_rng(4)
    tokens, hidden = rng.integers(0, 320, 65), rng.standard_normal((65, 64)).astype(np.float32)
    first = batch(tokens[:64], hidden[:64], range(64), np.array([7]), [63])
    case.draft.step(first)
    case.draft.copy_pages([(7, 1), (3, 2)])
    results = [case.draft.step(batch(tokens[64:], hidden[64:], [64], np.array([page, 20]), [0])) for page in (7, 1)]
    assert np.array_equal(results[0].logits, results[1].logits)
    other = case.draft.step(batch(tokens[64:], hidden[64:], [64], np.array([2, 20]), [0]))
    assert not np.allclose(other.logits, results[0].logits)


@pytest.mark.parametrize("kv", ["float16", "bfloat16", "int8"])
def test_a_rounded_cache_is_close(kv: str, tmp_path: Path) -> None:
    """Beside int8 the draft keeps bfloat16; its logits differ by what rounding keys and values explains."""
    case = make_case(tmp_path, tiny_config(), kv=kv)
    assert open_bundle(tmp_path / "bundle").manifest.draft is not None
    section = open_bundle(tmp_path / "bundle").manifest.draft
    assert section is not None and section.types["kv"] == ("bfloat16" if kv == "int8" else kv)
    rng = np.random.default_rng(5)
    tokens, hidden = rng.integers(0, 320, 80), rng.standard_normal((80, 64)).astype(np.float32)
    result = case.draft.step(batch(tokens, hidden, range(80), np.array([7, 8]), range(80)))
    check_rows(case, tokens, hidden, result, range(80), tolerance=0.02)


def test_the_function_gives_what_the_kernel_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path, tiny_config(), ids=IDS)
    monkeypatch.setattr(library, "find_library", lambda: None)
    plain = OnnxRuntimeDraft(open_bundle(tmp_path / "bundle"), 40, 2)
    rng = np.random.default_rng(6)
    tokens, hidden = rng.integers(0, 320, 90), rng.standard_normal((90, 64)).astype(np.float32)
    step = batch(tokens, hidden, range(90), np.array([7, 8]), [3, 89])
    ours, theirs = case.draft.step(step), plain.step(step)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4)
    np.testing.assert_allclose(ours.hidden, theirs.hidden, atol=1e-4)


@pytest.mark.parametrize("marlin", [False, True])
def test_int4_drafts_keep_their_codes(marlin: bool, tmp_path: Path) -> None:
    """Products round their input to int8: with the codes taken over, nothing else differs from the values they mean."""
    base = tiny_config(hidden_size=128, num_attention_heads=8, head_dim=16)
    write_hf_checkpoint(tmp_path / "base", base, dtype="float32")
    config = draft_config(base, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4)
    values, layers = write_int4_draft(tmp_path / "draft", config, draft_weights(config), 32, marlin=marlin)
    checkpoint = open_checkpoint(tmp_path / "base")
    chosen = choose_draft(tmp_path / "draft", checkpoint, WeightFormat("w4a16", 64, True), "onnxruntime", IDS)
    assert chosen.weights.kind == "w4a16" and chosen.weights.group_size == 32
    for name, layer in layers.items():
        codes = chosen.checkpoint.tensors[f"{name}.weight"].codes
        assert codes is not None and np.array_equal(codes.read(slice(None))[0], layer.codes)
    options = ExportOptions(weights=WeightFormat("w4a16", 64, True), draft=replace(chosen, weights=EXACT))
    bundle = open_bundle(export_bundle(checkpoint, tmp_path / "exact", options))
    case = Case(OnnxRuntimeDraft(bundle, 40, 2), reference_of(bundle.config, config, values, base, IDS, chosen))
    rng = np.random.default_rng(7)
    tokens, hidden = rng.integers(0, 320, 70), rng.standard_normal((70, 128)).astype(np.float32)
    step = batch(tokens, hidden, range(70), np.array([7, 8]), range(70))
    check_rows(case, tokens, hidden, case.draft.step(step), range(70), tolerance=0.02)  # a bfloat16 cache
    coded = open_bundle(export_bundle(checkpoint, tmp_path / "coded", replace(options, draft=chosen)))
    result, exact = OnnxRuntimeDraft(coded, 40, 2).step(step), case.draft.step(step)
    assert np.abs(result.hidden - exact.hidden).max() < 0.05 * np.abs(exact.hidden).max()
