"""The loop over an executor that draws tokens by itself: bursts change nothing about a reply."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.draw import DeviceDraw
from edge.engine import Engine, open_engine
from edge.errors import EdgeError
from edge.executor import DecodingExecutor, DrawParams, StepBatch
from edge.plan import EngineOptions
from edge.sampler import Sampler, SamplingParams, apply_repetition_penalty
from edge.serving.batcher import Batcher, BatchLimits
from edge.serving.request import Request
from plugins.sampling.meaning import DecodeState, SamplingInputs, advance, mark_seen, sample
from tests.test_engine import GREEDY, prompt, reply
from tests.wrapped_executor import WrappedExecutor


class Decoding(WrappedExecutor):
    """A CPU executor made to decode like a device: the kernels' meanings, a step at a time, no look from the host."""

    def __init__(self, engine: Engine, burst: int) -> None:
        super().__init__(engine)
        self.burst, self.bursts = burst, list[int]()

    def decode(self, batch: StepBatch, params: DrawParams, count: int) -> np.ndarray:
        self.bursts.append(count)
        rows = len(batch.page_table)
        copies = [a.copy() for a in (batch.input_ids, batch.positions, batch.switch_length, params.step)]
        state = DecodeState(*copies, np.zeros(rows, np.int32), np.zeros((count, rows), np.int32))
        draw = {field.name: getattr(params, field.name) for field in fields(DrawParams)}
        for _ in range(count):
            now = replace(
                batch, input_ids=state.input_ids, positions=state.positions, switch_length=state.switch_length
            )
            logits = self.inner.step(now).logits
            tokens = sample(SamplingInputs(logits, **draw | {"step": state.step}))
            if params.seen is not None:
                mark_seen(params.seen, tokens)
            advance(tokens, state)
        return state.history


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return open_engine(tiny_bundle, EngineOptions(context=192, chunk=16, prefix_cache=False))


def decoding(engine: Engine, burst: int) -> Engine:
    """The engine with another burst; its executor may be wrapped already."""
    if isinstance(engine.executor, Decoding):
        engine.executor = engine.executor.inner
    assert isinstance(Decoding(engine, burst), DecodingExecutor)
    return engine


SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.3, seed=5, ignore_eos=True)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(burst=st.integers(1, 9), length=st.integers(1, 70), tokens=st.integers(1, 12))
def test_bursts_of_any_length_give_the_host_loops_tokens(engine: Engine, burst: int, length: int, tokens: int) -> None:
    params = replace(GREEDY, max_tokens=tokens)
    on_device = reply(decoding(engine, burst), prompt(length), params)
    assert sum(engine.executor.bursts) == tokens - 1 and max(engine.executor.bursts, default=0) <= burst
    engine.executor = engine.executor.inner
    assert on_device == reply(engine, prompt(length), params)


def test_a_draw_depends_on_its_seed_and_place_not_on_bursts(engine: Engine) -> None:
    replies = {
        tuple(reply(decoding(engine, burst), prompt(20), replace(SAMPLED, max_tokens=12))) for burst in (1, 5, 16)
    }
    assert len(replies) == 1
    other = replace(SAMPLED, max_tokens=12, seed=6)
    assert tuple(reply(engine, prompt(20), other)) not in replies
    unseeded = replace(other, seed=None)
    assert reply(engine, prompt(20), unseeded) != reply(engine, prompt(20), unseeded)


def test_a_reply_that_ends_inside_a_burst_keeps_only_what_it_said(engine: Engine) -> None:
    decoding(engine, 8)
    ids = prompt(30)
    whole = reply(engine, ids)
    session = engine.open_session()
    replies = session.generate(ids, GREEDY)
    taken = [next(replies).token_id for _ in range(3)]
    replies.close()
    # The next turn goes on from what was taken; the rest of the burst must not show.
    second = [event.token_id for event in session.generate([*ids, *taken, 11, 12], GREEDY)]
    session.close()
    assert taken == whole[:3]
    assert second == reply(engine, [*ids, *taken, 11, 12])
    assert engine.cache.free_pages == engine.cache.num_pages


def test_the_context_ends_a_reply_at_its_last_page(engine: Engine) -> None:
    decoding(engine, 16)
    ids = prompt(engine.max_context - 5)
    params = replace(GREEDY, max_tokens=100)
    assert len(reply(engine, ids, params)) == 5


