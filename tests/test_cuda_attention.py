"""attend.cu against numpy: dense, sparse, tree-masked; over tile and page edges; every route and schedule.

The oracle computes in float32 from the rotated queries and from keys and values as the pool holds them. A kernel rounds
probabilities (at most 1) to the element type before it multiplies values of about 1, and the result once more: half
has 2^-11 of each, bf16 2^-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from edge.errors import UsageError
from plugins import PAGE_TOKENS
from plugins.infllmv2.meaning import masked_attention
from plugins.launch import Launch
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
from plugins.paged_attention.pages import Step, from_device, make_step, to_device
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


def visible_keys(rng: np.random.Generator, step: Step, b: int, shape: AttentionShape, inputs: dict) -> np.ndarray:
    """[Hkv, new tokens, length] bool; writes the choice of blocks and the tree masks into `inputs`."""
    rows, positions = step.rows(b), step.positions[step.rows(b)]
    keys = np.arange(positions[-1] + 1)
    visible = np.broadcast_to(keys <= positions[:, None], (shape.kv_heads, len(rows), len(keys))).copy()
    if shape.tree:
        seen = np.eye(len(rows), dtype=bool)
        for i in range(1, len(rows)):
            seen[i] |= seen[rng.integers(0, i)]  # of its parent
        later = rng.integers(0, 2, (len(rows), 64), dtype=np.uint64) << np.arange(64, dtype=np.uint64)
        for i, row in enumerate(rows):
            bits = int(np.bitwise_or.reduce(later[i])) >> (i + 1) << (i + 1)  # of later tokens: no matter
            inputs["tree_mask"][row] = bits | sum(1 << int(j) for j in np.flatnonzero(seen[i]))
        visible[:, :, positions[0] :] &= seen[None]
    if shape.limit and b % 2 == 0:  # odd sequences stay dense
        for t, row in enumerate(rows):
            own = positions[t] // PAGE_TOKENS
            for head in range(shape.kv_heads):
                count = min(own + 1, shape.limit)
                chosen = np.sort(np.append(rng.permutation(own)[: count - 1], own))
                inputs["blocks"][row, head, : len(chosen)] = chosen
                inputs["block_counts"][row, head] = len(chosen)
                visible[head, t] &= np.isin(keys // PAGE_TOKENS, chosen)
    return visible


def make_problem(
    seed: int, sequences: Sequence[tuple[int, int]], q_scale: float = 1.5, **shape_fields: object
) -> Problem:
    rng = np.random.default_rng(seed)
    step = make_step(rng, list(sequences))
    tokens = len(step.positions)
    shape = AttentionShape(tokens, step.sequences, step.page_table.shape[1], **shape_fields)
    dtype = ELEMENTS[shape.element]
    # The pool already has the new tokens: what append does is tested on its own.
    whole = Step(step.positions, step.query_start, step.page_table, step.pages)
    pool = past_pool(rng, whole, shape.planes, shape.kv_heads, shape.head_dim, np.dtype(np.float32))
    for b in range(step.sequences):
        for i in step.positions[step.rows(b)]:
            new = rng.normal(size=(shape.planes, shape.kv_heads, shape.head_dim))
            pool[step.page_table[b, i // PAGE_TOKENS], :, :, i % PAGE_TOKENS] = new
    inputs = {
        "q": (q_scale * rng.normal(size=(tokens, shape.heads, shape.head_dim))).astype(dtype),
        "positions": step.positions,
        "query_start": step.query_start,
        "page_table": step.page_table,
        "blocks": np.full((tokens, shape.kv_heads, max(shape.limit, 1)), -1, np.int32),
        "block_counts": np.zeros((tokens, shape.kv_heads), np.int32),
        "tree_mask": np.zeros(tokens, np.uint64),
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
    tree = make_problem(9, [(60, 12), (0, 9), (130, 1)], heads=16, kv_heads=2, tree=True, **base)
    both = make_problem(10, [(250, 20)], heads=16, kv_heads=1, tree=True, limit=2, **base)
    deep = make_problem(11, [(699, 2)], heads=4, kv_heads=1, **base)  # more blocks than a split has warps
    with_splits = [(deep, 2), (sparse, 1), (sparse, 3), (tree, 2), (both, 1)]
    return [*problems, *with_splits, *((problem, 0) for problem in (sparse, single, tree, both))]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv", ["same", "int8"])
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ROUTES)
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
        limit, tree = (0, 3)[seed % 2], seed >= 2
        kv_element = ("half", "uint8_t")[(seed + group) % 2]
        fields = {"head_dim": (64, 128)[group % 2], "kv_element": kv_element, "limit": limit, "tree": tree}
        problem = make_problem(seed, sequences, heads=2 * group, kv_heads=2, **fields)
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
    problem = make_problem(0, [(0, 1)], heads=2, kv_heads=1, head_dim=64, tree=True)
    problem.buffers["tree_mask"][:] = 0
    run_problems("fast", 0, [(replace(problem, expected=np.zeros_like(problem.expected)), splits)])


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
