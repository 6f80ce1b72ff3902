"""Ctrl-C at any instruction of the cache's bookkeeping, and of a reply, leaves no page held or shared wrongly."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from edge import engine, interrupts, kv_cache, published, reuse, scheduler
from edge.engine import Engine, open_engine
from edge.interrupts import deferred_interrupts
from edge.kv_cache import KVCache
from edge.plan import EngineOptions
from plugins import PAGE_TOKENS
from tests.test_engine import GREEDY, prompt, reply

BOOKKEEPING = (kv_cache.__file__, published.__file__, interrupts.__file__, contextlib.__file__)
LOOP = (*BOOKKEEPING, engine.__file__, reuse.__file__, scheduler.__file__)
IDS = list(range(300))


def salt(index: int) -> bytes:
    return b""


def interrupt_at(count: int, action: Callable[[], Any], files: tuple[str, ...] = BOOKKEEPING) -> bool:
    """Run it with a Ctrl-C at the count-th instruction of these files; False if there are not so many."""
    left = count

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return left <= 0


def check(cache: KVCache) -> None:
    """Counts are those of the sequences, every page is somewhere once, what can be found is there."""
    held = [page for sequence in cache._sequences.values() for page in sequence.pages]
    assert cache._holders == [held.count(page) for page in range(cache.num_pages)]
    assert sorted([*cache._free, *cache._cached, *set(held)]) == list(range(cache.num_pages))
    by_page = cache._published._by_page
    assert {p.key: p for p in by_page.values()} == cache._published._by_key
    for sequence in cache._sequences.values():
        assert all(page in by_page for page in sequence.pages[: sequence.published])
    assert all(p.parent is None or by_page.get(p.parent.page) is p.parent for p in by_page.values())


def published_sequence(cache: KVCache, tokens: int = 200) -> int:
    sequence = cache.open()
    cache.reserve(sequence, tokens)
    cache.publish(sequence, IDS, tokens, salt)
    return sequence


ACTIONS: dict[str, Callable[[KVCache, int], Any]] = {
    "copies": lambda cache, sequence: cache.reserve(sequence, 7 * PAGE_TOKENS, 70),
    "room for one copy": lambda cache, sequence: cache.reserve(sequence, 8 * PAGE_TOKENS, 10),
    "no room for copies": lambda cache, sequence: cache.reserve(sequence, 9 * PAGE_TOKENS, 10),
    "copies of shared pages": lambda cache, sequence: cache.reserve(cache.fork(sequence), 200, 10),
    "fork": lambda cache, sequence: cache.fork(sequence),
    "truncate": lambda cache, sequence: cache.truncate(sequence, 10),
    "close": lambda cache, sequence: cache.close(sequence),
    "publish": lambda cache, sequence: cache.publish(3, IDS, 192, salt),
    "adopt": lambda cache, sequence: cache.adopt(3, IDS, salt),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_ctrl_c_anywhere_in_the_bookkeeping(name: str) -> None:
    count, more = 0, True
    while more:
        count += 1
        cache = KVCache(12, lambda pairs: None)
        sequence = published_sequence(cache)
        cache.close(published_sequence(cache))
        other = cache.open()
        cache.reserve(other, 192)
        more = interrupt_at(count, partial(ACTIONS[name], cache, sequence))
        check(cache)
        for one in list(cache._sequences):
            cache.close(one)
        assert cache.free_pages == 12
    assert count > 30


@pytest.fixture(scope="module")
def cold(tiny_bundle: Path) -> Engine:
    return open_engine(tiny_bundle, EngineOptions(context=320, chunk=64, prefix_cache=False))


def test_ctrl_c_anywhere_in_a_reply(tiny_bundle: Path, cold: Engine) -> None:
    """The session's next turn, and another request that begins alike, are as if nothing had been."""
    warm = open_engine(tiny_bundle, EngineOptions(context=320, chunk=64))
    texts = [prompt(150), [*prompt(150)[:140], *prompt(30, seed=1)]]
    expected = [reply(cold, ids) for ids in texts]
    session, count, more = warm.open_session(), 1, True
    while more:
        first, second = texts[count % 2], texts[1 - count % 2]
        more = interrupt_at(count, lambda ids=first: list(session.generate(ids, GREEDY)), LOOP)
        check(warm.cache)
        if count % 3 == 0:
            assert [event.token_id for event in session.generate(second, GREEDY)] == expected[1 - count % 2]
        count += 97
    session.close()
    assert [reply(warm, ids) for ids in texts] == expected
    assert warm.cache.free_pages == warm.cache.num_pages
    assert count > 1000


def test_an_interrupt_comes_after_the_block_and_through_the_handler_that_was_there() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_ignored_interrupts_are_left_alone() -> None:
    @deferred_interrupts()
    def handler() -> Any:
        return signal.getsignal(signal.SIGINT)

    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(handler()))
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert handler() == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
