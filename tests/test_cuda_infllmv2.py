"""InfLLM-V2's CUDA kernels by all routes: averages, block scores and chosen blocks against plugins/infllmv2/meaning.py.

A step runs compress, score_coarse, score_fine and select one after the other; each is checked on what the kernels
before it left, so that every comparison is exact or of float32 accumulations. Pools start as NaN, outputs as 0xFF, and
page tables end in page numbers that do not exist.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from edge.errors import UsageError
from plugins import PAGE_TOKENS
from plugins.infllmv2 import meaning
from plugins.infllmv2.launch import compress, score_coarse, score_fine, scratch, select
from plugins.launch import Launch
from plugins.paged_attention import NO_TREE
from plugins.paged_attention.launch import AttentionShape
from plugins.vectors import ELEMENTS, poisoned
from tests.cuda_routes import ROUTES, SEEDS, run_route
from tests.test_infllmv2_edges import GOLDEN, GOLDEN_TIES, golden_heads

Buffers = dict[str, np.ndarray]
NO_PAGE = 1 << 20
WINDOWS = {"c1_pool": meaning.FINE, "c2_pool": meaning.COARSE}
TREE = tuple(int(np.random.default_rng(i).integers(max(-1, i - 6), i)) for i in range(64))
CHAIN = tuple(range(-1, 63))
EDGES = (1, 15, 16, 31, 32, 47, 63, 64, 127, 128, 129, 191, 192, 1000, 2100)


@dataclass(frozen=True)
class Step:
    """Sequence b has past[b] tokens in the cache and new[b] in this step, which `padding` tokens of nobody end.

    trees[b]: the parents, -1 or earlier nodes, of its last tokens, which are a tree.
    """

    past: tuple[int, ...]
    new: tuple[int, ...]
    group: int = 8
    kv_heads: int = 2
    dim: int = 64
    element: str = "half"
    int8: bool = False
    use_nope: bool = False
    dense_len: int = -1
    init: int = 1
    local: int = 2
    selected: int = 5
    limit: int = 12
    switch: tuple[int, ...] | None = None
    padding: int = 0
    seed: int = 0
    trees: tuple[tuple[int, ...], ...] = ()

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            tokens=sum(self.new) + self.padding,
            sequences=len(self.new),
            table_width=-(-max(self.lengths) // PAGE_TOKENS) + 1,
            heads=self.group * self.kv_heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            element=self.element,
            kv_element="uint8_t" if self.int8 else self.element,
            limit=self.limit,
            use_nope=self.use_nope,
        )

    @property
    def lengths(self) -> list[int]:
        return [p + n for p, n in zip(self.past, self.new, strict=True)]

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def settings(self) -> tuple[int, int, int, int]:
        return self.dense_len, self.init, self.local, self.selected

    def rows(self, b: int) -> slice:
        return slice(sum(self.new[:b]), sum(self.new[: b + 1]))

    def tree_start(self, b: int) -> int:
        nodes = len(self.trees[b]) if b < len(self.trees) else 0
        return self.lengths[b] - nodes if nodes else NO_TREE

    def slots(self, b: int) -> np.ndarray:
        return np.arange(self.past[b], self.lengths[b])

    def positions(self, b: int) -> np.ndarray:
        start, depths = self.tree_start(b), []
        for parent in self.trees[b] if start != NO_TREE else ():
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return np.array([slot if slot < start else start + depths[slot - start] for slot in self.slots(b)], int)

    def launches(self) -> list[Launch]:
        shape = self.shape
        scores = [score_coarse(shape, self.scale), score_fine(shape, self.scale)]
        return [compress(shape), *scores, select(shape)]


def write_keys(step: Step, buffers: Buffers, keys: np.ndarray, b: int = 0) -> None:
    """keys [length, Hkv, d] of sequence b into the plane that windows average, as bytes if they are kept so."""
    pages, plane = buffers["page_table"][b], 2 if step.use_nope else 0
    token = np.arange(len(keys))
    where = pages[token // PAGE_TOKENS], plane, slice(None), token % PAGE_TOKENS
    if step.int8:
        scales = np.abs(keys).max(axis=-1).astype(np.float32) / np.float32(127)
        buffers["kv_scales"][where] = scales
        buffers["kv_pool"][where] = np.rint(keys / scales[..., None]) + 128
    else:
        buffers["kv_pool"][where] = keys


def stored_keys(step: Step, buffers: Buffers) -> np.ndarray:
    """kv_pool as the values it stands for."""
    if not step.int8:
        return buffers["kv_pool"]
    return (buffers["kv_pool"].astype(np.float32) - 128) * buffers["kv_scales"][..., None]


def fill_windows(step: Step, buffers: Buffers, kv_pool: np.ndarray, b: int, positions: np.ndarray) -> None:
    for name, sizes in WINDOWS.items():
        meaning.compress(buffers[name], kv_pool, buffers["page_table"][b], positions, *sizes)


def make_buffers(step: Step) -> Buffers:
    """All that a step reads, with random keys and queries; what a step must not read is NaN or no page."""
    rng, shape, dtype = np.random.default_rng(step.seed), step.shape, ELEMENTS[step.element]
    used = [-(-n // PAGE_TOKENS) for n in step.lengths]
    order = rng.permutation(sum(used) + 1)
    table = np.full((len(used), shape.table_width), NO_PAGE, np.int32)
    for b, count in enumerate(used):
        table[b, :count] = order[sum(used[:b]) :][:count]
    pool = (len(order), 3 if step.use_nope else 2, step.kv_heads, PAGE_TOKENS)
    sequences, padding = range(len(used)), [np.full(step.padding, 191)]  # where windows of both kinds end
    q_heads = shape.heads + (2 * step.kv_heads if step.use_nope else 0)
    buffers = {
        "kv_pool": poisoned((*pool, step.dim), np.dtype(np.uint8) if step.int8 else dtype),
        "kv_scales": np.full(pool, np.nan, np.float32),
        **{name: poisoned((pool[0], pool[2], PAGE_TOKENS // s, step.dim), dtype) for name, (_, s) in WINDOWS.items()},
        "qkv" if step.use_nope else "q": rng.standard_normal((shape.tokens, q_heads, step.dim)).astype(dtype),
        "positions": np.concatenate([*map(step.positions, sequences), *padding]).astype(np.int32),
        "slots": np.concatenate([*map(step.slots, sequences), *padding]).astype(np.int32),
        "tree_start": np.array([step.tree_start(b) for b in sequences], np.int32),
        "query_start": np.cumsum([0, *step.new]).astype(np.int32),
        "page_table": table,
        "switch_length": np.array(step.switch or step.lengths, np.int32),
        "sparse_settings": np.array(step.settings, np.int32),
        **{name: poisoned(*output) for name, output in scratch(shape).items()},
    }
    for b, length in enumerate(step.lengths):
        write_keys(step, buffers, rng.standard_normal((length, step.kv_heads, step.dim)), b)
    keys = stored_keys(step, buffers)
    for b, past in enumerate(step.past):
        fill_windows(step, buffers, keys, b, np.arange(min(past, step.tree_start(b))))
    return buffers


def check_windows(step: Step, before: Buffers, after: Buffers) -> None:
    """The step's windows are averages rounded once; all others have the bits they had."""
    keys = stored_keys(step, before).astype(np.float64)
    exact = {name: np.zeros(before[name].shape) for name in WINDOWS}
    written = {name: np.zeros(before[name].shape, bool) for name in WINDOWS}
    for b, pages in enumerate(before["page_table"]):
        slots = step.slots(b)[step.slots(b) < step.tree_start(b)]
        for name, sizes in WINDOWS.items():
            meaning.compress(exact[name], keys, pages, slots, *sizes)
            meaning.compress(written[name], np.ones_like(keys), pages, slots, *sizes)
    for name, touched in written.items():
        assert after[name][~touched].tobytes() == before[name][~touched].tobytes(), f"{name}: wrote another window"
        right, kept = exact[name][touched], after[name][touched].astype(np.float64)
        half_step = np.float64(2.0) ** (-11 if step.element == "half" else -8)
        np.testing.assert_allclose(kept, right, rtol=half_step * 1.001, atol=1e-5, err_msg=name)


