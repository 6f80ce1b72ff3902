"""The loop and its conversations: what is cached, when a reply ends, what happens when it is cut short."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edge.bundle import MANIFEST, Manifest, open_bundle
from edge.engine import Engine, open_engine
from edge.errors import EdgeError, UsageError
from edge.executor import StepBatch, StepResult
from edge.plan import EngineOptions, make_plan
from edge.sampler import SamplingParams

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture
def engine(tiny_bundle: Path) -> Engine:
    return open_engine(tiny_bundle, EngineOptions(context=256, chunk=16))


@pytest.fixture
def cold(tiny_bundle: Path) -> Engine:
    """An engine that never saw the conversation: the truth to compare with."""
    return open_engine(tiny_bundle, EngineOptions(context=256, chunk=512))


class Counting:
    """An executor that counts the tokens that pass through it."""

    def __init__(self, engine: Engine) -> None:
        self.inner, self.tokens = engine._executor, 0
        self.num_pages = self.inner.num_pages
        engine._executor = self

    def step(self, batch: StepBatch) -> StepResult:
        self.tokens += len(batch.input_ids)
        return self.inner.step(batch)

    def describe(self) -> dict[str, str]:
        return self.inner.describe()


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
    original = engine._executor.step

    def fail_once(batch: StepBatch) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return original(batch)

    engine._executor.step = fail_once  # type: ignore[method-assign]
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


class TestPlan:
    def test_the_least_budget_that_a_refusal_names_is_enough(self, tiny_bundle: Path) -> None:
        bundle = open_bundle(tiny_bundle)
        with pytest.raises(EdgeError, match="before its first KV page") as refusal:
            make_plan(bundle, EngineOptions(memory=1 << 20))
        needed = float(str(refusal.value).split("the model needs ")[1].split(" GiB")[0])
        plan = make_plan(bundle, EngineOptions(memory=int((needed + 0.01) * 2**30)))
        assert plan.total <= (needed + 0.01) * 2**30

    def test_the_context_that_a_refusal_offers_fits(self, tiny_bundle: Path) -> None:
        bundle = open_bundle(tiny_bundle)
        memory = make_plan(bundle, EngineOptions(context=64)).total + 5 * 32768
        with pytest.raises(EdgeError, match="ask for --context") as refusal:
            make_plan(bundle, EngineOptions(context=10**6, memory=memory))
        offered = int(str(refusal.value).split("--context ")[1].split(" ")[0])
        assert make_plan(bundle, EngineOptions(context=offered, memory=memory)).max_context == offered
        with pytest.raises(EdgeError):
            make_plan(bundle, EngineOptions(context=offered + 64, memory=memory))

    def test_without_a_wish_the_context_is_the_models_or_what_fits(self, tiny_bundle: Path) -> None:
        bundle = open_bundle(tiny_bundle)
        limit = bundle.manifest.limits["max_context"]
        assert make_plan(bundle, EngineOptions()).max_context == limit
        memory = make_plan(bundle, EngineOptions(context=64)).total + 32768
        assert 64 <= make_plan(bundle, EngineOptions(memory=memory)).max_context < limit

    def test_a_context_beyond_the_training_length_is_the_users_choice(self, tiny_bundle: Path) -> None:
        bundle = open_bundle(tiny_bundle)
        wanted = bundle.manifest.limits["max_context"] + 100
        assert make_plan(bundle, EngineOptions(context=wanted)).max_context == wanted


def test_a_bundle_for_another_executor_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    values = json.loads((other / MANIFEST).read_text())
    values.pop("key")
    manifest = Manifest.from_json(json.dumps({**values, "key": _key({**values, "target": "rtx"}), "target": "rtx"}))
    (other / MANIFEST).write_text(manifest.to_json())
    with pytest.raises(UsageError, match="exported for rtx"):
        open_engine(other, EngineOptions())


def _key(values: dict[str, object]) -> str:
    import hashlib

    content = {k: v for k, v in values.items() if k not in ("name", "tools")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
