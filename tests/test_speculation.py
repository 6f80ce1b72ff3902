"""Speculation end to end on the CPU: whatever is proposed, the tokens are those of plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.draft_export import choose_draft
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.ternary import recover
from edge.config import LongRope, ModelConfig, SparseConfig
from edge.engine import Engine, open_engine
from edge.executors.draft import OnnxRuntimeDraft
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.scheduler import Sequence as ScheduledSequence
from edge.speculation.speculator import Choice, Limits, Speculation, Way
from edge.speculation.tree import TokenTree
from plugins import PAGE_TOKENS
from plugins.offload.store import MINIMUM_SLOTS
from tests.draft_samples import draft_config, draft_weights, write_draft
from tests.synthetic import tiny_config, write_hf_checkpoint
from tests.ternary_samples import write_ternary_checkpoint
from tests.test_engine import prompt
from tests.test_offload import engine_of

SPARSE = SparseConfig(topk=2, window_size=64, dense_len=300)  # 3 blocks
PROMPT, REPLY = 150, 420  # the reply crosses the switch to the long list, then that to sparse attention


class Eager:
    """Verifies as much as it may, and promises anything."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def beside(self, sequences: int) -> Eager:
        return self

    def choose(self, most_rows: int, most_depth: int) -> Choice:
        """All."""
        return Choice(most_rows, most_depth, self._rng.random())

    def plain(self, seconds: float) -> None:
        """Nothing to learn."""

    def verified(self, tree: TokenTree, path: Sequence[int], seconds: float, draft_seconds: float = 0.0) -> None:
        """Nothing to learn."""


class Prophet:
    """Knows the reply, and hides a part of it somewhere in a random tree."""

    def __init__(self, reply: Sequence[int], seed: int, vocab: int) -> None:
        self._tokens, self._rng, self._vocab = list(reply), np.random.default_rng(seed), vocab

    def follow(self, first: int, hidden: np.ndarray) -> None:
        """Needs no hidden states."""

    def ready(self, tokens: Sequence[int]) -> bool:
        """Always."""
        return True

    def skip(self) -> None:
        """Where there is room for no tree."""

    def propose(self, tokens: Sequence[int], pages: Sequence[int], length: int, limits: Limits) -> TokenTree:
        """A tree of any shape; between no and `depth` tokens of the path that will be taken are in it."""
        rng, depth = self._rng, limits.depth
        true_path = self._tokens[len(tokens) : len(tokens) + int(rng.integers(0, depth + 1))]
        nodes, parents, depths = [tokens[-1]], [-1], [0]
        deepest, found = 0, 0  # of the true path: its last node so far, and how many there are
        for _ in range(int(rng.integers(1, limits.rows + 1))):
            if found < len(true_path) and rng.random() < 0.5:
                parent, token = deepest, true_path[found]
                deepest, found = len(nodes), found + 1
            else:
                parent, token = int(rng.integers(len(nodes))), int(rng.integers(self._vocab))
                if depths[parent] == depth:
                    continue
            nodes.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
        return TokenTree(tuple(nodes), tuple(parents))


def export(folder: Path, config: ModelConfig, weights: WeightFormat, kv: str | None = None) -> Path:
    """With a random draft, of which nothing will be accepted but by chance."""
    write = write_ternary_checkpoint if weights.kind == "ternary" else write_hf_checkpoint
    checkpoint = open_checkpoint(write(folder / "checkpoint", config))
    if weights.kind == "ternary":
        checkpoint = recover(checkpoint).checkpoint
    values = draft_config(config)
    write_draft(folder / "draft", values, draft_weights(values))
    draft = choose_draft(folder / "draft", checkpoint, weights, "onnxruntime", np.arange(5, 165, dtype=np.int32))
    return export_bundle(checkpoint, folder / "bundle", ExportOptions(weights=weights, kv=kv, draft=draft))


@pytest.fixture(
    scope="module", params=["dense", "sparse", "ternary sparse", "sparse int8 cache", "sparse bfloat16 cache"]
)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rope = LongRope((1.0,) * 8, tuple(4.0 + i for i in range(8)), 200)
    words = request.param.split()
    config = tiny_config(tie_word_embeddings=False, long_rope=rope, sparse=SPARSE if "sparse" in words else None)
    kv = words[-2] if words[-1] == "cache" else None
    weights = (
        WeightFormat("ternary", 0, head="int8") if "ternary" in words else WeightFormat("w4a16", 32, symmetric=True)
    )
    return export(tmp_path_factory.mktemp("speculation"), config, weights, kv)


