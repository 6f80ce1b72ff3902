"""What `edge.InfLLMv2Attention` keeps from step to step: chunks, the switch, rollback, pages shared by sequences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.operators import Feeds
from tests.test_infllmv2 import EVERY, POOLS, WINDOWS, Result, Sparse, check_step, fill_windows, run, sparse_feeds


def run_chunks(how: str, case: Sparse, feeds: Feeds, sizes: list[int], check: bool = True) -> Result:
    """The step of one sequence in chunks that carry the pools on; the outputs together and the last pools."""
    outputs, feeds, first = [], dict(feeds), 0
    for size in sizes:
        rows, past = slice(first, first + size), case.past[0] + first
        part = {name: feeds[name][rows] for name in ("qkv", "cos", "sin", "positions", "slots", "tree_mask")}
        step = replace(case, past=(past,), new=(size,))
        chunk = feeds | part | {"query_start": np.array([0, size], np.int32)}
        chunk["switch_length"] = np.array([past + size], np.int32)
        result = run(how, step, chunk)
        if check:
            check_step(f"{how} at {past}", step, chunk, result)
        outputs.append(result[0])
        feeds |= dict(zip(POOLS, result[1:], strict=True))
        first += size
    return np.concatenate(outputs), *result[1:]


def chunk_sizes(total: int, chunk: int) -> list[int]:
    return [min(chunk, total - first) for first in range(0, total, chunk)]


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("pool", ["float32", "float16"])
def test_chunks_leave_the_same_pools(how: str, pool: str) -> None:
    case = Sparse((0,), (450,), pool=pool, local=1, selected=3, kv_heads=1, use_nope=pool == "float16")
    feeds = sparse_feeds(case)
    whole = run_chunks(how, case, feeds, [450])
    for chunk in (1, 16, 63, 64, 100):
        parts = run_chunks(how, case, feeds, chunk_sizes(450, chunk), check=chunk != 1)
        assert [p.tobytes() for p in parts[1:]] == [p.tobytes() for p in whole[1:]], f"{how}, chunks of {chunk}"
        np.testing.assert_allclose(parts[0], whole[0], atol=5e-6, err_msg=f"{how}, chunks of {chunk}")


@pytest.mark.parametrize("how", EVERY)
def test_long_chunks_leave_the_same_pools(how: str) -> None:
    case = Sparse((0,), (2148,), kv_heads=1, group=1, selected=8)
    feeds = sparse_feeds(case)
    long, short = (run_chunks(how, case, feeds, chunk_sizes(2148, chunk)) for chunk in (2048, 100))
    assert [p.tobytes() for p in long[1:]] == [p.tobytes() for p in short[1:]]


@pytest.mark.parametrize("how", EVERY)
def test_decode_across_dense_len(how: str) -> None:
    """The prompt is dense; the first sparse step finds every average in place."""
    case = Sparse((0,), (403,), kv_heads=1, dense_len=402, selected=4, local=1)
    feeds = sparse_feeds(case)
    result = run_chunks(how, case, feeds, [400, 1, 1, 1])
    sparse = run_chunks(
        how, replace(case, dense_len=-1), feeds | {"sparse_settings": np.array([-1, 1, 1, 4], np.int32)}, [400, 1, 1, 1]
    )
    np.testing.assert_array_equal((result[0] == sparse[0]).all(axis=1)[399:], [False, False, True, True])
    assert [p.tobytes() for p in result[1:]] == [p.tobytes() for p in sparse[1:]]


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("kept", [16, 33, 127, 128, 160, 170])
def test_rollback(how: str, kept: int) -> None:
    """Rejected tokens leave no trace: outputs and live windows are those of a cache that never saw them."""
    case = Sparse((0,), (300,), local=1, selected=3, kv_heads=1)
    feeds, other = sparse_feeds(case), sparse_feeds(replace(case, seed=1))
    inputs = ("qkv", "cos", "sin")
    mixed = feeds | {name: np.concatenate([feeds[name][:kept], other[name][kept:]]) for name in inputs}
    fresh = run_chunks(how, case, mixed, [kept, 40, 260 - kept])

    rejected = run(how, case, feeds)
    again = replace(case, past=(kept,), new=(300 - kept,))
    rest = {name: mixed[name][kept:] for name in (*inputs, "positions", "slots", "tree_mask")}
    rest |= {"query_start": np.array([0, 300 - kept], np.int32)}
    regrown = run_chunks(how, again, feeds | rest | dict(zip(POOLS, rejected[1:], strict=True)), [40, 260 - kept])
    np.testing.assert_array_equal(regrown[0], fresh[0][kept:])
    assert [p.tobytes() for p in regrown[1:]] == [p.tobytes() for p in fresh[1:]]  # both reach 300 tokens


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("new", [(1, 1), (100, 70)])
def test_shared_prefix(how: str, new: tuple[int, int]) -> None:
    """Two sequences on the same first two pages: the window across the edge is kept with the page after it."""
    case = Sparse((150, 300), new, local=0, selected=3)
    feeds = sparse_feeds(case)
    feeds["page_table"][1, :2] = feeds["page_table"][0, :2]
    for name in WINDOWS:
        fill_windows(feeds, name, feeds["page_table"][1], np.arange(300))
    check_step(how, case, feeds, run(how, case, feeds))
