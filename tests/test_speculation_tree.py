"""Token trees and EAGLE-2's expansion: the worked example of its description, and a brute-force expansion."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import EdgeError
from edge.speculation.tree import TokenTree, TreeExpansion

Path = tuple[int, ...]


def as_logits(log_probs: dict[int, float], vocab: int = 25) -> np.ndarray:
    """Logits whose log_softmax is `log_probs` at its ids, the rest of the mass on tokens that never win."""
    logits = np.full(vocab, -np.inf, np.float64)
    for token, value in log_probs.items():
        logits[token] = value
    rest = 1 - np.exp(list(log_probs.values())).sum()
    others = [token for token in range(vocab) if token not in log_probs]
    logits[others] = np.log(rest / len(others))
    return logits.astype(np.float32)


def test_the_worked_example() -> None:
    """k 2, three levels, six nodes: tokens, parents, depths and masks as in EAGLE-2's implementation."""
    expansion = TreeExpansion(as_logits({10: -0.3, 20: -1.6}), k=2)
    assert expansion.beam.tokens.tolist() == [10, 20]
    assert expansion.beam.parents.tolist() == [0, 0]
    assert (expansion.beam.masks.tolist(), expansion.beam.first_slot) == ([0b01, 0b10], 0)
    expansion.extend(np.stack([as_logits({11: -0.2, 12: -2.0}), as_logits({21: -0.1, 22: -3.0})]))
    assert expansion.beam.tokens.tolist() == [11, 21]
    assert expansion.beam.parents.tolist() == [0, 1]
    assert (expansion.beam.masks.tolist(), expansion.beam.first_slot) == ([0b0101, 0b1010], 2)
    expansion.extend(np.stack([as_logits({13: -0.5, 14: -1.0}), as_logits({23: -0.2, 24: -1.9})]))
    tree = expansion.tree(99, 6)
    assert tree == TokenTree((99, 10, 11, 13, 14, 20), (-1, 0, 1, 2, 2, 0))
    assert tree.depths.tolist() == [0, 1, 2, 3, 3, 1]
    assert tree.masks.tolist() == [1, 3, 7, 15, 23, 33]
    assert tree.row_masks.tolist() == [1, 3, 7, 11, 16]
    assert expansion.depth == 3


class Reference:
    """The same expansion on paths of tokens, with sorts over everything instead of indices and beams."""

    def __init__(self, logits_after: Callable[[Path], np.ndarray], k: int, levels: int, scale: float) -> None:
        self.found: list[tuple[np.float32, Path]] = []
        self.beams: list[list[Path]] = []
        beam: list[tuple[np.float32, Path]] = [(np.float32(0), ())]
        for _ in range(levels):
            candidates = []
            for score, path in beam:
                logits = logits_after(path)
                x = logits.astype(np.float32) * np.float32(scale)
                x = x - x.max()
                log_probs = x - np.log(np.exp(x).sum())
                ids = sorted(range(len(x)), key=lambda token, row=logits: (-row[token], token))[:k]  # type: ignore[misc]
                candidates += [(score + log_probs[token], (*path, token)) for token in ids]
            self.found += candidates
            beam = sorted(candidates, key=lambda entry: -entry[0])[:k]  # sorted is stable
            self.beams.append([path for _, path in beam])

    def paths(self, size: int) -> list[Path]:
        best = sorted(self.found, key=lambda entry: -entry[0])[: size - 1]
        return [path for score, path in best if score > -np.inf]


def grown(logits_after: Callable[[Path], np.ndarray], k: int, levels: int, scale: float, size: int) -> TokenTree:
    """The tree of an expansion that knows its size, and so runs no row that cannot matter."""
    expansion = TreeExpansion(logits_after(()), k, scale, size)
    beam = [(int(token),) for token in expansion.beam.tokens]
    for _ in range(1, levels):
        assert len(beam) <= min(k, max(0, size - 1 - expansion.depth))
        if not beam:
            break
        expansion.extend(np.stack([logits_after(path) for path in beam]))
        now = expansion.beam
        beam = [(*beam[row], int(t)) for row, t in zip(now.parents, now.tokens, strict=True)]
    return expansion.tree(5, size)


