"""attend.cu against numpy: dense, in a window, sparse, tree-masked; over tile and page edges; every route, schedule.

The oracle computes in float32 from the rotated queries and from keys and values as the pool holds them. A kernel rounds
probabilities (at most 1) to the element type before it multiplies values of about 1, and the result once more: half
has 2^-11 of each, bf16 2^-8.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from edge.errors import UsageError
from plugins import PAGE_TOKENS
from plugins.infllmv2.meaning import masked_attention, tree_blocks
from plugins.launch import Launch
from plugins.paged_attention import NO_TREE
from plugins.paged_attention.launch import (
    AttentionShape,
    attend_split,
    attend_tiles,
    choose_splits,
    combine,
    product_launches,
    scratch,
)
from plugins.paged_attention.meaning import gather
from plugins.paged_attention.meaning import visible_keys as visible_slots
from plugins.paged_attention.pages import Step, Trees, from_device, make_step, to_device
from plugins.vectors import ELEMENTS, poisoned
from tests.cuda_pages import past_pool
from tests.cuda_routes import ROUTES, SEEDS, run_route

TOLERANCE = {"half": 3e-3, "bf16": 2e-2}


@dataclass(frozen=True)
class Problem:
    """A step's inputs on the device, and what attention must make of them."""

    shape: AttentionShape
    buffers: dict[str, np.ndarray]
    expected: np.ndarray


def random_tree(rng: np.random.Generator, nodes: int) -> tuple[int, ...]:
    """Each node's parent; -1 is the token before the tree."""
    return tuple(int(rng.integers(max(-1, i - 6), i)) for i in range(nodes))


def see_later(rng: np.random.Generator, step: Step) -> None:
    """Set bits of tokens after the rows, which must not matter."""
    masks = step.tree_mask.view(np.uint64)[:, 0]
    for b in range(step.sequences):
        for row in step.rows(b):
            if (node := step.slots[row] - step.tree_start[b]) >= 0:
                masks[row] |= rng.integers(0, 2**63, dtype=np.uint64) >> np.uint64(node) << np.uint64(node + 1)


