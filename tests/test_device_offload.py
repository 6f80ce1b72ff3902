"""KV pages in host memory, on the emulated driver: what a model says does not depend on how many are on the device.

The emulated driver runs queued work when something waits for it, no earlier: copies that nobody waits for have not
happened. `hasten` is the other extreme, copies that happen as soon as their own stream allows.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.tensorrt import BuildOptions
from edge.bundle import Bundle
from edge.config import ModelConfig, SparseConfig
from edge.cuda import CudaError, Event, Stream, pinned
from edge.engine import Engine
from edge.errors import EdgeError, UsageError
from edge.executors.offload import DeviceOffload, OffloadCounts
from edge.executors.tensorrt import TensorRTExecutor
from edge.kv_cache import COMPRESSED_POOLS, pool_layout
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.scheduler import Scheduler
from edge.scheduler import Sequence as ScheduledSequence
from plugins.simt.driver.library import EmulatedDriver
from tests.device_engine import device_bundle, kernels_of, open_on_device
from tests.emulated import emulated_gpu
from tests.engine_stand_in import view
from tests.synthetic import tiny_config, write_hf_checkpoint
from tests.test_tensorrt_executor import draw_params

# Each KV head chooses one block besides the first and a token's own: a token needs 4 pages, and 2 of a sequence stay.
SPARSE = SparseConfig(init_blocks=1, window_size=0, topk=3, dense_len=128)
SLOTS, PAGES = 6, 12
BUILD = BuildOptions(max_context=64 * PAGES, chunk=64, batch=2)
OPTIONS = EngineOptions(context=64 * PAGES, chunk=64)
PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=10, ignore_eos=True)
LENGTH = 450


def make_bundle(folder: Path, sparse: SparseConfig | None) -> Bundle:
    config = tiny_config(hidden_size=128, intermediate_size=256, head_dim=64, tie_word_embeddings=False, sparse=sparse)
    return device_bundle(open_checkpoint(write_hf_checkpoint(folder / "hf", config)), folder / "bundle")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("offload"), SPARSE)


@pytest.fixture
def driver(bundle: Bundle) -> Generator[EmulatedDriver, None, None]:
    with emulated_gpu("sm_86", kernels_of(bundle.config)) as driver:
        yield driver


def prompt(length: int = LENGTH, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(5, 320, length).tolist()


def page_bytes(config: ModelConfig) -> int:
    """Of one page in one layer, without its compressed keys."""
    layout = pool_layout(config, {"activation": "float16", "kv": "float16"})
    return sum(page.nbytes for name, page in layout.items() if name not in COMPRESSED_POOLS)


def budget(bundle: Bundle, slots: int) -> int:
    """A budget for so many pages on the device, and a bit."""
    roomy = open_on_device(bundle, OPTIONS, build=BUILD).plan
    missing = (PAGES - slots) * page_bytes(bundle.config) * bundle.config.num_hidden_layers
    return roomy.total - missing + 1000


def open_offloaded(bundle: Bundle, slots: int = SLOTS) -> Engine:
    options = replace(OPTIONS, memory=budget(bundle, slots), offload=Path("host"))
    return open_on_device(bundle, options, build=BUILD)


def executor_of(engine: Engine) -> TensorRTExecutor:
    assert isinstance(engine.executor, TensorRTExecutor)
    return engine.executor


def offload_of(engine: Engine) -> DeviceOffload:
    offload = executor_of(engine).offload
    assert offload is not None
    return offload


@dataclass(frozen=True)
class Outcome:
    """A reply, and all averaged keys: no token's attention in the layers before the last can be wrong unseen."""

    tokens: list[int]
    windows: list[np.ndarray]

    def agrees(self, other: Outcome) -> bool:
        pairs = zip(self.windows, other.windows, strict=True)
        return self.tokens == other.tokens and all(np.allclose(a, b, atol=0.002, equal_nan=True) for a, b in pairs)