def paths_of(tree: TokenTree) -> list[Path]:
    paths: list[Path] = [()]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([1, 2, 3, 7, 64, 200, 700]),
    k=st.integers(1, 9),
    levels=st.integers(1, 4),
    size=st.integers(1, 65),
    scale=st.sampled_from([1.0, 0.0625, 4.0]),
    kind=st.sampled_from(["smooth", "ties", "sharp", "masked"]),
)
def test_equals_brute_force(seed: int, vocab: int, k: int, levels: int, size: int, scale: float, kind: str) -> None:
    def logits_after(path: Path) -> np.ndarray:
        rng = np.random.default_rng([seed, *path])
        logits = rng.standard_normal(vocab)
        if kind == "ties":
            logits = np.round(logits)
        elif kind == "sharp":  # log-probabilities that round to 0 for one token a row
            logits = np.round(logits * 3) * 60
        elif kind == "masked":
            logits[rng.random(vocab) < 0.7] = -np.inf
            logits[rng.integers(vocab)] = 0
        return logits.astype(np.float32)

    reference = Reference(logits_after, k, levels, scale)
    expansion = TreeExpansion(logits_after(()), k, scale)
    beam = [(int(token),) for token in expansion.beam.tokens]
    slots = list(beam)  # the draft's own tree: the path that each slot stands for
    for level in range(1, levels):
        assert beam == reference.beams[level - 1]
        for mask, path in zip(expansion.beam.masks.tolist(), beam, strict=True):
            assert sorted(slots[i] for i in range(64) if mask >> i & 1) == sorted(
                path[: n + 1] for n in range(len(path))
            )
        assert expansion.beam.first_slot == len(slots) - len(beam)
        expansion.extend(np.stack([logits_after(path) for path in beam]))
        now = expansion.beam
        beam = [(*beam[row], int(t)) for row, t in zip(now.parents, now.tokens, strict=True)]
        slots += beam
    assert beam == reference.beams[levels - 1]
    tree = expansion.tree(5, size)
    assert paths_of(tree) == reference.paths(size)
    assert grown(logits_after, k, levels, scale, size) == tree
    remap = np.arange(vocab)[::-1] + 1000
    renamed = expansion.tree(5, size, remap)
    assert renamed.parents == tree.parents
    assert renamed.tokens == (5, *(vocab - 1 - token + 1000 for token in tree.tokens[1:]))


def test_fewer_levels_and_nodes_are_a_limited_tree() -> None:
    rng = np.random.default_rng(3)
    expansion = TreeExpansion(rng.standard_normal(50), k=4)
    shallow = expansion.tree(1, 3), expansion.tree(1, 5)
    for _ in range(2):
        expansion.extend(rng.standard_normal((4, 50)))
    tree = expansion.tree(1, 65)
    assert (tree.limited(1, 3), tree.limited(1, 5)) == shallow
    assert tree.limited(3, 20) == expansion.tree(1, 20)
    assert tree.limited(9, 99) == tree
    assert tree.limited(0, 5) == tree.limited(3, 1) == TokenTree((1,), (-1,))


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    parents = [-1]
    for node in range(1, draw(st.integers(1, 65))):
        parents.append(draw(st.integers(0, node - 1)))
    return TokenTree(tuple(range(len(parents))), tuple(parents))


@given(tree=trees(), depth=st.integers(0, 8), nodes=st.integers(1, 65))
def test_masks_depths_and_limits_of_any_tree(tree: TokenTree, depth: int, nodes: int) -> None:
    def line(node: int) -> list[int]:
        return [] if node < 0 else [*line(tree.parents[node]), node]

    for node in range(len(tree)):
        assert tree.depths[node] == len(line(node)) - 1
        assert all(tree.parents[child] == node for child in tree.children(node))
        if node:
            assert int(tree.row_masks[node - 1]) == sum(1 << i - 1 for i in line(node)[1:])
    assert sum(len(tree.children(node)) for node in range(len(tree))) == len(tree) - 1
    if len(tree) <= 64:
        assert tree.masks.dtype == tree.row_masks.dtype == np.uint64
        assert tree.masks.tolist() == [sum(1 << i for i in line(node)) for node in range(len(tree))]
    limited = tree.limited(depth, nodes)
    assert limited.tokens == tuple(n for n in tree.tokens if tree.depths[n] <= depth)[:nodes]
    for node, parent in enumerate(limited.parents):  # tokens are the nodes of the whole tree
        assert node == 0 or limited.tokens[parent] == tree.parents[limited.tokens[node]]


def test_a_chain_and_its_last_mask_bit() -> None:
    tree = TokenTree.chain(range(65))
    assert tree.parents == tuple(range(-1, 64))
    assert int(tree.row_masks[-1]) == 2**64 - 1
    with pytest.raises(ValueError, match="64 bits"):
        _ = tree.masks
    assert int(tree.limited(99, 64).masks[-1]) == 2**64 - 1


@pytest.mark.parametrize(
    ("tokens", "parents"),
    [((), ()), ((1,), (0,)), ((1, 2), (-1,)), ((1, 2), (-1, 1)), ((1, 2), (-1, -1)), ((1,) * 66, (-1, *range(65)))],
)
def test_what_is_no_tree_is_refused(tokens: Path, parents: Path) -> None:
    with pytest.raises(ValueError, match="parent"):
        TokenTree(tokens, parents)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_draft_is_an_error(bad: float) -> None:
    logits = np.zeros(9, np.float32)
    logits[4] = bad
    with pytest.raises(EdgeError, match="draft"):
        TreeExpansion(logits, 2)
    with pytest.raises(EdgeError, match="draft"):
        TreeExpansion(np.full(9, -np.inf), 2)


def test_a_level_that_no_mask_can_name_is_refused() -> None:
    expansion = TreeExpansion(np.zeros(40), 33)
    assert expansion.beam.tokens.size == 33
    expansion.extend(np.zeros((33, 40)))
    assert len(expansion.tree(0, 65)) == 65  # the last level is never run and needs no slots
    with pytest.raises(ValueError, match="66 slots"):
        _ = expansion.beam
