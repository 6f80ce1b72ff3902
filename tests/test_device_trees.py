"""Trees of tokens on the device executor, on the emulated driver: verified in one run, then closed up in the pools."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.selftest_model import CONFIG, selftest_checkpoint
from edge.bundle import Bundle
from edge.engine import Engine
from edge.executor import StepBatch
from edge.executors.offload import DeviceOffload
from edge.executors.tensorrt import TensorRTExecutor
from edge.kv_cache import pool_layout
from edge.sampler import SamplingParams
from edge.scheduler import Scheduler
from edge.scheduler import Sequence as ScheduledSequence
from edge.selftest.model import golden
from edge.speculation.tree import TokenTree
from plugins.infllmv2 import meaning
from plugins.paged_attention.pages import device_order
from plugins.simt.driver.library import EmulatedDriver
from tests.device_engine import BUILD, device_bundle, kernels_of, open_on_device
from tests.emulated import emulated_gpu
from tests.engine_stand_in import view
from tests.synthetic import tiny_config, write_hf_checkpoint
from tests.test_device_offload import BUILD as OFFLOAD_BUILD
from tests.test_device_offload import OPTIONS as OFFLOAD_OPTIONS
from tests.test_device_offload import PAGES, SLOTS, SPARSE, make_bundle, outcome_of, page_bytes
from tests.test_device_offload import prompt as random_prompt
from tests.test_speculation import speculate
from tests.test_tensorrt_executor import prompt

VERIFYING = replace(BUILD, verify=12)
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return device_bundle(selftest_checkpoint(), tmp_path_factory.mktemp("selftest") / "bundle")


@pytest.fixture
def driver() -> Generator[EmulatedDriver, None, None]:
    with emulated_gpu("sm_86", kernels_of(CONFIG)) as driver:
        yield driver


def executor_of(engine: Engine) -> TensorRTExecutor:
    assert isinstance(engine.executor, TensorRTExecutor)
    return engine.executor


def speculated(engine: Engine, ids: list[int], wanted: list[int], seed: int) -> list[int]:
    """What comes of trees that hide some of `wanted`."""
    speculate(engine, wanted, ids, seed)
    session = engine.open_session()
    tokens = [event.token_id for event in session.generate(ids, replace(GREEDY, max_tokens=len(wanted)))]
    assert session.speculated is not None and session.speculated.mean_accept_length > 1.2
    session.close()
    return tokens


@pytest.mark.parametrize("verify", [12, 0])
def test_trees_give_the_golden_tokens(bundle: Bundle, driver: EmulatedDriver, verify: int) -> None:
    """In sparse attention; without a profile of their own trees are small, and steps are those of prefill."""
    truth = golden()
    engine = open_on_device(bundle, build=replace(BUILD, verify=verify))
    assert speculated(engine, list(truth.prompt), list(truth.tokens), 1) == list(truth.tokens)
    runs = executor_of(engine)._verify
    assert (runs is not None) == (verify > 0) and (runs is None or runs.context.runs > 4)


@pytest.mark.parametrize("kv", ["float16", "int8"])
def test_a_dense_model_keeps_what_was_accepted(kv: str, tmp_path: Path) -> None:
    """Later logits are those of a cache that was filled token by token: a near tie may go another way, no logit."""
    config = tiny_config(hidden_size=128, intermediate_size=256, head_dim=64, max_position_embeddings=512)
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "hf", config))
    bundle = device_bundle(checkpoint, tmp_path / "bundle", kv=kv)
    with emulated_gpu("sm_86", kernels_of(config, "uint8_t" if kv == "int8" else "half")):
        engine = open_on_device(bundle, build=VERIFYING)
        ids = [token % config.vocab_size for token in prompt(115)]  # the reply goes over the end of a page
        wanted = [event.token_id for event in engine.generate(ids, GREEDY)]
        tokens = speculated(engine, ids, wanted, 2)
        after = engine.logits([*ids, *tokens[:-1]], len(tokens))
        chosen = after[np.arange(len(tokens)), tokens]
        assert (after.max(axis=1) - chosen).max() < 0.02 * np.abs(after).max()


def with_tree(engine: Engine, ids: list[int], tree: TokenTree) -> tuple[ScheduledSequence, StepBatch]:
    """A sequence of all `ids` but the last, computed, and the step of that one and what is drafted after it."""
    sequence = ScheduledSequence(engine.cache.open(), ids[:-1], prompt_length=len(ids) - 1)
    engine.advance(sequence)
    sequence.tokens.append(ids[-1])
    sequence.tree = tree
    step = Scheduler(engine.cache, 64).next_step([sequence])
    assert step is not None
    return sequence, step.batch


def test_every_node_has_the_logits_of_its_own_path(bundle: Bundle, driver: EmulatedDriver) -> None:
    """Dense, and sparse with a tree's places on two pages; no path changes the mode or ends a window."""
    engine = open_on_device(bundle, build=VERIFYING)
    parents = (-1, 0, 0, 1, 1, 3, 2, 6, 7, 8, 4)
    for length in (40, 184):
        ids = prompt(length)
        tree = TokenTree((ids[-1], *prompt(10, seed=5)), parents)
        sequence, batch = with_tree(engine, ids, tree)
        runs = executor_of(engine)._verify.context.runs
        logits = executor_of(engine).step(batch).logits
        assert executor_of(engine)._verify.context.runs == runs + 1
        engine.cache.close(sequence.cache_id)
        for node in range(len(parents)):
            path, at = [], node
            while at > 0:
                path, at = [tree.tokens[at], *path], parents[at]
            alone = engine.logits([*ids, *path], 1)[0]
            assert np.abs(logits[node] - alone).max() < 0.02 * np.abs(alone).max(), (length, node)


