"""What is done with whole pages while most of them are in host memory: copies, saved and restored sessions, eviction.

On the emulated driver, which runs queued work when something waits for it, no earlier (tests/test_device_offload.py).
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from edge.bundle import Bundle
from edge.cuda import DeviceArray, Event, pinned
from edge.engine import Engine, Session
from edge.executors.offload import DeviceOffload
from edge.page_cache import NO_SLOT, Move
from plugins import PAGE_TOKENS
from plugins.simt.driver.library import EmulatedDriver
from tests.device_engine import kernels_of, open_on_device
from tests.emulated import emulated_gpu
from tests.test_device_offload import (
    BUILD,
    OPTIONS,
    PAGES,
    PARAMS,
    SPARSE,
    executor_of,
    make_bundle,
    offload_of,
    open_offloaded,
    outcome_of,
    prompt,
)

FEW = replace(PARAMS, max_tokens=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("pages"), SPARSE)


@pytest.fixture
def driver(bundle: Bundle) -> Generator[EmulatedDriver, None, None]:
    with emulated_gpu("sm_86", kernels_of(bundle.config)) as driver:
        yield driver


def open_roomy(bundle: Bundle) -> Engine:
    return open_on_device(bundle, OPTIONS, build=BUILD)


def turn(session: Session, ids: list[int]) -> list[int]:
    return [event.token_id for event in session.generate(ids, FEW)]


def where(engine: Engine, page: int) -> tuple[str, ...]:
    """Layer by layer: a page's newest values."""
    caches = [layer.cache for layer in offload_of(engine)._layers]
    return tuple("home" if c.slot_of[page] == NO_SLOT else "slot" if page in c._dirty else "both" for c in caches)


