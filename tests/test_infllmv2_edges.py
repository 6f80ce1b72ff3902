"""`edge.InfLLMv2Attention` at the edges, for the meaning, the function and every compiled kernel.

Which test covers which item of spec: infllmv2.md 9 ("steps": test_kernels and test_function_and_meaning of
test_infllmv2.py; "cache": test_infllmv2_cache.py):

| item | tests |
|---|---|
| 1 counts, 2 visibility | test_counts, test_visibility, test_prompts_that_end_at_every_edge |
| 3 switch | test_switch_at_dense_len, test_every_sequence_switches_on_its_own_length, test_always_sparse_... |
| 3 switch in decode | cache: test_decode_across_dense_len |
| 4 blocks around the selected number | test_the_97th_block_is_the_first_to_lose, test_forced_ranges |
| 5 init, local and selected of any size | test_forced_ranges, steps |
| 6 block edges | test_the_window_reaches_back_exactly, test_prompts_that_end_at_every_edge |
| 7 ties | test_equal_scores_go_to_the_lowest_blocks, test_golden_rows (structural ties) |
| 8 needles | test_needles |
| 9 large logits | test_clamped_scores_tie_below_forced_blocks, test_means_of_large_halves |
| 9 NaN | test_window_scores_are_numbers, test_a_spoiled_row_stays_alone |
| 10 ragged batches | test_batch_on_both_sides_of_the_switch, steps |
| 11 chunks | cache: test_chunks_leave_the_same_pools, test_long_chunks_leave_the_same_pools |
| 12 use_nope | steps (the past's keys before rotation are unrelated to the rotated ones), test_needles |
| 13 groups | test_golden_rows (two KV heads differ), attended_blocks (a group shares), steps (groups of 1 to 16) |
| 14 rollback | cache: test_rollback, test_shared_prefix |
| 15 RoPE, 16 muP | test_rope.py; test_parity.py |
| 17 131072 tokens | test_131072_tokens |
| 18 near-ties | block_choices of test_infllmv2.py |
"""

from __future__ import annotations

import numpy as np
import pytest

from plugins.infllmv2 import meaning
from tests.operators import KERNELS, Feeds
from tests.test_infllmv2 import (
    EVERY,
    WINDOWS,
    Sparse,
    check_step,
    fill_windows,
    run,
    slots,
    sparse_feeds,
)

DEFAULTS = {"init": 1, "local": 32, "selected": 96}  # MiniCPM4's


def one_hot_values(case: Sparse, feeds: Feeds) -> None:
    """Every token's value is the unit vector of its block, so that outputs tell which blocks were attended."""
    unit = np.eye(case.dim)
    for b, table in enumerate(feeds["page_table"]):
        tokens = np.arange(case.past[b])
        page, slot = slots(table, tokens)
        feeds["kv_pool"][page, 1, :, slot] = unit[tokens // 64][:, None]
    values = feeds["qkv"].reshape(len(feeds["qkv"]), -1, case.dim)[:, -case.kv_heads :]
    values[:] = unit[feeds["positions"] // 64][:, None]


def attended_blocks(how: str, case: Sparse, feeds: Feeds) -> list[list[list[int]]]:
    """[row][KV head] -> blocks; heads of a group must share them."""
    one_hot_values(case, feeds)
    output = run(how, case, feeds)[0].reshape(-1, case.kv_heads, case.group, case.dim)
    attended = output > 0
    assert (attended == attended[:, :, :1]).all(), "heads of a group attend to different blocks"
    return [[np.flatnonzero(head[0]).tolist() for head in row] for row in attended]


def set_past_keys(case: Sparse, feeds: Feeds, keys: np.ndarray, plane: int) -> None:
    """keys [past, Hkv, d] of the only sequence; its windows are averaged again."""
    table, tokens = feeds["page_table"][0], np.arange(case.past[0])
    page, slot = slots(table, tokens)
    feeds["kv_pool"][page, plane, :, slot] = keys
    for name in WINDOWS:
        fill_windows(feeds, name, table, tokens)


def without_rotation(feeds: Feeds) -> Feeds:
    return feeds | {"cos": np.ones_like(feeds["cos"]), "sin": np.zeros_like(feeds["sin"])}


def sparse_settings(*values: int) -> Feeds:
    return {"sparse_settings": np.array(values, np.int32)}


# Counts and golden rows of the specification


def test_counts() -> None:
    n = [0, 1, 15, 16, 31, 32, 33, 47, 48, 63, 64, 127, 128, 129, 191, 192, 193]
    fine = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 6, 7, 7, 10, 11, 11]
    coarse = [0] * 12 + [1, 1, 1, 2, 2]
    assert [meaning.window_count(k, 32, 16) for k in n] == fine
    assert [meaning.window_count(k, 128, 64) for k in n] == coarse


def test_visibility() -> None:
    i = np.array([30, 31, 46, 47, 63, 126, 127, 190, 191, 255])
    assert meaning.visible_windows(i, 32, 16).tolist() == [0, 1, 1, 2, 3, 6, 7, 10, 11, 15]
    assert meaning.visible_windows(i, 128, 64).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 2, 3]