def visible_keys(rng: np.random.Generator, step: Step, b: int, shape: AttentionShape, inputs: dict) -> np.ndarray:
    """[Hkv, new tokens, length] bool; writes the choice of blocks into `inputs`."""
    rows = step.rows(b)
    keys, own = np.arange(step.slots[rows][-1] + 1), step.positions[rows] // PAGE_TOKENS
    seen = visible_slots(step.slots[rows], int(step.tree_start[b]), step.tree_mask[rows], len(keys))
    if shape.window:
        seen &= keys // PAGE_TOKENS > own[:, None] - shape.window
    visible = np.broadcast_to(seen, (shape.kv_heads, *seen.shape)).copy()
    if shape.limit and b % 2 == 0:  # odd sequences stay dense
        in_tree = tree_blocks(step.slots[rows], int(step.tree_start[b]), len(keys))
        for t, row in enumerate(rows):
            for head in range(shape.kv_heads):
                count = min(own[t] + 1, shape.limit)
                chosen = np.append(rng.permutation(own[t])[: count - 1], own[t])
                chosen = np.unique(np.append(chosen, np.flatnonzero(in_tree[t])))
                inputs["blocks"][row, head, : len(chosen)] = chosen
                inputs["block_counts"][row, head] = len(chosen)
                visible[head, t] &= np.isin(keys // PAGE_TOKENS, chosen)
    return visible


def make_problem(
    seed: int,
    sequences: Sequence[tuple[int, int]],
    q_scale: float = 1.5,
    trees: Trees = (),
    earlier: int = 0,
    **shape_fields: object,
) -> Problem:
    """earlier: by so many slots all trees begin before their first node."""
    rng = np.random.default_rng(seed)
    step = make_step(rng, list(sequences), trees=trees)
    see_later(rng, step)
    step = replace(step, tree_start=np.where(step.tree_start == NO_TREE, NO_TREE, step.tree_start - np.int32(earlier)))
    tokens = len(step.positions)
    shape = AttentionShape(tokens, step.sequences, step.page_table.shape[1], **shape_fields)
    dtype = ELEMENTS[shape.element]
    # The pool already has the new tokens: what append does is tested on its own.
    pool = past_pool(rng, step, shape.planes, shape.kv_heads, shape.head_dim, np.dtype(np.float32))
    for b in range(step.sequences):
        for i in step.slots[step.rows(b)]:
            new = rng.normal(size=(shape.planes, shape.kv_heads, shape.head_dim))
            pool[step.page_table[b, i // PAGE_TOKENS], :, :, i % PAGE_TOKENS] = new
    inputs = {
        "q": (q_scale * rng.normal(size=(tokens, shape.heads, shape.head_dim))).astype(dtype),
        **step.buffers,
        "blocks": np.full((tokens, shape.kv_heads, max(shape.columns, 1)), -1, np.int32),
        "block_counts": np.zeros((tokens, shape.kv_heads), np.int32),
        **to_device(pool.astype(dtype), shape.kv_element),
    }
    held = from_device(inputs)
    expected = np.zeros((tokens, shape.heads, shape.head_dim), np.float32)
    for b in range(step.sequences):
        rows = step.rows(b)
        if len(rows):
            visible = visible_keys(rng, step, b, shape, inputs)
            keys, values = gather(held[:, :2], step.page_table[b], visible.shape[2])
            q = inputs["q"][rows].astype(np.float32)
            expected[rows] = masked_attention(q, keys, values, visible, shape.head_dim**-0.5)
    return Problem(shape, inputs, expected)


def launches_of(shape: AttentionShape, splits: int) -> list[Launch]:
    """splits 0: by tiles."""
    scale = shape.head_dim**-0.5
    if not splits:
        return [attend_tiles(shape, scale)]
    return [attend_split(shape, scale, splits), combine(shape, scale, splits)]


def run_problems(route: str, seed: int, problems: Sequence[tuple[Problem, int]]) -> None:
    """All in one child process."""
    launches, buffers = [], {}
    for i, (problem, splits) in enumerate(problems):
        for launch in launches_of(problem.shape, splits):
            names = tuple(f"{i}.{a}" if isinstance(a, str) else a for a in launch.arguments)
            launches.append(replace(launch, arguments=names))
        buffers |= {f"{i}.{name}": array.copy() for name, array in problem.buffers.items()}
        buffers[f"{i}.output"] = poisoned(problem.expected.shape, ELEMENTS[problem.shape.element])
        for name, (shape, dtype) in scratch(problem.shape, max(splits, 1)).items():
            if name != "q":
                buffers[f"{i}.{name}"] = poisoned(shape, dtype)
    run_route(route, launches, buffers, seed)
    for i, (problem, splits) in enumerate(problems):
        output = buffers[f"{i}.output"].astype(np.float32)
        error = np.abs(output - problem.expected).max() if output.size else 0
        assert error < TOLERANCE[problem.shape.element], (problem.shape, splits)


EDGES = [  # (past, new) of each sequence: contexts around pages, chunks that start inside one, nothing new
    [(0, 1)],
    [(62, 1), (63, 1), (64, 1), (126, 1), (127, 1)],
    [(0, 63), (0, 64), (0, 65)],
    [(100, 30), (70, 0), (127, 2)],
]


def problems_of(element: str, kv: str, head_dim: int) -> list[tuple[Problem, int]]:
    """Dense, sparse and tree-masked steps of one kernel family, with tiles and with splits."""
    kv_element = "uint8_t" if kv == "int8" else element
    base = {"head_dim": head_dim, "element": element, "kv_element": kv_element}
    problems = []
    for seed, sequences in enumerate(EDGES):
        heads, kv_heads = [(16, 1), (6, 2), (8, 1), (14, 2)][seed]
        dense = make_problem(seed, sequences, heads=heads, kv_heads=kv_heads, **base)
        problems += [(dense, 0), (dense, 2)]
    sparse = make_problem(7, [(300, 3), (10, 2), (0, 5), (511, 1)], heads=32, kv_heads=2, limit=3, **base)
    single = make_problem(8, [(200, 2), (3, 2)], heads=2, kv_heads=2, use_nope=True, **base)
    deep = make_problem(11, [(699, 2)], heads=4, kv_heads=1, **base)  # more blocks than a split has warps
    with_splits = [(deep, 2), (sparse, 1), (sparse, 3)]
    others = problems_with_trees(**base)
    return [*problems, *with_splits, *((problem, 0) for problem in (sparse, single)), *others]


def problems_with_trees(**base: object) -> list[tuple[Problem, int]]:
    """Beside plain sequences; on two pages, of all 64 bits; levels of a draft, whose tree began in earlier steps."""
    rng = np.random.default_rng(1)
    some = [random_tree(rng, 11), random_tree(rng, 8), (), random_tree(rng, 64)]
    tree = make_problem(9, [(60, 12), (0, 9), (130, 1), (101, 65)], trees=some, heads=16, kv_heads=2, **base)
    both = make_problem(
        10, [(250, 20), (69, 9)], trees=[random_tree(rng, 19)] * 2, heads=16, kv_heads=1, limit=2, **base
    )
    levels = [random_tree(rng, nodes) for nodes in (30, 12, 64)]
    fields = {"heads": 8, "kv_heads": 2, **base}
    level = make_problem(12, [(150, 10), (70, 6), (190, 10)], trees=levels, **fields)
    narrow = make_problem(13, [(250, 20), (120, 10), (63, 2)], window=1, trees=levels[:2], **fields)
    wide = make_problem(14, [(699, 2), (319, 1), (40, 3), (100, 9)], window=3, **fields)
    by_tile = [(problem, 0) for problem in (tree, both, level, narrow, wide)]
    return [*by_tile, (tree, 2), (both, 1), (level, 2), (narrow, 1), (wide, 2)]


def every_kind() -> Iterator[object]:
    """Routes, elements, caches, sizes. Of the slow routes, which look at accesses, one size of one element is daily."""
    for route, element, kv, head_dim in itertools.product(ROUTES, ELEMENTS, ("same", "int8"), (64, 128)):
        is_slow = route in ("asan", "race") and (element, head_dim) != ("half", 64)
        marks = [pytest.mark.long] if is_slow else []
        yield pytest.param(route, element, kv, head_dim, marks=marks, id=f"{route}-{element}-{kv}-{head_dim}")


@pytest.mark.parametrize(("route", "element", "kv", "head_dim"), every_kind())
def test_attention(route: str, element: str, kv: str, head_dim: int) -> None:
    problems = problems_of(element, kv, head_dim)
    for seed in SEEDS[route]:
        run_problems(route, seed, problems)


@pytest.mark.long
@pytest.mark.parametrize("route", ["fast", "asan", "race"])
@pytest.mark.parametrize("group", range(1, 17))
def test_attention_of_every_group(route: str, group: int) -> None:
    rng = np.random.default_rng(group)
    for seed in range(4):
        sequences = [(int(rng.integers(0, 300)), int(rng.integers(0, 40))) for _ in range(3)]
        sequences.append((int(rng.integers(0, 300)), 1))  # a step has at least one token
        trees = [random_tree(rng, min(new, past + new - 1)) for past, new in sequences] if seed >= 2 else ()
        kv_element = ("half", "uint8_t")[(seed + group) % 2]
        fields = {"head_dim": (64, 128)[group % 2], "kv_element": kv_element, "limit": (0, 3)[seed % 2]}
        problem = make_problem(seed, sequences, trees=trees, heads=2 * group, kv_heads=2, **fields)
        run_problems(route, seed, [(problem, 0), (problem, 2)])


@pytest.mark.parametrize("route", ["race", "ptx"])
@pytest.mark.parametrize(("kv", "head_dim"), [("same", 128), ("int8", 64)])
def test_decode_reads_each_key_and_value_once(route: str, kv: str, head_dim: int) -> None:
    kv_element = "uint8_t" if kv == "int8" else "half"
    fields = {"heads": 32, "kv_heads": 2, "head_dim": head_dim, "limit": 24, "kv_element": kv_element}
    problem = make_problem(3, [(2500, 1)], **fields)
    splits = choose_splits(problem.shape, multiprocessors=16)
    buffers = {name: array.copy() for name, array in problem.buffers.items()}
    for name, (shape, dtype) in scratch(problem.shape, splits).items():
        buffers.setdefault(name, poisoned(shape, dtype))
    report = run_route(route, [attend_split(problem.shape, head_dim**-0.5, splits)], buffers)
    size = 1 if kv == "int8" else 2
    tokens = int(problem.buffers["block_counts"].sum()) * PAGE_TOKENS
    least = tokens * 2 * (head_dim * size + (4 if kv == "int8" else 0)) + problem.buffers["q"].nbytes
    assert sum(report.read.values()) <= 1.05 * least
    assert report.read["kv_pool"] == tokens * 2 * head_dim * size


@pytest.mark.parametrize("splits", [0, 1])
def test_a_row_that_sees_nothing_is_zero(splits: int) -> None:
    problem = make_problem(0, [(0, 1)], heads=2, kv_heads=1, head_dim=64)
    problem.buffers["tree_start"][:] = 0
    run_problems("fast", 0, [(replace(problem, expected=np.zeros_like(problem.expected)), splits)])


@pytest.mark.parametrize("splits", [0, 2])
def test_slots_without_a_bit_are_not_seen(splits: int) -> None:
    tree = random_tree(np.random.default_rng(2), 64)
    problem = make_problem(15, [(60, 64), (190, 70)], trees=[tree] * 2, earlier=30, heads=4, kv_heads=2, head_dim=64)
    run_problems("fast", 0, [(problem, splits)])


@pytest.mark.parametrize("kv_element", ["half", "uint8_t"])
@pytest.mark.parametrize("splits", [0, 1, 2])
def test_scores_further_apart_than_exponents_reach(splits: int, kv_element: str) -> None:
    # Warps and splits must not weigh their parts by any maximum but the largest: 2^128 is beyond float32.
    fields = {"heads": 4, "kv_heads": 1, "head_dim": 64, "kv_element": kv_element}
    problem = make_problem(12, [(699, 2)], q_scale=400, **fields)
    run_problems("fast", 0, [(problem, splits)])


def test_shapes_without_a_kernel_are_refused() -> None:
    with pytest.raises(UsageError, match="head_dim 80 has no attention kernel: it must be 64 or 128"):
        AttentionShape(1, 1, 1, 8, 2, 80)
    with pytest.raises(UsageError, match="34 query heads on 2 KV heads"):
        AttentionShape(1, 1, 1, 34, 2, 64)


def test_tiles_cover_every_division_of_the_tokens() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = rng.integers(0, 20, rng.integers(1, 6))
        shape = AttentionShape(int(counts.sum()), len(counts), 4, int(rng.integers(1, 17)), 1, 64)
        assert shape.tiles >= sum(-(-int(n) // shape.tile_tokens) for n in counts)


def test_splits() -> None:
    shape = AttentionShape(1, 1, 2048, 32, 2, 128, limit=96)
    assert choose_splits(shape, multiprocessors=16) == 8
    assert choose_splits(shape, multiprocessors=128) == 12  # 96 blocks are one for each of 12 times 8 warps
    assert choose_splits(replace(shape, tokens=64), multiprocessors=16) == 1


def test_grids_do_not_depend_on_lengths() -> None:
    launch = product_launches()["attend_split_8b_half_kv16"]
    assert launch.grid == (8, 2, 1)
    assert launch.shared_bytes == 8 * 16 * (136 * 4 + 8)
