"""Many requests on one engine: none is lost, mixed or starved, no page leaks, and replies are those of single runs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import Bundle, open_bundle
from edge.chooser import TokenLogprobs
from edge.config import LongRope, SparseConfig
from edge.engine import Engine, open_engine
from edge.errors import EdgeError
from edge.executor import StepBatch, StepResult
from edge.memory.run import Run
from edge.plan import EngineOptions, Plan
from edge.sampler import SamplingParams
from edge.scheduler import Sequence as ScheduledSequence
from edge.serving.batcher import Batcher, BatchLimits
from edge.serving.request import Request, Ticket
from edge.speculation.speculator import Limits, Speculation, Way
from edge.speculation.tree import TokenTree
from plugins import PAGE_TOKENS
from tests.ledger_run import Always, paced
from tests.synthetic import tiny_config, write_hf_checkpoint
from tests.test_speculation import Eager, Prophet

VOCAB = 320
CONTEXT = 256
END = 2


def next_token(tokens: Sequence[int]) -> int:
    """What the fake model says after these tokens; it depends on every one of them."""
    code = zlib.crc32(np.asarray(tokens, np.int32).tobytes())
    return END if code % 97 == 0 else 10 + code % 300


def truth(prompt: Sequence[int], limit: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(limit):
        tokens.append(next_token(tokens))
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :]


class FakeExecutor:
    """Keeps token ids where a real executor keeps their keys, and answers by what it then finds in the pages."""

    def __init__(self, pages: int) -> None:
        self.num_pages = pages
        self.pool = np.full((pages, PAGE_TOKENS), -1)
        self.most_sequences = 0

    def step(self, batch: StepBatch) -> StepResult:
        self.most_sequences = max(self.most_sequences, len(batch.page_table))
        places = np.repeat(np.arange(len(batch.page_table)), np.diff(batch.query_start))
        pages = batch.page_table[places, batch.positions // PAGE_TOKENS]
        self.pool[pages, batch.positions % PAGE_TOKENS] = batch.input_ids
        logits = np.zeros((len(batch.logits_rows), VOCAB), np.float32)
        for row, where in enumerate(batch.logits_rows):
            visible = batch.positions[where] + 1
            seen = self.pool[batch.page_table[places[where]]].reshape(-1)[:visible]
            logits[row, next_token(seen)] = 1
        return StepResult(logits)

    def keep_tokens(self, pages: Sequence[int], first: int, slots: Sequence[int]) -> None:
        raise AssertionError("nobody speculates")

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.pool[target] = self.pool[source]

    def describe(self) -> dict[str, str]:
        return {}

    def memory(self) -> Mapping[str, int]:
        return {}


def fake_engine(bundle: Bundle, pages: int, sequences: int = 4, chunk: int = 32) -> Engine:
    plan = Plan(Run(CONTEXT, sequences, chunk=chunk, rows=16, spare=pages - CONTEXT // PAGE_TOKENS), (), 0)
    return Engine(bundle, FakeExecutor(pages), plan, chunk)  # type: ignore[arg-type]


class Reader:
    """What a client has read of its ticket."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.of_prompt: tuple[TokenLogprobs, ...] = ()

    def read(self) -> None:
        for output in self.ticket.outbox.take():
            self.of_prompt = self.of_prompt or output.prompt_logprobs
            assert self.reason is None, "an output came after the end"
            self.tokens += [event.token_id for event in output.tokens]
            self.reason = output.finish_reason

    def check(self) -> None:
        wanted = truth(self.ticket.request.prompt_ids, self.ticket.request.params.max_tokens)
        if self.reason in ("stop", "length"):
            assert self.tokens == wanted and self.reason == ("stop" if wanted[-1] == END else "length")
        else:
            assert self.reason in ("abort", "timeout") and self.tokens == wanted[: len(self.tokens)]


def prompt_ids(length: int, kind: int) -> tuple[int, ...]:
    """Prompts of a kind begin alike, so that pages are shared."""
    return tuple(np.random.default_rng(kind).integers(10, VOCAB, length).tolist())


