"""The device executor on the emulated driver: real cubins' kernels on the CPU, real plugin classes, real cuda-bindings.

What TensorRT's own runtime does is the stand-in's (tests/engine_stand_in.py): it needs a device.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.selftest_model import CONFIG, selftest_checkpoint
from edge.bundle import Bundle
from edge.cuda import Kernels, open_device
from edge.engine import Engine, open_engine
from edge.errors import EdgeError, UsageError
from edge.executor import DrawParams
from edge.executors.tensorrt import BURST, TensorRTExecutor
from edge.executors.tensorrt_open import open_executor
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.scheduler import Scheduler
from edge.scheduler import Sequence as ScheduledSequence
from edge.selftest.model import golden, is_selftest_model, run_golden
from edge.tensorrt import Flavour
from plugins.launch import Launch
from plugins.sampling.meaning import SamplingInputs, sample
from plugins.simt.driver.library import EmulatedDriver
from tests.device_engine import OPTIONS, device_bundle, engine_file, kernels_of, open_on_device
from tests.emulated import emulated_gpu
from tests.engine_stand_in import NAME, Api
from tests.synthetic import tiny_config, write_hf_checkpoint

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return device_bundle(selftest_checkpoint(), tmp_path_factory.mktemp("selftest") / "bundle")


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The same weights on the CPU executor, exact: quantising the self-test's model changes nothing."""
    options = ExportOptions("onnxruntime", WeightFormat("exact"))
    path = export_bundle(selftest_checkpoint(), tmp_path_factory.mktemp("selftest") / "cpu", options)
    return open_engine(path, EngineOptions(context=512, chunk=64))


@pytest.fixture
def driver() -> Generator[EmulatedDriver, None, None]:
    with emulated_gpu("sm_86", kernels_of(CONFIG)) as driver:
        yield driver


@pytest.fixture
def engine(bundle: Bundle, driver: EmulatedDriver) -> Engine:
    return open_on_device(bundle)


def reply(engine: Engine, ids: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return [event.token_id for event in engine.generate(ids, params)]


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, CONFIG.vocab_size, length).tolist()


# Tokens


def test_the_golden_tokens_are_the_exact_ones_and_no_near_ties(cpu: Engine) -> None:
    truth = golden()
    assert is_selftest_model(cpu.bundle) and run_golden(cpu).passed
    logits = cpu.logits([*truth.prompt, *truth.tokens[:-1]], len(truth.tokens))
    best = np.sort(logits, axis=1)[:, -2:]
    assert (best[:, 1] - best[:, 0]).min() > 0.04 and len(set(truth.tokens)) > 25
    assert len(truth.prompt) > CONFIG.sparse.dense_len > CONFIG.long_rope.original_max_position_embeddings


@pytest.mark.parametrize(("target", "architecture"), [("rtx", "sm_86"), ("jetson", "sm_87")])
def test_the_decode_loop_gives_the_cpu_executors_tokens(target: str, architecture: str, tmp_path: Path) -> None:
    bundle = device_bundle(selftest_checkpoint(), tmp_path / "bundle", target)
    with emulated_gpu(architecture, kernels_of(CONFIG)):
        engine = open_on_device(bundle)
        result = run_golden(engine)
        assert result.passed, result.describe()
        assert "CUDA graph" in engine.describe()["decode"]
        assert architecture in engine.describe()["kernels"]


def test_logits_are_the_cpu_executors_to_float16(engine: Engine, cpu: Engine) -> None:
    """Eleven rows of logits, though the buffers hold four: dense rows, sparse ones, and both rotation lists."""
    for length in (50, 150):
        ids = prompt(length)
        ours, exact = engine.logits(ids, 11), cpu.logits(ids, 11)
        assert np.abs(ours - exact).max() < 0.01 * np.abs(exact).max()