def test_logits_without_a_choice_are_an_error(engine: Engine) -> None:
    draw = DeviceDraw(SamplingParams(), 16)
    with pytest.raises(EdgeError, match="no logit is finite"):
        draw.first(np.full(16, -np.inf, np.float32), [1])
    decoding(engine, 4)
    engine.executor.decode = lambda batch, params, count: np.full((count, 1), -1, np.int32)  # type: ignore[method-assign]
    with pytest.raises(EdgeError, match="no logit is finite"):
        reply(engine, prompt(4))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_the_first_token_is_the_host_samplers_when_greedy(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 100))
    tokens = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    penalty = data.draw(st.sampled_from([1.0, 1.25, 2.0]))
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32)
    params = SamplingParams(repetition_penalty=penalty)
    assert DeviceDraw(params, size).first(logits, tokens) == Sampler(params, tokens).sample(logits)
    seen = DeviceDraw(params, size).params(tokens).seen
    if penalty == 1:
        assert seen is None
    else:
        bits = np.unpackbits(seen.view(np.uint8), bitorder="little")[:size]
        assert set(np.flatnonzero(bits)) == set(tokens)
        assert apply_repetition_penalty(logits, np.unique(tokens), penalty).shape == logits.shape


def test_a_burst_takes_no_more_pages_than_there_are(tiny_bundle: Path) -> None:
    """Another conversation holds the pages of its later tokens: the reply goes on as far as its own pages reach."""
    engine = open_engine(tiny_bundle, EngineOptions(context=192, chunk=16))
    whole = reply(engine, prompt(60), replace(GREEDY, max_tokens=20))
    other = engine.open_session()
    list(other.generate(prompt(100, 1), GREEDY))
    Decoding(engine, 16)
    session, tokens = engine.open_session(), list[int]()
    with pytest.raises(EdgeError, match="65 tokens need 1 more KV pages of 64 tokens and 0 are free"):
        for event in session.generate(prompt(60), replace(GREEDY, max_tokens=20)):
            tokens.append(event.token_id)
    assert tokens == whole[:5]
    other.close()
    assert [event.token_id for event in session.generate(prompt(60), replace(GREEDY, max_tokens=20))] == whole
    session.close()
    assert engine.cache.free_pages == engine.cache.num_pages


def test_a_session_saved_inside_a_burst_has_what_was_taken_of_it(tiny_bundle: Path, tmp_path: Path) -> None:
    """Nothing of the rest is saved, published or found, neither by the session nor by others."""
    engine, cold = (
        open_engine(tiny_bundle, EngineOptions(context=640, chunk=16, prefix_cache=on)) for on in (True, False)
    )
    Decoding(engine, 16)
    session, ids = engine.open_session(), prompt(120)
    replies = session.generate(ids, replace(GREEDY, max_tokens=17))
    taken = [next(replies).token_id for _ in range(5)]
    assert session._sequence.computed == 124 and len(engine.cache.pages(session._sequence.cache_id)) == 3
    session.save(tmp_path / "session")
    restored = engine.restore_session(tmp_path / "session")
    again = [*ids, *taken, 11, 12, 13, 14]
    expected = reply(cold, again)
    assert [event.token_id for event in restored.generate(again, GREEDY)] == expected
    assert [event.token_id for event in session.generate(again, GREEDY)] == expected
    assert reply(engine, again) == expected
    with pytest.raises(RuntimeError, match="ended by a later one"):
        next(replies)


def test_bursts_of_several_requests_give_each_its_own_tokens(tiny_bundle: Path) -> None:
    """Some end early, some are sampled, one wants log-probabilities, which a device does not give."""
    options = EngineOptions(context=192, chunk=64, sequences=4)
    single = open_engine(tiny_bundle, options)
    engine = open_engine(tiny_bundle, options)
    wrapped = [Decoding(single, 16), Decoding(engine, 16)]
    batcher = Batcher(engine, BatchLimits(sequences=4))
    more = [{}, {"temperature": 0.9, "seed": 4, "repetition_penalty": 1.2}, {"temperature": 0.7, "seed": 8}, {}]
    requests = [
        Request(tuple(prompt(20 + 9 * i, i)), SamplingParams(max_tokens=9 + 11 * i, ignore_eos=i != 3, **values))
        for i, values in enumerate(more)
    ]
    listed = Request(requests[0].prompt_ids, replace(requests[0].params, logprobs=2))
    for batch in (requests, [*requests, listed]):
        tickets = [batcher.ticket(request) for request in batch]
        for ticket in tickets:
            batcher.add(ticket)
        while batcher.running or len(batcher.queue):
            batcher.step()
        for ticket in tickets:
            events = [event for output in ticket.outbox.take() for event in output.tokens]
            wanted = list(single.generate(ticket.request.prompt_ids, ticket.request.params))
            assert [event.token_id for event in events] == [event.token_id for event in wanted]
            assert events[-1].finish_reason == wanted[-1].finish_reason
            assert all((event.logprobs is None) == (ticket.request is not listed) for event in events)
    assert max(wrapped[1].bursts) > 1 and engine.cache.free_pages == engine.cache.num_pages