def speculate(engine: Engine, reply: Sequence[int], ids: Sequence[int], seed: int) -> None:
    vocab = engine.vocab_size
    engine.speculation = Speculation("prophet", (Way(lambda: Prophet([*ids, *reply], seed, vocab), Eager()),))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("offload", [False, True], ids=["memory", "disk"])
def test_tokens_are_those_of_plain_decoding(bundle: Path, temperature: float, offload: bool, tmp_path: Path) -> None:
    engine = open_engine(bundle, EngineOptions(context=1024, threads=2, chunk=64))
    ids = prompt(PROMPT)
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=REPLY, ignore_eos=True)
    wanted = [event.token_id for event in engine.generate(ids, params)]
    if offload:
        engine = engine_of(bundle, tmp_path, MINIMUM_SLOTS)
    for seed in range(2):
        speculate(engine, wanted, ids, seed)
        session = engine.open_session()
        assert [event.token_id for event in session.generate(ids, params)] == wanted
        assert session.speculated is not None
        assert session.speculated.mean_accept_length > 1.2 and session.speculated.steps < REPLY - 50
        session.close()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_models_trees_change_nothing(bundle: Path, temperature: float) -> None:
    ids = prompt(PROMPT)
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=REPLY, ignore_eos=True)
    plain = open_engine(bundle, EngineOptions(context=1024, threads=2, chunk=64))
    engine = open_engine(bundle, EngineOptions(context=1024, threads=2, chunk=64, speculative="eagle"))
    assert engine.speculation is not None
    ways = [replace(way, pace=Eager()) for way in engine.speculation.ways]  # which take turns where text repeats
    engine.speculation = replace(engine.speculation, ways=ways)
    session = engine.open_session()
    found = [event.token_id for event in session.generate(ids, params)]
    assert found == [event.token_id for event in plain.generate(ids, params)]
    assert session.speculated is not None and session.speculated.proposed > REPLY


def test_no_node_of_sparse_attention_ends_a_page(bundle: Path) -> None:
    """What follows such a node would see a window that has it; and all nodes are computed in their root's mode."""
    engine = open_engine(bundle, EngineOptions(context=1024, threads=2))
    sequence = ScheduledSequence(0, prompt_length=10)
    for first in range(100, 500):
        sequence.computed = first
        mode = engine.modes.of(first + 1)
        limits = engine._loop._limits(sequence, first + 1, left=100, share=engine.plan.run.rows)
        for depth in range(1, limits.depth + 1):
            assert engine.modes.of(first + depth + 1) == mode
            assert not mode.is_sparse or (first + depth) % PAGE_TOKENS != PAGE_TOKENS - 1
        further = first + limits.depth + 1
        ends_page = mode.is_sparse and further % PAGE_TOKENS == PAGE_TOKENS - 1
        assert limits.depth == 15 or ends_page or engine.modes.of(further + 1) != mode


def test_nothing_is_counted_after_the_end_of_a_reply(bundle: Path) -> None:
    """The prophet's trees go on after the end token, and all that is in them would be accepted."""
    ids, engine = prompt(PROMPT), open_engine(bundle, EngineOptions(context=1024, threads=2, chunk=64))
    wanted = [event.token_id for event in engine.generate(ids, SamplingParams(max_tokens=40, ignore_eos=True))]
    end = next(i for i in range(12, 40) if wanted[i] not in wanted[:i])
    config = replace(engine.bundle.config, eos_token_ids=(wanted[end],))
    engine.bundle = replace(engine.bundle, manifest=replace(engine.bundle.manifest, model=config))
    for seed in range(8):
        speculate(engine, wanted, ids, seed)
        session = engine.open_session()
        assert [event.token_id for event in session.generate(ids, SamplingParams(max_tokens=40))] == wanted[: end + 1]
        assert session.speculated is not None and session.speculated.emitted == end  # all after the prompt's own
        session.close()


def test_a_copied_page_is_copied_in_the_drafts_cache_too(bundle: Path) -> None:
    engine = open_engine(bundle, EngineOptions(context=1024, threads=2, speculative="eagle"))
    assert engine.speculation is not None and isinstance(engine.speculation.draft, OnnxRuntimeDraft)
    pages = engine.speculation.draft._pool.values
    pages[3] = 1
    engine.cache._copy_pages([(3, 5)])
    np.testing.assert_array_equal(pages[5], pages[3])