class Serving(RuleBasedStateMachine):
    """Five pages for contexts of four: two requests of any length are too many."""

    bundle: Bundle

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.engine = fake_engine(self.bundle, 5, sequences=3)
        limits = BatchLimits(sequences=3, unread=6)
        self.batcher = Batcher(self.engine, limits, clock=lambda: self.now)
        self.readers: list[Reader] = []

    @rule(
        length=st.integers(1, 200),
        kind=st.integers(0, 2),
        limit=st.integers(1, 56),
        client=st.sampled_from("abc"),
        timeout=st.sampled_from([None, None, 40.0]),
        choices=st.integers(1, 2),
    )
    def submit(self, length: int, kind: int, limit: int, client: str, timeout: float | None, choices: int) -> None:
        request = Request(prompt_ids(length, kind), SamplingParams(max_tokens=limit), client, timeout)
        first = None
        for _ in range(choices):
            ticket = self.batcher.ticket(request, first)
            first = first or ticket
            self.batcher.add(ticket)
            self.readers.append(Reader(ticket))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        free, held = self.engine.cache.free_pages, 0
        if reader.ticket.sequence is not None:
            held = len(self.engine.cache.pages(reader.ticket.sequence.cache_id))
        self.batcher.cancel(reader.ticket)
        assert free <= self.engine.cache.free_pages <= free + held and reader.ticket.sequence is None

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.readers)).read()

    @rule(count=st.integers(1, 30))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.now += 1
            self.batcher.step()

    @invariant()
    def nothing_grows_and_nothing_leaks(self) -> None:
        batcher = self.batcher
        assert len(batcher.running) <= 3 and [t.number for t in batcher.running] == sorted(
            t.number for t in batcher.running
        )
        for ticket in batcher.queue:
            assert ticket.sequence is None or not self.engine.cache.pages(ticket.sequence.cache_id)
        for reader in self.readers:
            assert reader.ticket.outbox._unread <= 6
        known = {t.number for t in (*batcher.running, *batcher.queue)}
        assert known == {r.ticket.number for r in self.readers if r.ticket.finish_reason is None}

    def teardown(self) -> None:
        for _ in range(20000):
            for reader in self.readers:
                reader.read()
            self.now += 0.001
            if not self.batcher.step() and not len(self.batcher.queue) and not self.batcher.running:
                break
        for reader in self.readers:
            reader.read()
            reader.check()
        for client in "abc":  # each client's requests start in their order
            own = [r.ticket.statistics.admitted for r in self.readers if r.ticket.request.client == client]
            started = [time for time in own if time is not None]
            assert started == sorted(started)
        assert self.engine.cache.free_pages == self.engine.cache.num_pages
        assert not self.engine.cache._sequences


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def test_requests_in_any_order_of_events(bundle: Bundle) -> None:
    class Machine(Serving):
        pass

    Machine.bundle = bundle
    case = Machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
    case().runTest()


def drive(batcher: Batcher, readers: Sequence[Reader], most: int = 5000) -> int:
    """Steps until all have ended."""
    for number in range(most):
        batcher.step()
        for reader in readers:
            reader.read()
        if all(reader.reason is not None for reader in readers):
            return number + 1
    raise AssertionError([(r.reason, len(r.tokens)) for r in readers])


def submit(batcher: Batcher, request: Request, after: Ticket | None = None) -> Reader:
    ticket = batcher.ticket(request, after)
    batcher.add(ticket)
    return Reader(ticket)


def test_clients_take_turns(bundle: Bundle) -> None:
    """A client with ten requests delays one of another by the request that runs and one turn, not by ten."""
    engine = fake_engine(bundle, 4, sequences=1)
    batcher = Batcher(engine, BatchLimits(sequences=1))
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    flood = [submit(batcher, Request(prompt_ids(20, 0), params, "a")) for _ in range(10)]
    single = submit(batcher, Request(prompt_ids(20, 1), params, "b"))
    drive(batcher, [*flood, single])
    admitted = sorted([*flood, single], key=lambda r: (r.ticket.statistics.finished, r.ticket.number))
    order = [r.ticket.statistics.admitted for r in flood]
    assert order == sorted(order)
    assert admitted.index(single) <= 2


def test_a_reply_that_needs_pages_takes_those_of_the_youngest(bundle: Bundle) -> None:
    engine = fake_engine(bundle, 6)
    batcher = Batcher(engine, BatchLimits())
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    readers = [submit(batcher, Request(prompt_ids(60, kind), params)) for kind in range(4)]
    drive(batcher, readers)
    for reader in readers:
        tokens = list(reader.ticket.request.prompt_ids)
        for _ in range(100):
            tokens.append(next_token(tokens))
        assert reader.tokens == tokens[60:]
    assert readers[0].ticket.statistics.preemptions == 0
    assert sum(r.ticket.statistics.preemptions for r in readers) > 0
    assert engine.executor.most_sequences > 1  # type: ignore[attr-defined]


def test_who_does_not_read_pauses_and_makes_room(bundle: Bundle) -> None:
    engine = fake_engine(bundle, 8, sequences=2)
    batcher = Batcher(engine, BatchLimits(sequences=2, unread=5))
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    slow = [submit(batcher, Request(prompt_ids(30, kind), params)) for kind in range(2)]
    for _ in range(50):
        batcher.step()
    assert all(r.ticket.outbox.full for r in slow) and not batcher.step()
    quick = submit(batcher, Request(prompt_ids(30, 2), params))
    drive(batcher, [quick])
    assert sum(r.ticket.statistics.tokens for r in slow) == 10
    drive(batcher, slow)
    for reader in slow:
        assert len(reader.tokens) == 60
    assert engine.cache.free_pages == 8


