"""The loop and its conversations: what is cached, when a reply ends, what happens when it is cut short."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import MANIFEST, open_bundle
from edge.config import LongRope
from edge.engine import Engine, open_engine
from edge.errors import EdgeError, UsageError
from edge.executor import StepBatch, StepResult
from edge.executors import tensorrt_open
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from tests.synthetic import tiny_config, write_hf_checkpoint
from tests.wrapped_executor import WrappedExecutor

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture
def engine(tiny_bundle: Path) -> Engine:
    return open_engine(tiny_bundle, EngineOptions(context=256, chunk=16))


@pytest.fixture
def cold(tiny_bundle: Path) -> Engine:
    """An engine that keeps nothing of any prompt: the truth to compare with."""
    return open_engine(tiny_bundle, EngineOptions(context=256, chunk=512, prefix_cache=False))


def no_device() -> None:
    raise EdgeError("there is no CUDA driver here")


class Counting(WrappedExecutor):
    """An executor that counts the tokens that pass through it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.tokens = 0

    def step(self, batch: StepBatch) -> StepResult:
        self.tokens += len(batch.input_ids)
        return super().step(batch)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, 200, length).tolist()


def reply(engine: Engine, ids: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return [event.token_id for event in engine.generate(ids, params)]


def test_a_second_turn_computes_only_what_is_new(engine: Engine, cold: Engine) -> None:
    first = prompt(100)
    session, counting = engine.open_session(), Counting(engine)
    answer = [event.token_id for event in session.generate(first, GREEDY)]
    assert counting.tokens == 100 + 7  # the last token of the reply is sampled and never computed
    second = first + answer + prompt(20, seed=1)
    counting.tokens = 0
    warm = [event.token_id for event in session.generate(second, GREEDY)]
    assert counting.tokens == 1 + 20 + 7
    assert warm == reply(cold, second)


@pytest.mark.parametrize("keep", [0, 1, 50, 63, 64, 65, 99])
def test_a_changed_history_is_computed_anew_from_the_change(engine: Engine, cold: Engine, keep: int) -> None:
    first = prompt(100)
    session = engine.open_session()
    list(session.generate(first, GREEDY))
    changed = first[:keep] + prompt(40, seed=2)
    counting = Counting(engine)
    warm = [event.token_id for event in session.generate(changed, GREEDY)]
    assert counting.tokens == len(changed) - keep + 7
    assert warm == reply(cold, changed)


def test_the_same_prompt_again_computes_its_last_token_only(engine: Engine) -> None:
    session = engine.open_session()
    first = [event.token_id for event in session.generate(prompt(70), GREEDY)]
    counting = Counting(engine)
    assert [event.token_id for event in session.generate(prompt(70), GREEDY)] == first
    assert counting.tokens == 1 + 7


def test_replies_end_for_the_reason_they_say(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(5)
    events = list(engine.generate(ids, SamplingParams(max_tokens=3, ignore_eos=True)))
    assert [e.finish_reason for e in events] == [None, None, "length"]
    end = events[1].token_id
    monkeypatch.setattr(Engine, "eos_token_ids", (end,))
    stopped = list(engine.generate(ids, SamplingParams(max_tokens=3)))
    assert [(e.token_id, e.finish_reason) for e in stopped][-1] == (end, "stop")
    assert len(stopped) <= 2
    ignored = list(engine.generate(ids, SamplingParams(max_tokens=3, ignore_eos=True)))
    assert [e.token_id for e in ignored] == [e.token_id for e in events]


def test_a_reply_ends_where_the_context_does(engine: Engine) -> None:
    events = list(engine.generate(prompt(250), SamplingParams(max_tokens=50, ignore_eos=True)))
    assert len(events) == 6
    assert events[-1].finish_reason == "length"


def test_seeds_repeat_and_differ(engine: Engine) -> None:
    def sampled(seed: int) -> list[int]:
        return reply(engine, prompt(10), SamplingParams(temperature=1.5, seed=seed, max_tokens=20, ignore_eos=True))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_an_abandoned_reply_frees_its_pages(engine: Engine) -> None:
    free = engine.cache.free_pages
    events = engine.generate(prompt(100), GREEDY)
    next(events)
    assert engine.cache.free_pages == free - 2
    events.close()
    assert engine.cache.free_pages == free


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_session_survives_an_interrupted_step(engine: Engine, cold: Engine, error: type[BaseException]) -> None:
    session, calls = engine.open_session(), 0
    original = engine.executor.step

    def fail_once(batch: StepBatch) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return original(batch)

    engine.executor.step = fail_once  # type: ignore[method-assign]
    with pytest.raises(error):
        list(session.generate(prompt(100), GREEDY))
    warm = [event.token_id for event in session.generate(prompt(100), GREEDY)]
    assert warm == reply(cold, prompt(100))
    session.close()
    assert engine.cache.free_pages == engine.cache.num_pages


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_ids_outside_the_vocabulary_are_named(engine: Engine, bad: int) -> None:
    with pytest.raises(UsageError, match=f"token id {bad} is"):
        reply(engine, [5, bad])


def test_prompts_that_cannot_be(engine: Engine) -> None:
    with pytest.raises(UsageError, match="empty"):
        reply(engine, [])
    with pytest.raises(EdgeError, match="has 256 tokens and the context is limited to 256"):
        reply(engine, prompt(256))


def test_two_sessions_do_not_see_each_other(engine: Engine, cold: Engine) -> None:
    a, b = engine.open_session(), engine.open_session()
    events_a = a.generate(prompt(40, 1), GREEDY)
    events_b = b.generate(prompt(90, 2), GREEDY)
    mixed = [(next(events_a).token_id, next(events_b).token_id) for _ in range(8)]
    assert [x for x, _ in mixed] == reply(cold, prompt(40, 1))
    assert [y for _, y in mixed] == reply(cold, prompt(90, 2))


def test_a_later_reply_of_a_session_ends_an_earlier_one(engine: Engine, cold: Engine) -> None:
    session = engine.open_session()
    early = session.generate(prompt(40, 1), GREEDY)
    next(early)
    late = session.generate(prompt(60, 2), GREEDY)
    first = next(late).token_id
    with pytest.raises(RuntimeError, match="ended by a later one"):
        next(early)
    assert [first, *(event.token_id for event in late)] == reply(cold, prompt(60, 2))


def test_a_full_pool_stops_one_reply_and_spoils_nothing(engine: Engine, cold: Engine) -> None:
    """Two conversations in a pool for one: the page that is missing is missed in the middle of a reply."""
    a, b = engine.open_session(), engine.open_session()
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = reply(cold, prompt(120, 1), params)
    list(b.generate(prompt(100, 2), GREEDY))
    tokens = []
    with pytest.raises(EdgeError, match="129 tokens need 1 more KV pages of 64 tokens and 0 are free"):
        for event in a.generate(prompt(120, 1), params):
            tokens.append(event.token_id)
    assert tokens == expected[:9]
    b.close()
    assert [event.token_id for event in a.generate(prompt(120, 1), params)] == expected
    a.close()
    assert engine.cache.free_pages == engine.cache.num_pages


def test_progress_counts_the_prompt_and_nothing_else(engine: Engine) -> None:
    session, calls = engine.open_session(), []
    list(session.generate(prompt(40), GREEDY, lambda done, total: calls.append((done, total))))
    assert calls == [(16, 40), (32, 40), (40, 40)]
    calls.clear()
    list(session.generate(prompt(40) + prompt(10, 1), GREEDY, lambda done, total: calls.append((done, total))))
    assert calls == [(50, 50)]


def test_abandoned_logits_free_their_pages(engine: Engine) -> None:
    rows = engine.stream_logits(prompt(100), 100)
    assert next(rows).shape == (16, engine.vocab_size)
    rows.close()
    assert engine.cache.free_pages == engine.cache.num_pages


@pytest.fixture(scope="module")
def switching(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose LongRoPE lists differ and change at 64 tokens."""
    folder = tmp_path_factory.mktemp("switching")
    rope = LongRope((1.0,) * 8, tuple(4.0 + i for i in range(8)), 64)
    config = tiny_config(tie_word_embeddings=False, long_rope=rope)
    checkpoint = open_checkpoint(write_hf_checkpoint(folder / "checkpoint", config))
    return export_bundle(checkpoint, folder / "bundle", ExportOptions(weights=WeightFormat("exact")))


@pytest.mark.parametrize("lengths", [(40, 100, 120), (60, 66), (100, 40), (40, 50), (100, 120)])
def test_turns_across_longropes_limit_are_as_cold_runs(switching: Path, lengths: tuple[int, ...]) -> None:
    """Keys rotated by one list are no use to a prompt that needs the other; within a list they are kept."""
    engine = open_engine(switching, EngineOptions(context=256, chunk=16))
    cold = open_engine(switching, EngineOptions(context=256, chunk=512, prefix_cache=False))
    session, counting = engine.open_session(), Counting(engine)
    history: list[int] = []
    for turn, length in enumerate(lengths):
        shared = min(len(history), length - 10)
        kept = shared if (len(history) > 64) == (length > 64) else 0
        history = history[:shared] + prompt(length - shared, seed=turn)
        counting.tokens = 0
        assert [event.token_id for event in session.generate(history, GREEDY)] == reply(cold, history)
        assert counting.tokens == length - kept + 7


def test_a_bundle_for_another_executor_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_open, "open_device", no_device)  # another test may have loaded the emulated driver
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    manifest = replace(open_bundle(other).manifest, target="rtx")
    (other / MANIFEST).write_text(manifest.to_json())
    with pytest.raises(EdgeError, match=r"exported for rtx, which needs a GPU .*--target onnxruntime"):
        open_engine(other, EngineOptions())