def test_kept_tokens_are_where_the_meaning_puts_them(bundle: Bundle, driver: EmulatedDriver) -> None:
    """All pools of all layers; the windows that end with kept tokens are averaged, others stay."""
    engine = open_on_device(bundle, build=VERIFYING)
    executor, ids = executor_of(engine), prompt(187)
    tree = TokenTree((ids[-1], *prompt(11, seed=5)), (-1, 0, 0, 1, 1, 3, 2, 6, 7, 8, 4, 9))
    sequence, batch = with_tree(engine, ids, tree)
    executor.step(batch)
    pages, slots = np.array(engine.cache.pages(sequence.cache_id)), np.array([188, 190, 191, 194, 197])
    before, layout = pools_of(executor), pool_layout(CONFIG, bundle.manifest.types)
    executor.keep_tokens(pages.tolist(), 187, slots.tolist())
    after = pools_of(executor)
    for layer in range(CONFIG.num_hidden_layers):
        kv, c1, c2 = (before[f"{name}.{layer}"].copy() for name in layout)
        natural = device_order(kv)  # to transpose squares is its own inverse
        meaning.keep_tokens(natural, c1, c2, pages, 187, slots)
        assert device_order(natural).tobytes() == after[f"kv_pool.{layer}"].tobytes()
        for name, expected in (("c1_pool", c1), ("c2_pool", c2)):
            assert (expected != before[f"{name}.{layer}"]).any()
            got = after[f"{name}.{layer}"].astype(np.float32)
            np.testing.assert_allclose(got, expected.astype(np.float32), rtol=2e-3, atol=1e-5)


def pools_of(executor: TensorRTExecutor) -> dict[str, np.ndarray]:
    """Copies of all pools."""
    return {name: view(pool.address, pool.shape, np.dtype(np.float16)).copy() for name, pool in executor._kv.items()}


@pytest.mark.parametrize("guesses", [True, False])
def test_offloaded_pages_hold_trees(tmp_path: Path, guesses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same trees come to the same tokens and windows as with all pages on the device; some reach a page further."""
    bundle = make_bundle(tmp_path, SPARSE)
    if not guesses:
        monkeypatch.setattr(DeviceOffload, "_prefetch", lambda *_: None)
    with emulated_gpu("sm_86", kernels_of(bundle.config)):
        outcomes, ids, build = [], random_prompt(436), replace(OFFLOAD_BUILD, verify=8)
        roomy = open_on_device(bundle, OFFLOAD_OPTIONS, build=build)
        missing = (PAGES - SLOTS) * page_bytes(bundle.config) * bundle.config.num_hidden_layers
        tight = replace(OFFLOAD_OPTIONS, memory=roomy.plan.total - missing + 1000, offload=Path("host"))
        for engine in (roomy, open_on_device(bundle, tight, build=build)):
            wanted = [event.token_id for event in engine.generate(ids, GREEDY)]
            session = engine.open_session()
            speculate(engine, wanted, ids, 3)
            tokens = [event.token_id for event in session.generate(ids, GREEDY)]
            again = [*ids, *tokens, *random_prompt(20, seed=1)]
            speculate(engine, wanted, again, 4)
            tokens += [event.token_id for event in session.generate(again, GREEDY)]
            outcomes.append(outcome_of(engine, tokens))
        assert outcomes[1].agrees(outcomes[0])
        assert executor_of(engine)._verify.context.runs > 5 and executor_of(engine).offload.counts.pages.misses > 0