def test_who_does_not_read_gives_its_pages_to_who_waits_for_them(bundle: Bundle) -> None:
    engine = fake_engine(bundle, 4)
    batcher = Batcher(engine, BatchLimits(unread=5))
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    slow = submit(batcher, Request(prompt_ids(150, 0), params))
    for _ in range(20):
        batcher.step()
    assert slow.ticket.outbox.full and engine.cache.free_pages == 1
    quick = submit(batcher, Request(prompt_ids(150, 1), params))
    drive(batcher, [quick])
    assert len(quick.tokens) == 20 and slow.ticket.statistics.preemptions == 1
    drive(batcher, [slow])
    assert len(slow.tokens) == 20


def test_what_can_never_be_served_is_refused_with_a_sentence(bundle: Bundle) -> None:
    batcher = Batcher(fake_engine(bundle, 8), BatchLimits())
    with pytest.raises(EdgeError, match=r"200 tokens, which with the 57 of the reply are 257.*limited to 256"):
        batcher.check(Request(prompt_ids(200, 0), SamplingParams(max_tokens=57)))
    batcher.check(Request(prompt_ids(200, 0), SamplingParams(max_tokens=56)))


def test_an_error_of_one_step_ends_its_requests_and_no_others(bundle: Bundle) -> None:
    engine = fake_engine(bundle, 16)
    batcher = Batcher(engine, BatchLimits())
    params = SamplingParams(max_tokens=4)
    failing = submit(batcher, Request(prompt_ids(30, 0), params))
    step = engine.executor.step

    def fail(batch: StepBatch) -> StepResult:
        raise EdgeError("the disk is full")

    engine.executor.step = fail  # type: ignore[method-assign]
    batcher.step()
    engine.executor.step = step  # type: ignore[method-assign]
    failing.read()
    assert failing.reason == "error"
    later = submit(batcher, Request(prompt_ids(30, 0), params))
    drive(batcher, [later])
    later.check()
    assert engine.cache.free_pages == 16


SPARSE = SparseConfig(topk=2, window_size=64, dense_len=256)  # 3 blocks


@pytest.fixture(scope="module")
def sparse_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rotated by the long list from 201 tokens on, sparse from 256 on."""
    folder = tmp_path_factory.mktemp("serving")
    rope = LongRope((1.0,) * 8, tuple(4.0 + i for i in range(8)), 200)
    config = tiny_config(tie_word_embeddings=False, long_rope=rope, sparse=SPARSE)
    write_hf_checkpoint(folder / "checkpoint", config, tokenizer=True)
    return export_bundle(
        open_checkpoint(folder / "checkpoint"), folder / "bundle", ExportOptions(weights=WeightFormat("exact"))
    )


@pytest.fixture(scope="module")
def int4_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rounded weights, and activations rounded in the kernels, which a batch must not change."""
    folder = tmp_path_factory.mktemp("serving")
    write_hf_checkpoint(folder / "checkpoint", tiny_config(tie_word_embeddings=False), tokenizer=True)
    return export_bundle(
        open_checkpoint(folder / "checkpoint"), folder / "bundle", ExportOptions(weights=WeightFormat(), kv="float32")
    )


class ProphetOfMany:
    """Knows the replies to several prompts, and hides a part of each in random trees (tests/test_speculation.py)."""

    def __init__(self, known: Sequence[Sequence[int]]) -> None:
        self._known = known
        self._prophet: Prophet | None = None

    def follow(self, first: int, hidden: np.ndarray) -> None:
        raise AssertionError("there is no draft model")

    def propose(self, tokens: Sequence[int], pages: Sequence[int], length: int, limits: Limits) -> TokenTree:
        if self._prophet is None:
            whole = next(whole for whole in self._known if whole[: len(tokens)] == list(tokens))
            self._prophet = Prophet(whole, 1, VOCAB)
        return self._prophet.propose(tokens, pages, length, limits)

    def ready(self, tokens: Sequence[int]) -> bool:
        return True

    def skip(self) -> None:
        """Knows it anyway."""


def speculate_in_batches(engine: Engine, known: Sequence[Sequence[int]]) -> None:
    if engine.speculation is None:
        engine.speculation = Speculation("prophet", (Way(lambda: ProphetOfMany(known), Eager()),))
    else:
        engine.speculation = paced(engine.speculation, Always())