@pytest.mark.parametrize(("length", "kept"), [(450, "home"), (385, "slot")])
def test_a_branch_writes_into_a_copy(bundle: Bundle, driver: EmulatedDriver, length: int, kept: str) -> None:
    """A session goes back to the middle of a page that others may still find; one that is only in this place."""
    outcomes, ids, index = [], prompt(length), 0
    for engine in (open_offloaded(bundle), open_roomy(bundle)):
        session = engine.open_session()
        said = turn(session, ids)
        pages = engine.cache.pages(session._sequence.cache_id)
        if not outcomes:
            index = next(i for i in range(1, length // PAGE_TOKENS) if kept in where(engine, pages[i]))
        branch = [*ids[: index * PAGE_TOKENS + 40], *prompt(40, seed=2)]
        said += turn(session, branch)
        assert engine.cache.pages(session._sequence.cache_id)[index] != pages[index]
        said += [event.token_id for event in engine.generate(ids, FEW)]  # finds what was copied
        outcomes.append(outcome_of(engine, said))
    assert outcomes[0].tokens[:4] == outcomes[0].tokens[-4:]
    assert outcomes[0].agrees(outcomes[1])


def test_pages_of_evicted_prefixes_bring_nothing_along(bundle: Bundle, driver: EmulatedDriver) -> None:
    """Requests that take each other's pages, cached ones and dirty ones, as copies and as fresh ones."""
    outcomes, texts = [], [prompt(450), prompt(450, seed=1)]
    for engine in (open_roomy(bundle), open_offloaded(bundle)):
        session, said = engine.open_session(), list[int]()
        for text, kept in [(0, 450), (1, 450), (1, 410), (0, 300), (1, 330)]:
            ids = [*texts[text][:kept], *prompt(20, seed=kept)]
            said += turn(session, ids)
        session.close()
        outcomes.append(outcome_of(engine, said))
    assert outcomes[1].tokens == outcomes[0].tokens


@pytest.mark.parametrize("offloaded", [(True, True), (True, False), (False, True)])
def test_a_saved_session_is_restored_wherever_its_pages_are(
    bundle: Bundle, driver: EmulatedDriver, tmp_path: Path, offloaded: tuple[bool, bool]
) -> None:
    saving, restoring = ((open_offloaded if one else open_roomy)(bundle) for one in offloaded)
    session, ids = saving.open_session(), prompt(450)
    said = turn(session, ids)
    session.save(tmp_path / "session")
    list(restoring.generate(prompt(700, seed=4), FEW))  # what the pages held before must not show
    restored = restoring.restore_session(tmp_path / "session")
    pages = [e.cache.pages(s._sequence.cache_id)[:8] for e, s in ((saving, session), (restoring, restored))]
    values = [e.executor.save_pages(p) for e, p in zip((saving, restoring), pages, strict=True)]
    np.testing.assert_array_equal(*values)
    again = [*ids, *said, *prompt(30, seed=1)]
    assert turn(restored, again) == turn(session, again)


def test_ctrl_c_between_a_decision_and_its_copies_waits_for_them(
    bundle: Bundle, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = open_roomy(bundle)
    expected = outcome_of(roomy, turn(roomy.open_session(), prompt(450)))
    engine, saves, copy = open_offloaded(bundle), list[Move](), DeviceOffload._copy

    def interrupted(offload: DeviceOffload, layer: Any, moves: Sequence[Move]) -> None:
        if not saves and any(move.evicted is not None for move in moves):
            saves.extend(moves)
            signal.raise_signal(signal.SIGINT)
        copy(offload, layer, moves)

    monkeypatch.setattr(DeviceOffload, "_copy", interrupted)
    session = engine.open_session()
    with pytest.raises(KeyboardInterrupt):
        turn(session, prompt(450))
    assert 0 < session._sequence.computed < 450
    assert outcome_of(engine, turn(session, prompt(450))).agrees(expected)


class PagesMachine(RuleBasedStateMachine):
    """Steps and whole-page operations of one executor beside what each page must hold: values of one kind a page.

    A step's kernels are uploads of those values to the slots that they would write to.
    """

    engine: Engine

    @initialize(early=st.booleans())
    def begin(self, early: bool) -> None:
        """early: copies are done once they are queued, not when something waits for them."""
        self.executor = executor_of(self.engine)
        self.offload, self.stream = offload_of(self.engine), self.executor._stream
        copies = self.offload._copies
        copies.__dict__.pop("record", None)
        record = copies.record

        def record_and_run(event: Event | None = None) -> Event:
            recorded = record(event)
            copies.synchronize()
            return recorded

        if early:
            copies.record = record_and_run  # type: ignore[method-assign]
        self.values = 0
        most = max(pool.row(0).nbytes for pool in self.executor._kv.values())
        self.sources = pinned((256, most), np.uint8)  # so that a write is queued and waits for nothing
        self.sources[:] = np.arange(256)[:, None]
        self.pages = np.zeros((PAGES, self.executor.page_bytes), np.uint8)
        self.executor.load_pages(range(PAGES), self.pages)

    @rule(page=st.integers(0, PAGES - 1), before=st.integers(0, PAGES - 1), begins=st.booleans())
    def step(self, page: int, before: int, begins: bool) -> None:
        """One token, the first or a later one of a page: it writes the page's first or second half of every pool."""
        if page == before:
            return
        self.values = self.values % 255 + 1
        table = np.array([[before, page]], np.int32)
        place = np.array([64 if begins else 70], np.int32)
        self.offload.begin(place, np.array([0, 1], np.int32), table, trees=False)
        start = 0
        for pool in self.executor._kv.values():
            half = pool.row(0).nbytes // 2
            at = start + (0 if begins else half)
            if begins:
                self.pages[page, start : start + 2 * half] = 0  # nothing of what it held is wanted any more
            self.pages[page, at : at + half] = self.values
            if pool.address in self.offload.homes:
                for _ in self.offload.writing(pool.address, int(self.stream.handle)):
                    slot = int(self.offload._layer(pool.address).cache.slot_of[page])
                    self.write(pool.row(slot), half, begins)
            else:
                self.write(pool.row(page), half, begins)
            start += 2 * half

    def write(self, row: DeviceArray, half: int, begins: bool) -> None:
        if begins:
            self.stream.upload(row, self.sources[0, : row.nbytes])
        target = DeviceArray(row.address + (0 if begins else half), (half,), np.dtype(np.uint8), row)
        self.stream.upload(target, self.sources[self.values, :half])

    @rule(pages=st.lists(st.integers(0, PAGES - 1), min_size=2, max_size=6, unique=True))
    def copy(self, pages: list[int]) -> None:
        pairs = [*zip(pages[::2], pages[1::2], strict=False)]
        self.executor.copy_pages(pairs)
        for source, target in pairs:
            self.pages[target] = self.pages[source]

    @rule(pages=st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=4, unique=True))
    def load(self, pages: list[int]) -> None:
        self.values = self.values % 255 + 1
        self.pages[pages] = self.values
        self.executor.load_pages(pages, self.pages[pages])

    @rule(pages=st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=4))
    def save(self, pages: list[int]) -> None:
        np.testing.assert_array_equal(self.executor.save_pages(pages), self.pages[pages])

    def teardown(self) -> None:
        np.testing.assert_array_equal(self.executor.save_pages(range(PAGES)), self.pages)


def test_pages_hold_what_was_done_to_them(bundle: Bundle, driver: EmulatedDriver) -> None:
    PagesMachine.engine = open_offloaded(bundle)
    run_state_machine_as_test(
        PagesMachine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)
    )