def test_an_int8_cache_gives_the_tokens_of_the_cpu_executors(tmp_path: Path, cpu: Engine) -> None:
    """Both round keys and values alike, up to codes that float16 moves by one: less than int8 itself changes."""
    exact = ExportOptions("onnxruntime", WeightFormat("exact"), kv="int8")
    rounded = open_engine(export_bundle(selftest_checkpoint(), tmp_path / "cpu", exact), EngineOptions(512, chunk=64))
    bundle = device_bundle(selftest_checkpoint(), tmp_path / "bundle", kv="int8")
    with emulated_gpu("sm_86", kernels_of(CONFIG, "uint8_t")):
        engine = open_on_device(bundle)
        assert engine.describe()["kv"] == "int8"
        assert isinstance(engine.executor, TensorRTExecutor)
        assert engine.executor._pool.used == engine.executor._pool.size
        for length in (50, 150):  # dense, and sparse
            ids = prompt(length)
            ours, same, wide = (one.logits(ids, 11) for one in (engine, rounded, cpu))
            assert np.abs(ours - same).max() < 0.03 * np.abs(same).max()
            assert np.std(ours - same) < 0.8 * np.std(same - wide) < 0.01 * np.abs(wide).max()
            assert reply(engine, ids) == reply(rounded, ids)


def test_a_dense_model_with_one_rotation_list_decodes_too(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=128, intermediate_size=256, head_dim=64, max_position_embeddings=512)
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "hf", config))
    bundle = device_bundle(checkpoint, tmp_path / "bundle")
    with emulated_gpu("sm_86", kernels_of(config)):
        engine = open_on_device(bundle)
        ids = prompt(90) % np.int64(config.vocab_size)
        tokens = reply(engine, ids.tolist())
        after = engine.logits([*ids.tolist(), *tokens[:-1]], len(tokens))  # teacher-forced, in prefill steps
        chosen = after[np.arange(len(tokens)), tokens]
        assert (after.max(axis=1) - chosen).max() < 0.01 * np.abs(after).max()


def test_a_second_turn_computes_only_what_is_new(engine: Engine) -> None:
    ids = prompt(140)
    session = engine.open_session()
    first = [event.token_id for event in session.generate(ids, GREEDY)]
    again = [*ids, *first, *prompt(10, seed=1)]
    second = [event.token_id for event in session.generate(again, GREEDY)]
    session.close()
    assert second == reply(engine, again)


def test_requests_share_pages_and_copies_are_made_on_the_device(engine: Engine) -> None:
    ids = prompt(140)
    first = reply(engine, ids)
    assert engine.cache.cached_pages == 2
    assert reply(engine, ids) == first
    session = engine.open_session()
    list(session.generate(ids, GREEDY))
    pages = engine.cache.pages(session._sequence.cache_id)
    branch = [*ids[:100], *prompt(30, seed=2)]  # writes into a page that is published: it is copied first
    assert [event.token_id for event in session.generate(branch, GREEDY)] == reply(open_copy(engine), branch)
    copied = engine.cache.pages(session._sequence.cache_id)
    assert copied[0] == pages[0] and copied[1] != pages[1]
    assert reply(engine, ids) == first


def open_copy(engine: Engine) -> Engine:
    """The same bundle in an engine of its own, without a prefix cache."""
    other = open_on_device(engine.bundle)
    other.prefix_cache = False
    return other


def test_a_saved_session_is_restored_to_the_byte(engine: Engine, tmp_path: Path) -> None:
    session, ids = engine.open_session(), prompt(140)
    answer = [event.token_id for event in session.generate(ids, GREEDY)]
    session.save(tmp_path / "session")
    other = open_on_device(engine.bundle)
    restored = other.restore_session(tmp_path / "session")
    pages = [e.cache.pages(s._sequence.cache_id) for e, s in ((engine, session), (other, restored))]
    saved = [e.executor.save_pages(p) for e, p in zip((engine, other), pages, strict=True)]
    assert saved[0].any() and saved[0].shape == (3, engine.executor.page_bytes)
    np.testing.assert_array_equal(saved[0], saved[1])
    again = [*ids, *answer, *prompt(10, seed=1)]
    assert [event.token_id for event in restored.generate(again, GREEDY)] == reply(open_copy(engine), again)