# Position, blocks of KV heads 0 and 1, the sums of their window scores, starts of the outputs of heads 0 and 31.
GOLDEN_TABLE = """
63   | 0            | 0             | 0       0       | 1.31588  0.55471 -0.33784 |  0.97677  0.45161 -0.48864
127  | 0 1          | 0 1           | 177.468 364.646 | 1.32269 -0.60271 -0.53712 | -0.85338  0.51641 -0.64547
383  | 0 1 3 4 5    | 0 1 3 4 5     | 160.606 168.182 | 0.45914 -0.64048  0.48166 |  0.19732  0.05999 -0.03678
448  | 0 3 5 6 7    | 0 2 5 6 7     | 152.154 175.547 | 0.79806  1.02615  0.36484 |  0.12339  0.10948  0.23580
511  | 0 1 5 6 7    | 0 2 5 6 7     | 155.738 146.592 | 0.32062  0.23257 -0.21664 |  0.03362 -0.48732  0.04536
767  | 0 7 9 10 11  | 0 4 9 10 11   | 163.280 145.551 | 0.43900  0.60564 -0.75631 | -0.08745  0.09224 -0.19196
895  | 0 7 11 12 13 | 0 1 11 12 13  | 153.128 153.879 | 0.29317 -0.20031  0.28152 |  0.94192 -0.40258 -0.49164
1000 | 0 7 13 14 15 | 0 7 13 14 15  | 147.056 179.364 | 0.97846  0.17740  0.31489 |  1.12377 -0.38484  1.14962
1023 | 0 7 13 14 15 | 0 12 13 14 15 | 175.367 153.045 | 1.01595 -0.33115 -0.97785 |  0.24946  0.09455 -0.10256
"""
GOLDEN = [[[float(x) for x in cell.split()] for cell in row.split("|")] for row in GOLDEN_TABLE.strip().splitlines()]
# Position, KV head, its blocks, the two that tie, their score.
GOLDEN_TIES = [(447, 1, [0, 2, 4, 5, 6], 2, 3, 18.69804), (640, 0, [0, 4, 8, 9, 10], 4, 5, 9.31840)]
GOLDEN_TIES += [(1007, 1, [0, 2, 13, 14, 15], 2, 3, 9.02428)]


def golden_heads() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v [1024, heads, 8] of the specification's generator (spec: infllmv2.md 8.1)."""

    def x(a: float, beta: float, heads: int) -> np.ndarray:
        t, h, c = np.ogrid[:1024, :heads, :8]
        waves = np.sin(a * (c + 1) * t * (1 + 0.01 * h) + beta * (h + 1) + 0.5 * c)
        return (waves + 0.5 * np.cos(0.013 * t * (c + 1) + h)).astype(np.float32)

    return 2 * x(0.0717, 0.9, 32), 2 * x(0.0531, 0.4, 2), x(0.0291, 0.2, 2)


