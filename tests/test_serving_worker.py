"""The engine's thread: requests of many threads, ends that come from outside, and what is left when it fails."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edge.bundle import TOKENIZER, Bundle, open_bundle
from edge.cli.generate import load_tokenizer
from edge.engine import open_engine
from edge.errors import EdgeError, UsageError
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.serving.batcher import Batcher, BatchLimits, QueueFullError
from edge.serving.guidance import Guidance
from edge.serving.request import Output, Request, Ticket
from edge.serving.worker import Worker
from tests.ledger_run import Always, paced
from tests.test_serving import Reader, fake_engine, prompt_ids

PARAMS = SamplingParams(max_tokens=30)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def read_all(ticket: Ticket, arrived: threading.Event) -> Reader:
    reader = Reader(ticket)
    while reader.reason is None:
        assert arrived.wait(20), "nothing comes"
        arrived.clear()
        reader.read()
    return reader


def submit(worker: Worker, *requests: Request) -> tuple[list[Ticket], threading.Event]:
    arrived = threading.Event()
    return worker.submit(requests, arrived.set), arrived


def test_requests_of_many_threads(bundle: Bundle) -> None:
    engine = fake_engine(bundle, 9)
    worker = Worker(Batcher(engine, BatchLimits(unread=4)))
    readers: list[Reader] = []

    def client(number: int) -> None:
        rng = random.Random(number)
        for _ in range(12):
            request = Request(prompt_ids(rng.randint(1, 150), rng.randint(0, 3)), PARAMS, client=str(number))
            (ticket,), arrived = submit(worker, request)
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.01)
                worker.cancel([ticket])
            readers.append(read_all(ticket, arrived))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(readers) == 96
    for reader in readers:
        reader.check()
    assert worker.drain(5) and engine.cache.free_pages == 9
    worker.stop()


def test_the_queue_has_a_bound_and_choices_enter_together(bundle: Bundle) -> None:
    engine = fake_engine(bundle, 9, sequences=1)
    gate = threading.Event()
    step = engine.executor.step
    engine.executor.step = lambda batch: (gate.wait(20), step(batch))[1]  # type: ignore[method-assign]
    worker = Worker(Batcher(engine, BatchLimits(sequences=1, queue=2)))
    request = Request(prompt_ids(20, 1), PARAMS)
    running, first = submit(worker, request)
    while not worker.running:
        time.sleep(0.001)
    waiting, second = submit(worker, request, request)
    with pytest.raises(QueueFullError, match="2 requests wait already, of 2 at most"):
        submit(worker, request)
    gate.set()
    for ticket in (*running, *waiting):
        read_all(ticket, first if ticket in running else second).check() if ticket is not waiting[1] else None
    worker.stop()


def test_stop_ends_what_is_left_and_drain_refuses_more(bundle: Bundle) -> None:
    engine = fake_engine(bundle, 9)
    worker = Worker(Batcher(engine, BatchLimits(unread=3)))
    (unread,), arrived = submit(worker, Request(prompt_ids(20, 1), PARAMS))
    assert arrived.wait(20) and not worker.drain(0.05)  # nobody reads, so it does not end
    with pytest.raises(EdgeError, match="shutting down"):
        submit(worker, Request(prompt_ids(20, 1), PARAMS))
    worker.stop()
    outputs: list[Output] = unread.outbox.take()
    assert outputs[-1].finish_reason == "error" and "stopped" in str(outputs[-1].error)
    assert engine.cache.free_pages == 9


def test_a_fault_in_the_engine_ends_every_request_with_an_error(bundle: Bundle) -> None:
    engine = fake_engine(bundle, 9)

    def fault(batch: object) -> None:
        raise ZeroDivisionError("a bug")

    engine.executor.step = fault  # type: ignore[assignment, method-assign]
    worker = Worker(Batcher(engine, BatchLimits(sequences=1)))
    tickets, arrived = submit(worker, *[Request(prompt_ids(20, 1), PARAMS)] * 3)
    for ticket in tickets:
        while ticket.finish_reason is None:
            assert arrived.wait(20)
        assert "ZeroDivisionError: a bug" in str(ticket.outbox.take()[-1].error)
    assert isinstance(worker.failure, ZeroDivisionError) and not worker.accepting


SCHEMA = {
    "type": "object",
    "properties": {"numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 4}},
    "required": ["numbers"],
    "additionalProperties": False,
}


def test_a_schema_holds_in_guessed_tokens_too(tiny_bundle: Path, bundle: Bundle) -> None:
    guidance = Guidance(bundle.file(TOKENIZER), bundle.config.vocab_size, bundle.config.eos_token_ids)
    constraint = guidance.json_schema(SCHEMA)
    params = SamplingParams(max_tokens=150, temperature=0.9, seed=2)
    found = []
    for speculative in ("off", "lookup"):
        options = EngineOptions(context=256, chunk=64, threads=2, sequences=2, speculative=speculative)
        engine = open_engine(tiny_bundle, options)
        if engine.speculation is not None:
            engine.speculation = paced(engine.speculation, Always())
        batcher = Batcher(engine, BatchLimits())
        ids = tuple(load_tokenizer(engine).encode('{"numbers": [1, 2, 3]} {"numbers": [', add_bos=True))
        readers = []
        for seed in range(3):
            request = Request(ids, replace(params, seed=seed), constraint=constraint)
            batcher.add(ticket := batcher.ticket(request))
            readers.append(Reader(ticket))
        while batcher.step():
            pass
        for reader in readers:
            reader.read()
            text = load_tokenizer(engine).decode(reader.tokens)
            assert 3 <= len(json.loads(text)["numbers"]) <= 4 and reader.reason == "stop"
        found.append([reader.tokens for reader in readers])
        if speculative == "lookup":
            assert sum(r.ticket.statistics.speculated.proposed for r in readers) > 0  # type: ignore[union-attr]
    assert found[0] == found[1]


def test_grammars_and_what_is_wrong_with_them(tiny_bundle: Path, bundle: Bundle) -> None:
    engine = open_engine(tiny_bundle, EngineOptions(context=256, chunk=64, threads=2))
    guidance = Guidance(bundle.file(TOKENIZER), bundle.config.vocab_size, bundle.config.eos_token_ids)
    for constraint in (guidance.regex("(fox|dog)s?!"), guidance.lark('start: ("fox" | "dog") "s"? "!"')):
        batcher = Batcher(engine, BatchLimits())
        batcher.add(ticket := batcher.ticket(Request(prompt_ids(9, 1), PARAMS, constraint=constraint)))
        while batcher.step():
            pass
        reader = Reader(ticket)
        reader.read()
        assert load_tokenizer(engine).decode(reader.tokens) in ("fox!", "foxs!", "dog!", "dogs!")
    for make, text in ((guidance.regex, "(fox"), (guidance.lark, "start: nothing"), (guidance.lark, "%%")):
        with pytest.raises(UsageError, match="is not usable"):
            make(text)
