"""Whatever is asked of it, the scheduler computes every token once, in order, and tells the executor the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.executor import StepBatch
from edge.kv_cache import KVCache, NoPagesError
from edge.scheduler import Scheduler, Sequence
from plugins import PAGE_TOKENS

PAGES = 64


class RecordingExecutor:
    """Stores each token where the batch says it belongs, as a real executor stores its keys."""

    def __init__(self) -> None:
        self.pool = np.full((PAGES, PAGE_TOKENS), -1)

    def step(self, batch: StepBatch) -> list[list[int]]:
        """For each row that wants logits: the tokens it can see."""
        seen = []
        for b in range(len(batch.query_start) - 1):
            for t in range(batch.query_start[b], batch.query_start[b + 1]):
                position = batch.positions[t]
                self.pool[batch.page_table[b, position // PAGE_TOKENS], position % PAGE_TOKENS] = batch.input_ids[t]
        for row in batch.logits_rows:
            b = int(np.searchsorted(batch.query_start, row, side="right")) - 1
            visible = int(batch.positions[row]) + 1
            pages = batch.page_table[b, : -(-visible // PAGE_TOKENS)]
            seen.append(self.pool[pages].reshape(-1)[:visible].tolist())
        return seen


lengths = st.lists(st.integers(1, 200), min_size=1, max_size=4)


@given(prompts=lengths, chunk=st.sampled_from([1, 2, 16, 63, 64, 100, 512]), joins=st.lists(st.integers(0, 5)))
@settings(max_examples=60, deadline=None)
def test_every_row_sees_exactly_its_own_tokens(prompts: list[int], chunk: int, joins: list[int]) -> None:
    """Sequences join at different steps and then decode a few tokens; logits come once per finished prompt."""
    cache, executor = KVCache(PAGES), RecordingExecutor()
    scheduler = Scheduler(cache, chunk)
    sequences = [
        Sequence(cache.open(), [1000 * (i + 1) + t for t in range(n)], prompt_length=n) for i, n in enumerate(prompts)
    ]
    joins = (joins + [0] * len(sequences))[: len(sequences)]
    replies = [0] * len(sequences)
    for number in range(3000):
        active = [s for s, join in zip(sequences, joins, strict=True) if join <= number]
        step = scheduler.next_step(active)
        if step is None:
            if number > max(joins):
                break
            continue
        assert len(step.batch.input_ids) <= max(chunk, len(active))
        decoding = [s for s in active if s.pending == 1]
        assert all(any(s is chosen for chosen in step.sequences) for s in decoding), "a decoding sequence starved"
        seen = executor.step(step.batch)
        wanted = sum(step.logits_counts)
        assert len(seen) == max(wanted, 1)
        rows = iter(seen)
        for sequence, count, logits in zip(step.sequences, step.counts, step.logits_counts, strict=True):
            sequence.computed += count
            if not logits:
                continue
            assert next(rows) == sequence.tokens[: sequence.computed]
            assert sequence.pending == 0
            index = sequences.index(sequence)
            if replies[index] < 3:
                replies[index] += 1
                sequence.tokens.append(-replies[index] - 10 * index)
    assert [s.pending for s in sequences] == [0] * len(sequences)
    assert replies == [3] * len(sequences)


@given(length=st.integers(1, 150), chunk=st.integers(1, 160), data=st.data())
@settings(max_examples=60, deadline=None)
def test_logits_from_a_position_on(length: int, chunk: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, length - 1))
    cache, executor = KVCache(PAGES), RecordingExecutor()
    scheduler = Scheduler(cache, chunk)
    sequence = Sequence(cache.open(), list(range(length)), prompt_length=length, logits_from=start)
    rows = []
    while step := scheduler.next_step([sequence]):
        seen = executor.step(step.batch)
        sequence.computed += step.counts[0]
        rows += seen if step.logits_counts[0] else []
    assert rows == [list(range(position + 1)) for position in range(start, length)]


def test_a_sequence_without_pages_waits_until_others_give_theirs_back() -> None:
    cache = KVCache(4)
    scheduler = Scheduler(cache, 512)
    large, small = (Sequence(cache.open(), list(range(n)), prompt_length=n) for n in (192, 100))
    step = scheduler.next_step([large, small])
    assert step is not None and step.sequences == (large,)
    large.computed = 192
    with pytest.raises(NoPagesError, match="100 tokens need 2 more KV pages of 64 tokens and 1 are free"):
        scheduler.next_step([small])
    large.tokens.append(0)
    step = scheduler.next_step([small, large])  # the fourth page
    assert step is not None and step.sequences == (large,)
    cache.close(large.cache_id)
    step = scheduler.next_step([small])
    assert step is not None and step.sequences == (small,)


@given(length=st.integers(2, 400), chunk=st.integers(4, 130))
def test_a_prompt_never_ends_in_a_step_of_one_token(length: int, chunk: int) -> None:
    cache = KVCache(PAGES)
    scheduler, counts = Scheduler(cache, chunk), list[int]()
    sequence = Sequence(cache.open(), list(range(length)), prompt_length=length)
    while step := scheduler.next_step([sequence]):
        counts.append(step.counts[0])
        sequence.computed += step.counts[0]
    assert sum(counts) == length and min(counts) > 1
    assert all(count in (chunk, chunk - 2) for count in counts[:-1])


def test_switch_length_is_the_prompts_until_the_context_outgrows_it() -> None:
    cache = KVCache(PAGES)
    scheduler = Scheduler(cache, 64)
    sequence = Sequence(cache.open(), list(range(100)), prompt_length=100)
    lengths = []
    for _ in range(4):
        step = scheduler.next_step([sequence])
        assert step is not None
        lengths.append(step.batch.switch_length.tolist())
        sequence.computed += step.counts[0]
        if not sequence.pending:
            sequence.tokens.append(0)
    assert lengths == [[100], [100], [101], [102]]