def expected_scores(step: Step, buffers: Buffers, b: int) -> np.ndarray:
    """[Hkv, new, blocks] of sequence b, from the windows in `buffers`."""
    length, pages = step.lengths[b], buffers["page_table"][b]
    last = np.minimum(step.positions(b), step.tree_start(b) - 1)
    queries = buffers["qkv" if step.use_nope else "q"][step.rows(b), : step.group * step.kv_heads]
    blocks = -(-length // PAGE_TOKENS)
    kept = (
        meaning.stored_windows(buffers[name], pages[:blocks], meaning.window_count(length, *sizes))
        for name, sizes in WINDOWS.items()
    )
    with np.errstate(invalid="ignore", over="ignore"):
        scores = meaning.window_scores(queries, *kept, last, step.scale)
    return meaning.block_scores(scores, blocks)


def pooled(buffers: Buffers, row: int, head: int, blocks: int) -> np.ndarray:
    """Scores of blocks 0 .. blocks - 1; the last one's next window does not exist."""
    own, first = buffers["block_scores"][row, head, :blocks].T
    return np.maximum(own, np.append(first[1:], np.float32(0)))


def check_row(step: Step, buffers: Buffers, b: int, row: int, expected: np.ndarray) -> None:
    """expected: [Hkv, blocks] scores; the chosen blocks must be exactly those of the kernel's own scores."""
    position, start = int(buffers["positions"][row]), step.tree_start(b)
    own, scored = position // PAGE_TOKENS, min(position, start - 1) // PAGE_TOKENS
    in_tree = np.flatnonzero(meaning.tree_blocks(buffers["slots"][row : row + 1], start, expected.shape[-1])[0])
    untouched = buffers["block_scores"][row].view(np.uint8) == 0xFF
    for head in range(step.kv_heads):
        if own < step.selected:
            assert untouched.all(), "a row that keeps all blocks needs no scores"
            chosen = np.arange(own + 1)
        else:
            scores = np.pad(pooled(buffers, row, head, scored + 1), (0, own - scored))
            np.testing.assert_allclose(scores, expected[head, : own + 1], rtol=1e-4, atol=1e-30)
            chosen = np.flatnonzero(
                meaning.select_blocks(scores[None, None], np.array([position]), *step.settings[1:])[0, 0]
            )
        chosen = np.union1d(chosen, in_tree)
        assert buffers["block_counts"][row, head] == len(chosen)
        padded = np.pad(chosen, (0, step.shape.columns - len(chosen)), constant_values=-1)
        np.testing.assert_array_equal(buffers["blocks"][row, head], padded)


def check_unscored(buffers: Buffers, rows: slice) -> None:
    """Rows of dense sequences and of none: no blocks, and no work."""
    assert not buffers["block_counts"][rows].any()
    assert (buffers["blocks"][rows] == -1).all()
    assert (buffers["block_scores"][rows].view(np.uint8) == 0xFF).all()


def check_step(step: Step, before: Buffers, after: Buffers) -> None:
    check_windows(step, before, after)
    check_unscored(after, slice(sum(step.new), None))
    for b, switch in enumerate(before["switch_length"]):
        rows = step.rows(b)
        if not step.new[b]:
            continue
        if step.dense_len >= 0 and switch < step.dense_len:
            check_unscored(after, rows)
            continue
        expected = expected_scores(step, after, b)
        for i, row in enumerate(range(rows.start, rows.stop)):
            check_row(step, after, b, row, expected[:, i])


def run_step(route: str, step: Step, buffers: Buffers, seed: int = 0) -> Buffers:
    after = {name: array.copy() for name, array in buffers.items()}
    run_route(route, step.launches(), after, seed=seed)
    return after


# Steps

DECODE = Step(tuple(n - 1 for n in EDGES), (1,) * len(EDGES), selected=1, local=0, limit=4)
# Starts inside pages. A pair of tokens lies on both sides of block 16; the last sequence has two units of coarse
# windows, and the last of its units of fine ones ends on a page that it does not have.
PREFILL = Step((0, 40, 0, 999, 2445), (0, 31, 1, 45, 42), local=1, selected=3, padding=2)
STEPS = {
    "decode": replace(DECODE, group=16, dim=128),
    "decode 8": replace(DECODE, element="bf16", int8=True, init=0, selected=2, padding=3),
    "prefill": replace(PREFILL, group=16, dim=128, element="bf16", int8=True),
    "prefill 8": PREFILL,
    "prefill 3": replace(PREFILL, group=3, use_nope=True, init=2),
    "prefill 1": replace(PREFILL, group=1, kv_heads=1, int8=True, use_nope=True),
    "chunks": Step((8190, 700), (3, 1), group=2, kv_heads=1, init=3, local=5, selected=20, limit=20),
    # Trees that begin on a page's first token and last one, before and after a block is first lost, and of 64 tokens;
    # the last two began in earlier steps.
    "trees": Step(
        (319, 1023, 511, 318, 500, 447, 1000),
        (12, 9, 65, 3, 2, 20, 17),
        local=0,
        selected=4,
        trees=(TREE[:12], TREE[:8], TREE, (), TREE[:1], TREE[:63], TREE[:24]),
        padding=2,
    ),
    "trees of tokens": Step(
        (600, 319, 255),
        (9, 5, 3),
        dim=128,
        group=16,
        local=1,
        selected=4,
        use_nope=True,
        trees=(TREE[:8], TREE[:5], TREE[:2]),
    ),
    "chains": Step((1000, 320), (60, 40), group=3, int8=True, local=0, selected=5, trees=(CHAIN[:59], CHAIN[:40])),
    "first to lose a block": Step((999,), (45,), selected=16, limit=16),  # the second of a pair
    "switch": Step(
        (300, 399, 600, 500), (20, 1, 2, 21), group=11, dense_len=401, switch=(500, 400, 602, 401), local=0, selected=3
    ),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", STEPS)
def test_steps(name: str, route: str) -> None:
    before = make_buffers(STEPS[name])
    results = [run_step(route, STEPS[name], before, seed) for seed in SEEDS[route]]
    check_step(STEPS[name], before, results[0])
    for other in results[1:]:
        assert all(other[name].tobytes() == array.tobytes() for name, array in results[0].items())


@pytest.mark.parametrize("name", ["trees", "chains"])
def test_scores_that_were_never_written_choose_nothing(name: str) -> None:
    """Behind a tree's start there are none, but what an earlier step left there."""
    before = make_buffers(STEPS[name])
    stale = before | {"block_scores": np.full_like(before["block_scores"], 1e30)}
    fresh, other = (run_step("fast", STEPS[name], one) for one in (before, stale))
    for chosen in ("blocks", "block_counts"):
        np.testing.assert_array_equal(fresh[chosen], other[chosen])


@pytest.mark.parametrize("name", ["decode", "prefill 8", "prefill 3"])
def test_keys_may_lie_on_other_pages_than_their_windows(name: str) -> None:
    """As those of offloaded pages do: in slots, of which there are fewer."""
    step, before = STEPS[name], make_buffers(STEPS[name])
    table, moved = before["page_table"], {name: array.copy() for name, array in before.items()}
    used = np.random.default_rng(1).permutation(np.unique(table[table != NO_PAGE]))
    moved["kv_pool"] = before["kv_pool"][used]
    slots = np.full(len(before["kv_pool"]), NO_PAGE, np.int32)
    slots[used] = np.arange(len(used))
    moved["slot_table"] = np.where(table == NO_PAGE, NO_PAGE, slots[np.minimum(table, len(slots) - 1)])
    run_route("race", [compress(step.shape, "slot_table")], moved)
    check_windows(step, before, moved)


@pytest.mark.parametrize("route", ROUTES)
def test_golden_rows(route: str) -> None:
    """Rows of spec: infllmv2.md 8.1, each a sequence of its own on one prompt's pages; heads are widened with zeros."""
    positions = [int(row[0][0]) for row in GOLDEN] + [tie[0] for tie in GOLDEN_TIES]
    prompt = Step((0,), (1024,), group=16, dim=128)
    step = replace(prompt, past=tuple(positions), new=(1,) * len(positions))
    q, k, _ = (np.pad(x, ((0, 0), (0, 0), (0, 120))) for x in golden_heads())
    buffers = make_buffers(prompt)
    write_keys(prompt, buffers, k)
    run_route(route, prompt.launches()[:1], buffers)
    shared = {name: buffers[name] for name in ("kv_pool", "kv_scales", *WINDOWS)}
    shared |= {
        "q": (4 * q[positions]).astype(np.float16),
        "page_table": buffers["page_table"].repeat(len(positions), 0),
    }
    buffers = make_buffers(step) | shared
    run_route(route, step.launches()[1:], buffers)

    def blocks_of(row: int, head: int) -> list[int]:
        return [int(b) for b in buffers["blocks"][row, head] if b >= 0]

    for row, (_, *blocks, _, _, _) in enumerate(GOLDEN):
        assert [blocks_of(row, head) for head in (0, 1)] == blocks
    for row, (position, head, blocks, lower, upper, score) in enumerate(GOLDEN_TIES, start=len(GOLDEN)):
        assert blocks_of(row, head) == blocks
        scores = pooled(buffers, row, head, position // PAGE_TOKENS + 1)
        assert scores[lower] == scores[upper] == pytest.approx(score, rel=2e-2)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("zero", ["queries", "keys equal"])
def test_equal_scores_go_to_the_lowest_blocks(zero: str, route: str) -> None:
    step = Step((700,), (60,), group=8, local=1, selected=7)
    buffers = make_buffers(step)
    if zero == "queries":
        buffers["q"][:] = 0
    else:
        write_keys(step, buffers, np.ones((760, 2, 64)))
        fill_windows(step, buffers, buffers["kv_pool"], 0, np.arange(700))
    after = run_step(route, step, buffers)
    for row, position in enumerate(range(700, 760)):
        own = position // PAGE_TOKENS
        assert after["blocks"][row, :, :7].tolist() == [[0, 1, 2, 3, 4, own - 1, own]] * 2


@pytest.mark.parametrize("route", ROUTES)
def test_clamped_scores_tie(route: str) -> None:
    """Two windows that exceed every coarse one by more than exp(80) score alike and finite; the lower block wins."""
    step = Step((1000,), (1,), group=1, kv_heads=1)
    buffers = make_buffers(step)
    query = buffers["q"][0, 0].astype(np.float64)
    keys = np.zeros((1001, 1, 64))
    for block, product in ((3, 400), (9, 600)):
        keys[64 * block + 16 : 64 * block + 48] = product * 8 * query / (query @ query)
    write_keys(step, buffers, keys)
    fill_windows(step, buffers, buffers["kv_pool"], 0, np.arange(1000))
    after = run_step(route, step, buffers)
    check_step(step, buffers, after)
    scores = pooled(after, 0, 0, 16)
    assert scores[3] == scores[9] < np.inf
    assert after["blocks"][0, 0, :5].tolist() == [0, 3, 13, 14, 15]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("new", [1, 9])
def test_what_is_not_a_number_scores_nothing(new: int, route: str) -> None:
    """Infinite and undefined windows and queries, each in its own sequence; 3 heads leave 5 rows of a tile free."""
    spoiled = [("c1_pool", x) for x in (np.nan, np.inf, -np.inf)] + [("c2_pool", x) for x in (np.nan, np.inf, -np.inf)]
    step = Step((500,) * 8, (new,) * 8, group=3, selected=4)
    buffers = make_buffers(step)
    for b, (name, value) in enumerate(spoiled):
        buffers[name][buffers["page_table"][b, 2], :, -1, 5] = value
    buffers["c2_pool"][buffers["page_table"][6, 1:7], :, :, 7] = -np.inf  # every coarse product of positive queries
    buffers["q"][step.rows(6), :, 7] = 1
    buffers["q"][step.rows(7).start] = np.inf
    buffers["q"][step.rows(7).stop - 1, 2] = np.nan
    check_step(step, buffers, run_step(route, step, buffers))


def test_scoring_reads_little_more_than_the_windows() -> None:
    """Decode at 40000 tokens: every visible window and query once, within 5 %; warps have two units of coarse ones."""
    length, rng = 40000, np.random.default_rng(0)
    step = Step((length - 1,), (1,), group=16, kv_heads=1, dim=128)
    pages = step.shape.table_width - 1
    table = np.append(rng.permutation(pages), NO_PAGE).astype(np.int32)
    small = replace(step, past=(0,))
    last = np.array([length - 1], np.int32)
    buffers = make_buffers(small) | {"page_table": table[None], "positions": last, "slots": last}
    for name, (_, stride) in WINDOWS.items():
        buffers[name] = rng.standard_normal((pages, 1, PAGE_TOKENS // stride, 128)).astype(np.float16)
    buffers |= {name: poisoned(*output) for name, output in scratch(step.shape).items()}
    report = run_route("race", step.launches()[1:], buffers)
    expected = expected_scores(step, buffers, 0)
    check_row(step, buffers, 0, 0, expected[:, 0])
    windows = sum(meaning.window_count(length, *sizes) for sizes in WINDOWS.values())
    read = sum(report.read[name] for name in ("q", *WINDOWS))
    assert read <= 1.05 * (windows + step.group) * 128 * 2


def test_selecting_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="limit 0"):
        select(replace(Step((0,), (1,)).shape, limit=0))


def test_grids_do_not_depend_on_lengths() -> None:
    """One captured step serves every context that its page table has room for."""
    for tokens in (1, 100):
        short, long = (Step((past,), (tokens,)) for past in (0, 5000))
        shape = replace(short.shape, table_width=long.shape.table_width)
        assert compress(shape) == compress(long.shape)
        assert score_fine(shape, 1).grid == score_fine(long.shape, 1).grid == (1, 2, 1 if tokens == 1 else 13)
