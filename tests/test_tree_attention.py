"""Trees of tokens: a row is what its path from the root would be, and what was accepted is as if never speculated.

The truth is the same operator without trees, on a cache of its own: every path is run as a plain chain behind the
prompt. With sparse attention a chain averages its own keys, which a tree does not: the two choose the same blocks as
long as no window of 128 tokens ends between root and row (one of 32 touches only the row's own block and the one
before, which `local` forces). What rows choose beyond that is in test_infllmv2.py, by a float64 model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins import PAGE_TOKENS
from plugins.infllmv2 import meaning as infllmv2
from plugins.paged_attention import NO_TREE
from plugins.paged_attention import meaning as paged
from tests.operators import HOW, KERNELS, Feeds
from tests.test_infllmv2 import Sparse
from tests.test_int8_cache import run
from tests.test_paged_attention import Ragged

EVERY = ["meaning", *HOW]
PAGES = 14
MOST = 12 * PAGE_TOKENS
TABLE = np.random.default_rng(0).permutation(PAGES)[None].astype(np.int32)
WINDOWS = {"c1_pool": infllmv2.FINE, "c2_pool": infllmv2.COARSE}
ORDER = ("qkv", "cos", "sin", "kv_pool", "kv_scales", "c1_pool", "c2_pool", "positions", "slots", "query_start")
ORDER += ("page_table", "tree_start", "tree_mask", "switch_length", "sparse_settings")

DENSE = Ragged((), ())
SPARSE = Sparse((), (), local=1, selected=4)
KINDS = {
    "dense": (DENSE, "float32"),
    "dense bfloat16": (DENSE, "bfloat16"),
    "dense int8": (DENSE, "int8"),
    "sparse": (SPARSE, "float32"),
    "sparse nope": (Sparse((), (), local=1, selected=4, use_nope=True), "float32"),
    "sparse int8": (SPARSE, "int8"),
    "not yet sparse": (Sparse((), (), dense_len=10**6), "float32"),
}


@dataclass
class Cache:
    """One sequence's pools, and the operator that fills them; nothing was ever written to new ones."""

    how: str
    kind: str
    pools: Feeds

    @classmethod
    def new(cls, how: str, kind: str) -> Cache:
        case, element = KINDS[kind]
        sparse = isinstance(case, Sparse)
        form = (PAGES, 3 if sparse and case.use_nope else 2, case.kv_heads, PAGE_TOKENS)
        dtype = ml_dtypes.bfloat16 if element == "bfloat16" else element
        pools = {"kv_pool": np.full((*form, case.dim), 3 if element == "int8" else np.nan, dtype)}
        if element == "int8":
            pools["kv_scales"] = np.full(form, np.nan, np.float32)
        compressed = ml_dtypes.bfloat16 if element == "int8" else np.float32
        for name, (_, stride) in WINDOWS.items() if sparse else ():
            pools[name] = np.full((PAGES, case.kv_heads, PAGE_TOKENS // stride, case.dim), np.nan, compressed)
        return cls(how, kind, pools)

    def copy(self) -> Cache:
        return Cache(self.how, self.kind, {name: pool.copy() for name, pool in self.pools.items()})

    def step(
        self,
        qkv: np.ndarray,
        positions: Sequence[int],
        slots: Sequence[int] | None = None,
        tree_start: int = NO_TREE,
        masks: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Without slots: plain tokens. -> [T, Hq d]."""
        case, _ = KINDS[self.kind]
        position, tokens = np.array(positions, np.int32), len(positions)
        angle = (position[:, None] * 50.0 ** -np.linspace(0, 1, case.dim // 2)).astype(np.float32)
        feeds = {"qkv": qkv, "cos": np.cos(angle), "sin": np.sin(angle), **self.pools, "positions": position}
        feeds["slots"] = position if slots is None else np.array(slots, np.int32)
        feeds |= {"query_start": np.array([0, tokens], np.int32), "page_table": TABLE}
        feeds["tree_start"] = np.array([tree_start], np.int32)
        feeds["tree_mask"] = np.array(masks or [0] * tokens, np.uint64).view(np.int32).reshape(-1, 2)
        if isinstance(case, Sparse):
            feeds["switch_length"] = feeds["slots"][-1:] + np.int32(1)
            feeds["sparse_settings"] = np.array([case.dense_len, case.init, case.local, case.selected], np.int32)
        after = run(self.how, case, {name: feeds[name] for name in ORDER if name in feeds})
        self.pools = {name: after[name] for name in self.pools}
        return after["output"]

    def keep(self, first: int, slots: Sequence[int]) -> None:
        keep = infllmv2.keep_tokens if "c1_pool" in self.pools else paged.keep_tokens
        keep(*(pool for name, pool in self.pools.items() if name != "kv_scales"), TABLE[0], first, slots, self.scales)

    @property
    def scales(self) -> np.ndarray | None:
        return self.pools.get("kv_scales")

    def live(self, length: int) -> Feeds:
        """All that `length` tokens have: keys, values, scales and the windows that end among them."""
        token = np.arange(length)
        page, place = TABLE[0][token // PAGE_TOKENS], token % PAGE_TOKENS
        found = {name: pool[page, :, :, place] for name, pool in self.pools.items() if name not in WINDOWS}
        for name, (window, stride) in WINDOWS.items() if "c1_pool" in self.pools else ():
            last = token[(token >= window - 1) & ((token + 1) % stride == 0)]
            found[name] = self.pools[name][TABLE[0][last // PAGE_TOKENS], :, last % PAGE_TOKENS // stride]
        return {name: array.astype(np.float32) for name, array in found.items()}


@dataclass(frozen=True)
class Tree:
    """Behind a prompt whose last token is at `root`: parents[i] of node i is an earlier one or -1, which is the root.

    The first `drafted` nodes are in the cache when the others come, as with a draft that grows its tree level by level.
    """

    root: int
    parents: tuple[int, ...]
    drafted: int
    seed: int

    @property
    def start(self) -> int:
        return self.root + 1

    def path(self, node: int) -> list[int]:
        """From the root's child to the node."""
        return [*self.path(self.parents[node]), node] if node >= 0 else []

    @property
    def leaves(self) -> list[int]:
        return sorted(set(range(len(self.parents))) - set(self.parents))

    def position(self, node: int) -> int:
        return self.root + len(self.path(node))

    def rows(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Activations of the prompt, of the nodes and of what follows."""
        case, _ = KINDS[kind]
        rng = np.random.default_rng(self.seed)
        width = (case.heads + 2 * case.kv_heads) * case.dim
        every = rng.standard_normal((self.start + len(self.parents) + 150, width)).astype(np.float32)
        prompt, nodes, rest = np.split(every, np.cumsum([self.start, len(self.parents)]))
        return prompt, nodes, rest


@st.composite
def trees(draw: st.DrawFn, least: int, most: int) -> Tree:
    """Roots around ends of windows and of pages; chains, stars and everything between."""
    edge = draw(st.integers(least // PAGE_TOKENS, most // PAGE_TOKENS - 1)) * PAGE_TOKENS
    root = edge + draw(st.sampled_from([0, 13, 14, 15, 16, 30, 31, 40, 47, 60, 61, 62, 63]))
    nodes, reach = draw(st.sampled_from([1, 2, 5, 12, 33, 64])), draw(st.sampled_from([1, 3, 10, 64]))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    parents = tuple(int(rng.integers(max(-1, i - reach), i)) for i in range(nodes))
    return Tree(root, parents, draw(st.sampled_from([0, 0, 1, nodes // 2])), draw(st.integers(0, 9999)))


def speculate(cache: Cache, tree: Tree, prompt: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The tree's rows, the root's first: in the step of the root, or with some drafted before. -> [1 + nodes, Hq d]."""
    masks = [sum(1 << i for i in tree.path(node)) for node in range(len(tree.parents))]
    positions = [tree.position(node) for node in range(len(tree.parents))]
    slots = [tree.start + node for node in range(len(tree.parents))]
    cut = tree.drafted
    first = cache.step(
        np.concatenate([prompt[-1:], nodes[:cut]]) if cut else np.concatenate([prompt[-1:], nodes]),
        [tree.root, *positions[: cut or None]],
        [tree.root, *slots[: cut or None]],
        tree.start,
        [0, *masks[: cut or None]],
    )
    if not cut or cut == len(nodes):
        return first
    return np.concatenate([first, cache.step(nodes[cut:], positions[cut:], slots[cut:], tree.start, masks[cut:])])


def same_blocks(kind: str, tree: Tree, node: int) -> bool:
    """Does no window of 128 tokens end between root and node?"""
    case, _ = KINDS[kind]
    is_sparse = isinstance(case, Sparse) and case.dense_len < 0
    return not is_sparse or (tree.root + 1) // PAGE_TOKENS == (tree.position(node) + 1) // PAGE_TOKENS


def tolerance(how: str, kind: str) -> float:
    """A kernel that multiplies bytes rounds queries and weights to two; which it rounds alike depends on the step."""
    return 5e-4 if "int8" in kind and how == "x86_64_v4_bf16" else 5e-6


def check_paths(how: str, kind: str, tree: Tree) -> None:
    prompt, nodes, _ = tree.rows(kind)
    before = Cache.new(how, kind)
    if tree.root:
        before.step(prompt[:-1], range(tree.root))
    rows = speculate(before.copy(), tree, prompt, nodes)
    for leaf in tree.leaves:
        path = tree.path(leaf)
        chain = before.copy().step(np.concatenate([prompt[-1:], nodes[path]]), range(tree.root, tree.start + len(path)))
        for node, expected in zip([-1, *path], chain, strict=True):
            if same_blocks(kind, tree, node):
                close = tolerance(how, kind)
                np.testing.assert_allclose(rows[1 + node], expected, rtol=0, atol=close, err_msg=f"{how}: {node}")


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("kind", ["dense", "dense bfloat16", "dense int8"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(tree=trees(0, 256))
def test_a_row_that_shares_its_trees_page_is_the_same_to_the_last_bit(how: str, kind: str, tree: Tree) -> None:
    """As plain decoding has it, a token a step: what lies between a node's predecessors changes no sum."""
    room = PAGE_TOKENS - tree.start % PAGE_TOKENS
    tree = Tree(tree.root, tree.parents[:room], 0, tree.seed)
    prompt, nodes, _ = tree.rows(kind)
    before = Cache.new(how, kind)
    if tree.root:
        before.step(prompt[:-1], range(tree.root))
    rows = speculate(before.copy(), tree, prompt, nodes)
    for leaf in tree.leaves[-3:]:
        alone = before.copy()
        for place, node in enumerate([-1, *tree.path(leaf)], tree.root):
            (expected,) = alone.step(prompt[-1:] if node < 0 else nodes[node : node + 1], [place])
            np.testing.assert_array_equal(rows[1 + node], expected, err_msg=f"{how}: {node}")


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("kind", ["dense", "dense bfloat16", "dense int8", "not yet sparse"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(tree=trees(0, 256))
def test_a_row_is_the_end_of_its_path(how: str, kind: str, tree: Tree) -> None:
    check_paths(how, kind, tree)


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("kind", ["sparse", "sparse nope", "sparse int8"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(tree=trees(384, 640))
def test_a_row_chooses_the_blocks_of_its_path(how: str, kind: str, tree: Tree) -> None:
    check_paths(how, kind, tree)


def check_live(how: str, kind: str, length: int, cache: Cache, plain: Cache) -> None:
    """The same, but for the order in which an average's keys were added up."""
    expected = plain.live(length)
    assert all(np.isfinite(array).all() for array in expected.values())
    for name, array in cache.live(length).items():
        close = 0.0 if name not in WINDOWS or how == "meaning" else 2.0**-7 if "int8" in kind else 1e-5
        np.testing.assert_allclose(array, expected[name], rtol=close, atol=close / 10, err_msg=f"{how}: {name}")


def check_kept(how: str, kind: str, tree: Tree, accepted: int) -> None:
    prompt, nodes, rest = tree.rows(kind)
    path = tree.path(accepted)
    plain, cache = Cache.new(how, kind), Cache.new(how, kind)
    for one in (plain, cache):
        if tree.root:
            one.step(prompt[:-1], range(tree.root))
    plain.step(np.concatenate([prompt[-1:], nodes[path]]), range(tree.root, tree.start + len(path)))
    speculate(cache, tree, prompt, nodes)
    cache.keep(tree.start, [tree.start + node for node in path])
    length = tree.start + len(path)
    check_live(how, kind, length, cache, plain)
    for size in (1, 70):  # the second writes over all that was rejected
        tokens = range(length, length + size)
        rows, expected = (one.step(rest[:size], tokens) for one in (cache, plain))
        np.testing.assert_allclose(rows, expected, rtol=0, atol=tolerance(how, kind), err_msg=how)
        length, rest = length + size, rest[size:]
        check_live(how, kind, length, cache, plain)


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(tree=trees(0, 320), data=st.data())
def test_what_was_accepted_is_as_if_never_speculated(how: str, kind: str, tree: Tree, data: st.DataObject) -> None:
    check_kept(how, kind, tree, data.draw(st.integers(-1, len(tree.parents) - 1)))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_slots_that_have_no_bit_are_hidden(how: str, kind: str) -> None:
    """Those from the 64th of a tree on, whatever the mask's last bit says; against numpy."""
    prompt, nodes, _ = Tree(500, (-1,) * 80, 0, 3).rows(kind)
    masks = (np.random.default_rng(3).integers(0, 2**63, 80, np.uint64) | np.uint64(2**63)).tolist()
    rows = []
    for one in ("meaning", how):
        cache = Cache.new(one, kind)
        cache.step(prompt, range(501))
        rows.append(cache.step(nodes, [501] * 80, range(501, 581), 501, masks))
    np.testing.assert_allclose(rows[1], rows[0], rtol=0, atol=5e-6)