def golden_feeds(past: int, new: int) -> tuple[Sparse, Feeds]:
    """Heads are widened to 32 with zeros, queries doubled for the scale; values end in their block's unit vector."""
    case = Sparse((past,), (new,), group=16, kv_heads=2, dim=32, local=2, selected=5)
    feeds = without_rotation(sparse_feeds(case))
    q, k, v = (np.pad(x, ((0, 0), (0, 0), (0, 24))) for x in golden_heads())
    v[:, :, 8:24] = np.eye(16)[np.arange(1024) // 64][:, None]
    feeds["qkv"][:] = np.concatenate([2 * q, k, v], axis=1)[past : past + new].reshape(new, -1)
    page, slot = slots(feeds["page_table"][0], np.arange(past))
    feeds["kv_pool"][page, 1, :, slot] = v[:past]
    set_past_keys(case, feeds, k[:past], plane=0)
    return case, feeds


@pytest.mark.parametrize("how", EVERY)
def test_golden_rows(how: str) -> None:
    prefilled = run(how, *golden_feeds(0, 1024))[0].reshape(1024, 32, 32)

    def rows(i: int) -> tuple[np.ndarray, np.ndarray]:
        return prefilled[i], run(how, *golden_feeds(i, 1))[0].reshape(32, 32)

    def blocks_of(row: np.ndarray, head: int) -> list[int]:
        return np.flatnonzero(row[16 * head, 8:24]).tolist()

    for (i,), *blocks, _, first, last in GOLDEN:
        for row in rows(int(i)):
            np.testing.assert_allclose(row[[0, 31], :3], [first, last], atol=1e-5)
            assert [blocks_of(row, head) for head in (0, 1)] == blocks
    for i, head, blocks, *_ in GOLDEN_TIES:
        assert [blocks_of(row, head) for row in rows(i)] == [blocks] * 2


def test_golden_scores() -> None:
    q, k, _ = golden_heads()
    c1, c2 = (np.stack([k[j : j + w].mean(axis=0) for j in range(0, 1025 - w, w // 2)], axis=1) for w in (32, 128))
    scores = meaning.window_scores(q, c1, c2, np.arange(1024), 8**-0.5)
    for (i,), _, _, sums, *_ in GOLDEN:
        np.testing.assert_allclose(scores[:, int(i)].sum(axis=1), sums, rtol=5e-6)
    blocks = meaning.block_scores(scores, 16)
    for i, head, _, lower, upper, score in GOLDEN_TIES:
        assert blocks[head, i, lower] == blocks[head, i, upper] == pytest.approx(score, abs=1e-5)


# Steps


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize(("past", "lengths"), [(0, (207, 255, 256)), (190, (207, 208, 209, 255, 256, 257, 319, 320))])
def test_prompts_that_end_at_every_edge(how: str, past: int, lengths: tuple[int, ...]) -> None:
    """Where kernels with a bottom-right limit see a window too few, or windows without the current token."""
    for length in lengths:
        case = Sparse((past,), (length - past,), selected=3, local=0, group=4, seed=length)
        feeds = sparse_feeds(case)
        check_step(how, case, feeds, run(how, case, feeds))


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("length", [8191, 8192, 8193])
def test_switch_at_dense_len(how: str, length: int) -> None:
    case = Sparse((8180,), (length - 8180,), group=1, kv_heads=1, dense_len=8192, **DEFAULTS)
    feeds = sparse_feeds(case)
    result = run(how, case, feeds)
    check_step(how, case, feeds, result)
    always = run(how, case, feeds | sparse_settings(-1, 1, 32, 96))[0]
    assert np.array_equal(result[0], always) == (length >= 8192)


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("new", [(1, 1, 1), (20, 1, 60)])
def test_every_sequence_switches_on_its_own_length(how: str, new: tuple[int, ...]) -> None:
    """The first is part of a prompt that will be long enough, the second as long as a dense context can be."""
    case = Sparse((300, 399 - new[1], 600), new, dense_len=400, local=0, selected=3, switch=(500, 399, 600 + new[2]))
    feeds = sparse_feeds(case)
    check_step(how, case, feeds, run(how, case, feeds))


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("dense_len", [0, -1])
@pytest.mark.parametrize("length", [1, 31, 63, 127])
def test_always_sparse_from_the_first_token(how: str, dense_len: int, length: int) -> None:
    case = Sparse((0,), (length,), dense_len=dense_len, local=0, selected=3)
    feeds = sparse_feeds(case)
    check_step(how, case, feeds, run(how, case, feeds))


@pytest.mark.parametrize("how", EVERY)
def test_the_97th_block_is_the_first_to_lose(how: str) -> None:
    case = Sparse((6143,), (2,), kv_heads=1, **DEFAULTS)
    feeds = sparse_feeds(case)
    result = run(how, case, feeds)
    check_step(how, case, feeds, result)
    dense = run(how, case, feeds | sparse_settings(10**6, 1, 32, 96))[0]
    every = run(how, case, feeds | sparse_settings(-1, 1, 32, 1000))[0]
    np.testing.assert_allclose(result[0][0], dense[0], atol=5e-6)
    np.testing.assert_allclose(every, dense, atol=5e-6)
    assert np.abs(result[0][1] - dense[1]).max() > 1e-4


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize(
    ("init", "local", "selected"),
    [(1, 100, 105), (0, 0, 1), (1, 0, 3), (0, 2, 4), (50, 2, 60), (4, 9, 12), (6, 0, 4), (2, 3, 3), (1, 2, 100)],
)
def test_forced_ranges(how: str, init: int, local: int, selected: int) -> None:
    """Longer than the context, empty, overlapping, and more forced blocks than selected ones (the lowest stay)."""
    for new in (1, 20):
        case = Sparse((700,), (new,), init=init, local=local, selected=selected, seed=init)
        feeds = sparse_feeds(case)
        check_step(how, case, feeds, run(how, case, feeds))


@pytest.mark.parametrize("how", EVERY)
def test_the_window_reaches_back_exactly(how: str) -> None:
    """selected = init + forced local: nothing else is attended, and local = 3 is the own block and three before."""
    for position, blocks in [(575, [0, 5, 6, 7, 8]), (576, [0, 6, 7, 8, 9]), (639, [0, 6, 7, 8, 9])]:
        case = Sparse((position,), (1,), local=3, selected=5)
        assert attended_blocks(how, case, sparse_feeds(case)) == [[blocks, blocks]]


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("zero", ["queries", "keys equal"])
def test_equal_scores_go_to_the_lowest_blocks(how: str, zero: str) -> None:
    case = Sparse((700,), (80,), selected=7, local=1)
    feeds = without_rotation(sparse_feeds(case))
    heads = feeds["qkv"].reshape(80, -1, case.dim)
    if zero == "queries":
        heads[:, : case.heads] = 0
    else:
        heads[:, case.heads :] = 1
        heads[:, : case.heads].round(out=heads[:, : case.heads])  # small integers: every sum is exact
        set_past_keys(case, feeds, np.ones((700, case.kv_heads, case.dim)), plane=0)
    attended = attended_blocks(how, case, feeds)
    for row, position in enumerate(range(700, 780)):
        assert attended[row] == [[0, 1, 2, 3, 4, position // 64 - 1, position // 64]] * 2


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize(("first", "selected", "blocks"), [(16, 5, [4]), (48, 5, [4]), (48, 6, [4, 5])])
def test_needles(how: str, first: int, selected: int, blocks: list[int]) -> None:
    """32 aligned keys from token 64 * 4 + first on; a window across an edge brings both blocks, the lower one first.

    The needle is only in the keys before rotation, and the rotated ones are all zero.
    """
    case = Sparse((1000,), (1,), selected=selected, use_nope=True)
    feeds = sparse_feeds(case)
    keys = 0.1 * np.random.default_rng(0).standard_normal((1000, case.kv_heads, case.dim))
    queries = feeds["qkv"].reshape(-1, case.dim)[: case.heads].reshape(case.kv_heads, case.group, case.dim)
    keys[256 + first : 288 + first] = queries.sum(axis=1)
    set_past_keys(case, feeds, keys, plane=2)
    set_past_keys(case, feeds, np.zeros_like(keys), plane=0)
    assert attended_blocks(how, case, feeds) == [[[0, *blocks, 13, 14, 15]] * 2]


@pytest.mark.parametrize("how", EVERY)
def test_clamped_scores_tie_below_forced_blocks(how: str) -> None:
    """Two windows that exceed every coarse one by more than exp(80) score alike, finite and below forced blocks."""
    case = Sparse((1000,), (1,), group=1, kv_heads=1, use_nope=True)
    feeds = sparse_feeds(case)
    query = feeds["qkv"].reshape(-1, case.dim)[0].astype(np.float64)
    keys = np.zeros((1000, 1, case.dim))
    for block, product in ((3, 400), (9, 600)):
        keys[64 * block + 16 : 64 * block + 48] = product * case.dim**0.5 * query / (query @ query)
    set_past_keys(case, feeds, keys, plane=2)
    set_past_keys(case, feeds, np.zeros_like(keys), plane=0)
    assert attended_blocks(how, case, feeds) == [[[0, 3, 13, 14, 15]]]


def test_window_scores_are_numbers() -> None:
    q, c1, c2 = np.ones((2, 2, 4), np.float32), np.ones((1, 15, 4), np.float32), np.ones((1, 3, 4), np.float32)
    q[1] = np.inf
    with np.errstate(invalid="ignore"):
        scores = meaning.window_scores(q, c1, c2, np.array([255, 255]), 0.5)
    np.testing.assert_allclose(scores[0, 0], 2 / 3, rtol=1e-6)
    assert not scores[0, 1].any()


@pytest.mark.parametrize("how", EVERY)
def test_means_of_large_halves(how: str) -> None:
    """Sums of 128 keys near float16's limit; check_step would see an infinite average."""
    case = Sparse((100,), (100,), pool="float16", use_nope=True)
    feeds = without_rotation(sparse_feeds(case))
    feeds["qkv"].reshape(100, -1, case.dim)[:, case.heads : -case.kv_heads] = 60000
    set_past_keys(case, feeds, np.full((100, case.kv_heads, case.dim), 60000), plane=2)
    _, _, c1, c2 = run(how, case, feeds)
    page, slot = slots(feeds["page_table"][0], np.arange(111, 200, 16))
    assert (c1[page, :, slot // 16] == np.float16(60000)).all()
    assert (c2[feeds["page_table"][0, 2], :, 0] == np.float16(60000)).all()


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("new", [(1, 1), (5, 40)])
def test_a_spoiled_row_stays_alone(how: str, new: tuple[int, int]) -> None:
    case = Sparse((300, 500), new, local=0, selected=3)
    feeds = sparse_feeds(case)
    clean = run(how, case, feeds)[0]
    feeds["qkv"][0, : case.heads * case.dim] = np.nan
    np.testing.assert_allclose(run(how, case, feeds)[0][1:], clean[1:], atol=5e-6)


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("new", [(1, 1, 1, 1), (20, 3, 1, 2)])
def test_batch_on_both_sides_of_the_switch(how: str, new: tuple[int, ...]) -> None:
    past = tuple(length - n for length, n in zip((20, 500, 8192, 9000), new, strict=True))
    case = Sparse(past, new, kv_heads=1, dense_len=8192, **DEFAULTS)
    feeds = sparse_feeds(case)
    check_step(how, case, feeds, run(how, case, feeds))


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("magnitude", [1, 0])
def test_131072_tokens(how: str, magnitude: int) -> None:
    """With queries of 0 all of the 2048 blocks tie."""
    case = Sparse((131071,), (1,), kv_heads=1, pool="float16", magnitude=magnitude, **DEFAULTS)
    feeds = sparse_feeds(case)
    check_step(how, case, feeds, run(how, case, feeds))


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("new", [1, 3])
def test_heads_keep_their_weights_over_many_windows(how: str, new: int) -> None:
    """A head's largest coarse score comes last, far above its first ones: what came before must be scaled down."""
    case = Sparse((9000,), (new,), group=4, kv_heads=1, local=1, selected=12)
    feeds = sparse_feeds(case)
    queries = feeds["qkv"].reshape(new, -1, case.dim)[:, : case.heads]
    queries[:, 0] *= 40
    queries[:, 1:] *= 4
    keys = np.random.default_rng(1).standard_normal((9000, 1, case.dim))
    keys += np.linspace(0, 3, 9000)[:, None, None] * np.sign(queries[0, :1])
    set_past_keys(case, feeds, keys, plane=0)
    check_step(how, case, without_rotation(feeds), run(how, case, without_rotation(feeds)), 1e-3)