@pytest.mark.parametrize("speculative", ["off", "lookup", "prophet"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "int4"])
def test_a_batch_gives_the_replies_of_single_runs(
    kind: str, speculative: str, tiny_bundle: Path, sparse_bundle: Path, int4_bundle: Path
) -> None:
    """Greedy and seeded ones, with little room, so that some are interrupted, also where attention turns sparse."""
    path = {"dense": tiny_bundle, "sparse": sparse_bundle, "int4": int4_bundle}[kind]
    single = open_engine(path, EngineOptions(context=320, chunk=64, threads=2, prefix_cache=False))
    asked = "lookup" if speculative == "lookup" else "off"
    options = EngineOptions(context=320, chunk=64, threads=2, sequences=4, speculative=asked, logits_rows=32)
    engine = open_engine(path, options)
    engine.cache._free = engine.cache._free[-9:]  # as if memory held no more
    rng = np.random.default_rng(7)
    requests, known = [], []
    for i, (length, limit) in enumerate([(120, 170), (110, 170), (125, 150), (40, 30), (3, 90), (185, 70)]):
        params = SamplingParams(max_tokens=limit, ignore_eos=True)
        if i % 3 == 1:
            params = replace(params, temperature=0.8, top_k=20, seed=i)
        ids = rng.integers(10, 60, length).tolist()
        requests.append(Request(tuple(ids), params))
        known.append([*ids, *(event.token_id for event in single.generate(ids, params))])
    if speculative != "off":
        speculate_in_batches(engine, known)
    batcher = Batcher(engine, BatchLimits(sequences=4))
    readers = [submit(batcher, request) for request in requests]
    drive(batcher, readers)
    for request, reader, whole in zip(requests, readers, known, strict=True):
        assert reader.tokens == whole[len(request.prompt_ids) :]
    assert sum(r.ticket.statistics.preemptions for r in readers) > 0
    if speculative != "off":
        accepted = sum(r.ticket.statistics.speculated.accepted for r in readers)  # type: ignore[union-attr]
        assert accepted > (200 if speculative == "prophet" else 0)
    assert len(engine.cache._free) + engine.cache.cached_pages == 9


def test_an_interrupted_reply_is_computed_again_as_it_was(sparse_bundle: Path) -> None:
    """Its tokens were dense up to a length and sparse from there on; a step of many would compute all in one way."""
    engine = open_engine(sparse_bundle, EngineOptions(context=384, chunk=96, threads=2, prefix_cache=False))
    sequence = ScheduledSequence(engine.cache.open())
    generation = engine.begin(sequence, prompt_ids(150, 3), SamplingParams(max_tokens=150, ignore_eos=True))
    while generation.taken < 149:
        engine.step([generation])
        while generation.ready:
            engine.take(generation)
    pages = engine.executor.save_pages(engine.cache.pages(sequence.cache_id)).view(np.float32).copy()
    engine.forget(sequence)
    assert not engine.cache.pages(sequence.cache_id)
    engine.reuse(sequence, sequence.tokens, 150)
    while not generation.ready:
        engine.step([generation])
    again = engine.executor.save_pages(engine.cache.pages(sequence.cache_id)).view(np.float32)
    assert pages.shape == again.shape
    difference = np.abs(pages - again)[:4]  # whole pages
    assert difference.max() < 1e-4 * np.abs(pages[:4]).max()


def test_choices_share_their_prompt(bundle: Bundle, tiny_bundle: Path) -> None:
    engine = open_engine(tiny_bundle, EngineOptions(context=256, chunk=64, threads=2, sequences=4))
    batcher = Batcher(engine, BatchLimits(sequences=4))
    params = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)
    ids = prompt_ids(200, 5)
    first = submit(batcher, Request(ids, replace(params, seed=1)))
    others = [submit(batcher, Request(ids, replace(params, seed=s)), first.ticket) for s in (1, 2)]
    drive(batcher, [first, *others])
    assert [r.ticket.statistics.cached_tokens for r in (first, *others)] == [0, 192, 192]
    assert first.tokens == others[0].tokens != others[1].tokens


def test_logprobs_of_a_prompt_are_the_teacher_forced_ones(tiny_bundle: Path) -> None:
    engine = open_engine(tiny_bundle, EngineOptions(context=256, chunk=64, threads=2, sequences=4, logits_rows=16))
    batcher = Batcher(engine, BatchLimits(sequences=4))
    params = SamplingParams(max_tokens=2, logprobs=3, prompt_logprobs=True, ignore_eos=True)
    readers = [submit(batcher, Request(prompt_ids(100, kind), params)) for kind in (1, 2)]
    drive(batcher, readers)
    for reader in readers:
        ids = reader.ticket.request.prompt_ids
        logits = engine.logits(ids, len(ids)).astype(np.float64)
        wanted = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        found = reader.of_prompt
        assert len(found) == 99
        assert np.allclose([x.logprob for x in found], [wanted[i, ids[i + 1]] for i in range(99)], atol=1e-4)
        assert [x.top[0][0] for x in found] == wanted.argmax(1)[:-1].tolist()