def outcome_of(engine: Engine, tokens: list[int]) -> Outcome:
    pools = {name: pool for name, pool in executor_of(engine)._kv.items() if name.startswith(COMPRESSED_POOLS)}
    windows = [view(pool.address, pool.shape, np.dtype(np.float16)).astype(np.float32) for pool in pools.values()]
    return Outcome(tokens, windows)


def run(engine: Engine, params: SamplingParams = PARAMS) -> Outcome:
    return outcome_of(engine, [event.token_id for event in engine.generate(prompt(), params)])


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> Outcome:
    """What comes out when all pages are on the device, and decoding is captured."""
    with emulated_gpu("sm_86", kernels_of(bundle.config)):
        engine = open_on_device(bundle, OPTIONS, build=BUILD)
        outcome = run(engine)
        assert executor_of(engine).offload is None and "CUDA graph" in engine.describe()["decode"]
    assert len(set(outcome.tokens)) > 6 and np.nanmax(np.abs(outcome.windows[-1])) > 0.2
    return outcome


def hasten(offload: DeviceOffload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are done once they are queued, with whatever they wait for and nothing else."""
    copies, record = offload._copies, offload._copies.record

    def record_and_run(event: Event | None = None) -> Event:
        recorded = record(event)
        copies.synchronize()
        return recorded

    monkeypatch.setattr(copies, "record", record_and_run)


# Tokens


def test_pages_on_the_host_change_nothing(bundle: Bundle, driver: EmulatedDriver, expected: Outcome) -> None:
    engine = open_offloaded(bundle)
    assert (engine.plan.num_pages, engine.plan.resident_pages) == (PAGES, SLOTS)
    assert run(engine).agrees(expected)
    assert driver.counts().graph_launches == 0
    facts = engine.describe()
    assert facts["kv"] == f"float16, {SLOTS} of {PAGES} pages on the device"
    assert facts["decode"].startswith("stream, not captured: pages come from the host")
    counts = offload_of(engine).counts
    size = page_bytes(bundle.config)
    # Every layer has begun all pages and has room for six: the others were saved, and came back when they were chosen.
    assert counts.pages.saved >= bundle.config.num_hidden_layers * (-(-LENGTH // 64) - SLOTS)
    assert counts.pages.misses > 20 and counts.pages.hits > counts.pages.misses
    assert counts == OffloadCounts(counts.pages, size * counts.pages.misses, size * counts.pages.saved)


def test_copies_may_come_as_early_as_they_like(
    bundle: Bundle, driver: EmulatedDriver, expected: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_offloaded(bundle)
    hasten(offload_of(engine), monkeypatch)
    assert run(engine).agrees(expected)


def without_wait(offload: DeviceOffload, monkeypatch: pytest.MonkeyPatch, *, of_copies: bool) -> None:
    """Events that one side waits for are passed over: copies' or kernels'."""
    wait = Stream.wait

    def skip(stream: Stream, event: Event) -> None:
        if (stream is offload._copies) != of_copies:
            wait(stream, event)

    monkeypatch.setattr(Stream, "wait", skip)


@pytest.mark.parametrize("of_copies", [False, True], ids=["kernels", "copies"])
def test_a_wait_left_out_shows(
    bundle: Bundle, driver: EmulatedDriver, expected: Outcome, monkeypatch: pytest.MonkeyPatch, of_copies: bool
) -> None:
    """What these tests are worth: kernels that do not wait for copies, and copies that overtake kernels."""
    engine = open_offloaded(bundle)
    if of_copies:
        hasten(offload_of(engine), monkeypatch)
    without_wait(offload_of(engine), monkeypatch, of_copies=of_copies)
    try:
        assert not run(engine).agrees(expected)
    except EdgeError as error:
        assert "no logit is finite" in str(error)


def test_pages_are_copied_on_a_stream_of_their_own(
    bundle: Bundle, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, size = open_offloaded(bundle), page_bytes(bundle.config)
    copied: dict[str, list[bool]] = {"upload": [], "download": []}
    for name, streams in copied.items():
        plain = getattr(Stream, name)

        def copy(stream: Stream, target: Any, source: Any, plain: Any = plain, streams: list[bool] = streams) -> None:
            if source.nbytes == size:
                streams.append(int(stream.handle) == int(offload_of(engine)._copies.handle))
            plain(stream, target, source)

        monkeypatch.setattr(Stream, name, copy)
    run(engine, replace(PARAMS, max_tokens=3))
    counts = offload_of(engine).counts.pages
    assert int(offload_of(engine)._copies.handle) != int(executor_of(engine)._stream.handle)
    assert copied == {"upload": [True] * (counts.misses + counts.prefetched), "download": [True] * counts.saved}


def decode_batch(engine: Engine, lengths: list[int], bursts: int) -> np.ndarray:
    """Tokens [steps, sequences] of prompts that were computed one after the other, decoded together."""
    sequences = []
    for i, length in enumerate(lengths):
        sequence = ScheduledSequence(engine.cache.open(), prompt(length, seed=i), prompt_length=length)
        engine.advance(sequence)
        sequence.tokens.append(7 + i)
        sequences.append(sequence)
    tokens, count = [], 4
    for burst in range(bursts):
        for sequence in sequences:
            engine.cache.reserve(sequence.cache_id, sequence.computed + count)
        batch = Scheduler(engine.cache, 64).next_step(sequences).batch
        drawn = executor_of(engine).decode(batch, draw_params([0.0, 1.0], step=100 + count * burst), count)
        for sequence, column in zip(sequences, drawn.T, strict=True):
            sequence.tokens.extend(column.tolist())
            sequence.computed += count
        tokens.append(drawn)
    return np.concatenate(tokens)


@pytest.mark.parametrize("lengths", [[300, 330], [100, 320]], ids=["sparse", "dense beside sparse"])
def test_sequences_of_a_batch_take_turns_in_the_slots(
    bundle: Bundle, driver: EmulatedDriver, lengths: list[int]
) -> None:
    """Together they need more pages than there are slots: each attends in a run, to pages that came ahead of it."""
    roomy, tight = open_on_device(bundle, OPTIONS, build=BUILD), open_offloaded(bundle)
    assert np.array_equal(decode_batch(tight, lengths, 2), decode_batch(roomy, lengths, 2))
    counts = offload_of(tight).counts.pages
    assert counts.prefetched >= counts.useful > 0
    # Beside what a token may need there is room for one sequence's initial page and the one it writes to.
    pages = tight.cache.pages(1)
    assert set(np.flatnonzero(offload_of(tight)._pinned)) == {pages[0], pages[(lengths[0] + 7) // 64]}


@pytest.mark.parametrize("guesses", [True, False])
def test_a_conversation_goes_on_after_another_one_took_the_slots(
    bundle: Bundle, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch, guesses: bool
) -> None:
    """Its last page comes back half full and is written on, and so does the one before, which a window reaches into.

    That they usually come ahead of need must not be what makes it right.
    """
    if not guesses:
        monkeypatch.setattr(DeviceOffload, "_prefetch", lambda *_: None)
    outcomes = []
    for engine in (open_on_device(bundle, OPTIONS, build=BUILD), open_offloaded(bundle)):
        first, other = engine.open_session(), engine.open_session()
        said = [event.token_id for event in first.generate(prompt(150), PARAMS)]
        list(other.generate(prompt(400, seed=1), replace(PARAMS, max_tokens=2)))
        again = [*prompt(150), *said, *prompt(30, seed=2)]
        outcomes.append(outcome_of(engine, [event.token_id for event in first.generate(again, PARAMS)]))
        first.close()
        other.close()
    assert outcomes[1].agrees(outcomes[0])


def test_keys_before_rotation_go_along(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, replace(SPARSE, use_nope=True))
    with emulated_gpu("sm_86", kernels_of(bundle.config)):
        engines = open_on_device(bundle, OPTIONS, build=BUILD), open_offloaded(bundle, 7)
        expected, outcome = (run(engine, replace(PARAMS, max_tokens=4)) for engine in engines)
        assert outcome.agrees(expected)
        counts = offload_of(engines[1]).counts
        assert counts.bytes_out == counts.pages.saved * 3 * 2 * 64 * 64 * 2 > 0


# Memory


def test_all_of_the_memory_is_in_the_plan(bundle: Bundle, driver: EmulatedDriver) -> None:
    limit = budget(bundle, SLOTS)
    before = driver.counts().pinned_bytes
    engine = open_offloaded(bundle)
    executor, plan = executor_of(engine), engine.plan
    assert executor._pool.used == executor._pool.size
    size, layers = page_bytes(bundle.config), bundle.config.num_hidden_layers
    assert plan.bytes("offloaded kv") == PAGES * layers * size
    assert plan.kv == SLOTS * layers * size + PAGES * layers * (2 * 4 + 2) * 64 * 2
    assert plan.total <= limit
    assert plan.bytes("offloaded kv") < driver.counts().pinned_bytes - before < plan.bytes("offloaded kv") + (1 << 20)
    few = replace(PARAMS, max_tokens=2)
    run(engine, few)
    after = driver.counts()
    run(engine, few)
    again = driver.counts()
    assert (again.allocations, again.pinned_bytes, again.events) == (
        after.allocations,
        after.pinned_bytes,
        after.events,
    )


def test_what_fits_on_the_device_is_not_offloaded(bundle: Bundle, driver: EmulatedDriver) -> None:
    engine = open_on_device(bundle, replace(OPTIONS, offload=Path("host")), build=BUILD)
    assert (
        executor_of(engine).offload is None
        and engine.plan.resident_pages is None
        and engine.plan.bytes("offloaded kv") == 0
    )


def test_too_little_device_memory_is_refused_with_what_a_token_needs(bundle: Bundle, driver: EmulatedDriver) -> None:
    options = replace(OPTIONS, offload=Path("host"))
    short = replace(options, memory=budget(bundle, 5))
    with pytest.raises(
        EdgeError,
        match=r"768 tokens needs \d+MiB though its pages are offloaded: .* the 6 pages that must be .*--context 320",
    ):
        open_on_device(bundle, short, build=BUILD)
    fitting = open_on_device(bundle, replace(short, context=320), build=BUILD)
    assert fitting.plan.num_pages == 5 and executor_of(fitting).offload is None


def test_too_little_host_memory_is_refused_or_shortens_the_context(
    bundle: Bundle, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = page_bytes(bundle.config) * bundle.config.num_hidden_layers
    options = replace(OPTIONS, memory=budget(bundle, SLOTS), offload=Path("host"))
    monkeypatch.setattr("edge.executors.tensorrt_open.available_memory", lambda: 11 * size * 10 // 9 + 10)
    with pytest.raises(
        EdgeError, match=r"pages of 768 tokens need 1MiB of host memory, and 0MiB of it can be had; .*--context 704"
    ):
        open_on_device(bundle, options, build=BUILD)
    plan = open_on_device(bundle, replace(options, context=None), build=BUILD).plan
    assert (plan.num_pages, plan.max_context) == (11, 704) and plan.resident_pages >= SLOTS


def test_pinned_memory_that_cannot_be_had_says_how_much_it_is(driver: EmulatedDriver, bundle: Bundle) -> None:
    open_on_device(bundle, OPTIONS, build=BUILD)
    with pytest.raises(CudaError, match=r"268435456 MiB of page-locked host memory cannot be had .*smaller --context"):
        pinned((1 << 48,), np.uint8)


def test_dense_attention_and_shared_memory_are_refused(tmp_path: Path) -> None:
    dense = make_bundle(tmp_path, None)
    options = replace(OPTIONS, offload=Path("host"))
    refused = pytest.raises(UsageError, match=r"dense attention, which reads every page.*leave out --offload")
    with emulated_gpu("sm_86", kernels_of(dense.config)), refused:
        open_on_device(dense, options, build=BUILD)
    with (
        emulated_gpu("sm_87"),
        pytest.raises(UsageError, match=r"shares its memory with the host.*leave out --offload"),
    ):
        open_on_device(dense, options, build=BUILD)
