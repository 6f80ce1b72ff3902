"""/stats: the engine's own figures, taken between two steps, and nothing at all while nobody asks."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edge.bundle import Bundle, open_bundle
from edge.errors import EdgeError
from edge.plan import EngineOptions
from edge.server.service import ServerSettings
from edge.serving.batcher import Batcher, BatchLimits
from edge.serving.request import Request
from edge.serving.worker import Worker
from tests.served import Served, serving
from tests.test_serving import fake_engine, prompt_ids
from tests.test_serving_worker import PARAMS, read_all, submit


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[Served]:
    with serving(tiny_bundle) as served:
        yield served


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def stats(served: Served, key: str | None = None) -> dict[str, Any]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{served.url}/stats", headers=headers), timeout=30) as response:
        return json.loads(response.read())


def complete(served: Served, prompt: str, tokens: int) -> dict[str, Any]:
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "ignore_eos": True}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{served.url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())["usage"]


def test_it_counts_what_clients_were_told(served: Served) -> None:
    before, wanted = stats(served)["tokens"], {"prompt": 0, "cached": 0, "reply": 0}
    for prompt, tokens in (("The fox " * 60, 9), ("The fox " * 60 + "jumps", 5), ("A", 1)):
        usage = complete(served, prompt, tokens)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        wanted["prompt"] += usage["prompt_tokens"] - cached
        wanted["cached"] += cached
        wanted["reply"] += usage["completion_tokens"]
    assert wanted["cached"] > 0
    served.wait_until_idle()
    time.sleep(0.6)  # older than the snapshot that others share
    found = stats(served)
    assert {name: found["tokens"][name] - before[name] for name in before} == wanted
    cache = served.service.engine.cache
    assert found["requests"] == {"running": 0, "waiting": 0} and found["speculation"] is None
    assert found["pages"]["cached"] == cache.cached_pages > 0 and found["pages"]["used"] == 0
    assert sum(found["pages"][state] for state in ("used", "cached", "free")) == cache.num_pages
    plan = served.service.engine.plan
    assert [(line["name"], line["planned"]) for line in found["memory"]["lines"]] == [
        (line.name, line.bytes) for line in plan.lines
    ]
    assert next(line for line in found["memory"]["lines"] if line["name"] == "kv cache")["measured"] == plan.kv
    assert found["memory"]["budget"] == plan.budget


def test_many_share_a_snapshot_and_nobody_means_none(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, taken = served.service.engine, list[str]()
    real = engine.ledger

    def counted() -> Any:
        taken.append(threading.current_thread().name)
        return real()

    monkeypatch.setattr(engine, "ledger", counted)
    complete(served, "The fox", 5)
    assert taken == []
    with ThreadPoolExecutor(8) as pool:
        times = {found["time"] for found in pool.map(lambda _: stats(served), range(24))}
    assert len(times) <= 3 and taken in ([], ["engine"]), "they are not shared, or not taken on the engine's thread"


def test_a_long_step_holds_nobody_up(served: Served) -> None:
    begun, end = threading.Event(), threading.Event()

    def slow(batcher: Batcher) -> None:
        begun.set()
        end.wait(20)

    last = stats(served)
    done = served.service.worker.between_steps(slow)
    assert begun.wait(10)
    time.sleep(0.6)
    started = time.monotonic()
    assert stats(served)["time"] >= last["time"] and time.monotonic() - started < 5 and not done.done()
    end.set()
    done.result(10)
    time.sleep(0.6)
    assert stats(served)["time"] > last["time"]


def test_it_is_documented_and_behind_the_key(tiny_bundle: Path) -> None:
    options = EngineOptions(context=512, chunk=64, threads=1, sequences=1, logits_rows=16, speculative="lookup")
    with serving(tiny_bundle, options, BatchLimits(sequences=1), ServerSettings(api_key="k")) as served:
        with pytest.raises(urllib.error.HTTPError) as refused:
            stats(served)
        assert refused.value.code == 401
        found = stats(served, "k")
        assert found["speculation"] == {"name": "lookup", "steps": 0, "proposed": 0, "accepted": 0, "emitted": 0}
        for path in ("/", "/page.css", "/page.js", "/charts.js", "/icon.svg"):
            with urllib.request.urlopen(served.url + path, timeout=30) as response:
                policy = response.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy and "script-src 'self'" in policy and response.read()
        document = urllib.request.Request(f"{served.url}/openapi.json", headers={"Authorization": "Bearer k"})
        with urllib.request.urlopen(document, timeout=30) as response:
            paths = json.loads(response.read())["paths"]
        assert "200" in paths["/stats"]["get"]["responses"] and "/page.js" not in paths
        served.service.worker.stop()
        time.sleep(0.6)
        with pytest.raises(urllib.error.HTTPError) as refused:
            stats(served, "k")
        assert refused.value.code == 503 and "does not run any more" in refused.value.read().decode()


def test_functions_run_between_steps(bundle: Bundle) -> None:
    worker = Worker(Batcher(fake_engine(bundle, 9), BatchLimits()))
    (ticket,), arrived = submit(worker, Request(prompt_ids(40, 0), PARAMS))
    names = [worker.between_steps(lambda _: threading.current_thread().name) for _ in range(5)]
    failing = worker.between_steps(lambda batcher: [][len(batcher.queue)])
    assert [name.result(10) for name in names] == ["engine"] * 5
    with pytest.raises(IndexError):
        failing.result(10)
    assert read_all(ticket, arrived).reason == "length" and worker.failure is None
    assert worker.between_steps(lambda batcher: batcher.totals.reply).result(10) == PARAMS.max_tokens
    worker.stop()
    with pytest.raises(EdgeError, match="restart"):
        worker.between_steps(len)  # type: ignore[arg-type]


def test_who_waits_for_a_thread_that_fails_is_told(bundle: Bundle) -> None:
    worker = Worker(Batcher(fake_engine(bundle, 9), BatchLimits()))

    def fail(batcher: Batcher) -> None:
        raise SystemExit  # no Exception: it ends the thread

    first = worker.between_steps(lambda batcher: time.sleep(0.3))
    failing, later = worker.between_steps(fail), worker.between_steps(lambda batcher: 1)
    first.result(10)
    with pytest.raises(EdgeError, match="restart"):
        later.result(10)
    with pytest.raises(SystemExit):
        failing.result(10)
    assert isinstance(worker.failure, SystemExit)