def test_a_step_that_fails_leaves_nothing_queued(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What of it was queued would read the inputs of the next step, and write to its pages."""
    session, ids = engine.open_session(), prompt(100)
    again = [*ids, *(event.token_id for event in session.generate(ids, GREEDY)), *prompt(10, seed=1)]
    launch, launched = Kernels.launch, []

    def fail_once(kernels: Kernels, one: Launch, arguments: bytes, stream: int) -> None:
        launched.append(one)
        if len(launched) == 12:
            raise EdgeError("the twelfth launch fails")
        launch(kernels, one, arguments, stream)

    monkeypatch.setattr(Kernels, "launch", fail_once)
    with pytest.raises(EdgeError, match="the twelfth launch fails"):
        reply(engine, prompt(60, seed=3))
    assert [event.token_id for event in session.generate(again, GREEDY)] == reply(open_copy(engine), again)


# Batches and draws


def open_sequences(engine: Engine, lengths: list[int]) -> list[ScheduledSequence]:
    """Sequences with all but their last token computed, and pages for a burst."""
    sequences = []
    for i, length in enumerate(lengths):
        sequence = ScheduledSequence(engine.cache.open(), prompt(length, seed=i), prompt_length=length)
        engine.advance(sequence)
        sequence.tokens.append(7 + i)
        engine.cache.reserve(sequence.cache_id, length + BURST + 1)
        sequences.append(sequence)
    return sequences


def draw_params(temperatures: list[float], step: int = 100, **other: Any) -> DrawParams:
    rows = len(temperatures)
    return DrawParams(
        temperature=np.array(temperatures, np.float32),
        top_k=np.full(rows, 20, np.int32),
        top_p=np.full(rows, 0.9, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=np.arange(rows).astype(np.uint64),
        step=np.full(rows, step, np.int32),
        **other,
    )


@pytest.mark.parametrize("temperatures", [[0.0, 0.0, 0.0], [0.0, 0.8, 1.5]])
def test_a_batch_of_sequences_draws_what_each_would_alone(engine: Engine, temperatures: list[float]) -> None:
    """Lengths on both sides of the sparse limit, replayed as a graph; the oracle goes step by step from the host."""
    count = 5
    executor = engine.executor
    assert isinstance(executor, TensorRTExecutor)
    sequences = open_sequences(engine, [40, 130, 200])
    scheduler = Scheduler(engine.cache, 64)
    batch = scheduler.next_step(sequences).batch
    for _ in range(2):  # the second time from graphs alone
        tokens = executor.decode(batch, draw_params(temperatures), count)
    for column, sequence in enumerate(sequences):
        for i in range(count):
            logits = executor.step(scheduler.next_step([sequence]).batch).logits
            one = {
                name: value[column : column + 1]
                for name, value in vars(draw_params(temperatures)).items()
                if value is not None
            }
            one["step"] = one["step"] + i
            assert tokens[i, column] == sample(SamplingInputs(logits, **one))[0]
            sequence.computed += 1
            sequence.tokens.append(int(tokens[i, column]))


def test_a_penalty_counts_what_the_burst_itself_drew(engine: Engine) -> None:
    params = replace(GREEDY, max_tokens=20, repetition_penalty=5.0)
    tokens = reply(engine, prompt(30), params)
    assert len(set(tokens)) == len(tokens)
    assert reply(engine, prompt(30), params) == tokens


# What a token costs the host


def test_decoding_allocates_nothing_and_waits_once_a_burst(engine: Engine, driver: EmulatedDriver) -> None:
    params = replace(GREEDY, max_tokens=1 + 2 * BURST)
    reply(engine, prompt(20), params)  # captures
    before = driver.counts()
    reply(engine, prompt(20), replace(params, max_tokens=1 + 3 * BURST))
    after = driver.counts()
    assert (after.allocations, after.bytes, after.peak_bytes) == (before.allocations, before.bytes, before.peak_bytes)
    assert after.graph_launches - before.graph_launches == 3  # a burst of tokens is one call
    assert after.waits - before.waits == 1 + 3  # the prompt's step, and each burst


def test_the_pool_is_used_to_the_last_byte(engine: Engine) -> None:
    executor = engine.executor
    assert isinstance(executor, TensorRTExecutor)
    assert executor._pool.used == executor._pool.size
    assert engine.plan.num_pages == 512 // 64


class Uncapturable(Api):
    """An engine that synchronises while it runs, as some TensorRT layers do: it cannot be captured."""

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        from cuda.bindings import driver

        engine = super().deserialize_cuda_engine(data)
        make = engine.create_execution_context

        def create(strategy: Any) -> Any:
            context = make(strategy)
            run = context.execute_async_v3

            def execute(stream: int) -> bool:
                (status,) = driver.cuStreamSynchronize(driver.CUstream(stream))
                return status == driver.CUresult.CUDA_SUCCESS and run(stream)

            context.execute_async_v3 = execute
            return context

        engine.create_execution_context = create
        return engine


def test_a_step_that_cannot_be_captured_runs_on_the_stream_and_says_so(
    bundle: Bundle, driver: EmulatedDriver, caplog: pytest.LogCaptureFixture
) -> None:
    expected = reply(open_on_device(bundle), prompt(30))
    with caplog.at_level(logging.WARNING):
        engine = open_on_device(bundle, api=Uncapturable())
        assert reply(engine, prompt(30)) == expected
        assert reply(engine, prompt(30)) == expected
    assert sum("without a CUDA graph" in record.message for record in caplog.records) == 1
    assert engine.describe()["decode"] == "stream, not captured"


# Refusals


def test_a_budget_that_does_not_hold_the_model_is_refused_with_numbers(bundle: Bundle, driver: EmulatedDriver) -> None:
    with pytest.raises(
        EdgeError, match=r"a context of 512 tokens needs \d+MiB with its model, and --memory allows 1MiB"
    ):
        open_on_device(bundle, replace(OPTIONS, memory=1 << 20))


def test_less_memory_means_a_shorter_context(bundle: Bundle, driver: EmulatedDriver) -> None:
    roomy = open_on_device(bundle, replace(OPTIONS, context=None))
    page = roomy.plan.kv // roomy.plan.num_pages
    tight = open_on_device(bundle, EngineOptions(memory=roomy.plan.total - roomy.plan.kv + 3 * page, chunk=64))
    assert roomy.plan.num_pages > 3 == tight.plan.num_pages and tight.max_context == 3 * 64
    ids = prompt(150)
    assert reply(tight, ids) == reply(roomy, ids)


def test_kernels_of_another_gpu_are_named(bundle: Bundle) -> None:
    with (
        emulated_gpu("sm_87"),
        pytest.raises(EdgeError, match=r"no kernels for this GPU \(sm_87\), only kernels-sm_120.*--target"),
    ):
        open_on_device(bundle)


def test_a_bundle_without_an_engine_says_how_to_build_one(
    bundle: Bundle, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EdgeError, match=r"no engine for TensorRT-RTX \S+ on sm_86 .*run: edge build"):
        open_engine(bundle.path, OPTIONS)
    with pytest.raises(UsageError, match="leave out --attention and --sparse"):
        open_engine(bundle.path, replace(OPTIONS, attention="dense"))


def test_an_engine_of_functions_is_refused(bundle: Bundle, driver: EmulatedDriver) -> None:
    file = engine_file(bundle)
    functions = replace(file, recipe=replace(file.recipe, plugins=""))
    with pytest.raises(EdgeError, match=r"built from functions.*without --functions"):
        open_executor(bundle, OPTIONS, open_device(), Flavour(NAME, Api()), functions)


def test_an_engine_that_does_not_load_is_to_be_built_again(bundle: Bundle, driver: EmulatedDriver) -> None:
    class Refusing(Api):
        def deserialize_cuda_engine(self, data: bytes) -> None:
            return None

    with pytest.raises(EdgeError, match=rf"{NAME} does not load {engine_file(bundle).path} .*edge build"):
        open_on_device(bundle, api=Refusing())
