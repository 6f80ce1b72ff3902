"""Sample and match: the stream of tokens is that of plain sampling, and its distribution the exact one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.sampler import Sampler, SamplingParams, filtered_probabilities
from edge.speculation.accept import Accepted, accept
from edge.speculation.tree import TokenTree

GOLDEN = TokenTree((99, 10, 11, 13, 14, 20), (-1, 0, 1, 2, 2, 0))


def best_path(tree: TokenTree, truth: list[int]) -> tuple[list[int], list[int]]:
    """EAGLE's vectorised verification: nodes of the deepest line all of whose tokens are true, and what it emits."""
    masks = tree.masks
    correct = [i == 0 or tree.tokens[i] == truth[tree.parents[i]] for i in range(len(tree))]
    correct_bits = np.uint64(sum(1 << i for i, flag in enumerate(correct) if flag))
    accepted = np.flatnonzero(masks & ~correct_bits == 0)
    best = accepted[np.argmax(tree.depths[accepted])]
    line = [i for i in range(len(tree)) if int(masks[best]) >> i & 1]
    return line, [truth[i] for i in line]


def test_the_worked_example() -> None:
    truth = [10, 11, 14, 99, 5, 6]
    assert best_path(GOLDEN, truth) == ([0, 1, 2, 4], [10, 11, 14, 5])
    assert accept(GOLDEN, truth.__getitem__) == Accepted((1, 2, 4), (10, 11, 14, 5))


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    tokens, parents = [0], [-1]
    taken: set[tuple[int, int]] = set()
    for _ in range(draw(st.integers(0, 30))):
        pair = draw(st.integers(0, len(tokens) - 1)), draw(st.integers(0, 3))
        if pair not in taken:
            taken.add(pair)
            parents.append(pair[0])
            tokens.append(pair[1])
    return TokenTree(tuple(tokens), tuple(parents))


@settings(max_examples=200)
@given(tree=trees(), seed=st.integers(0, 2**32), ends=st.sets(st.integers(0, 3), max_size=1), limit=st.integers(1, 6))
def test_equals_the_vectorised_verification(tree: TokenTree, seed: int, ends: set[int], limit: int) -> None:
    truth = np.random.default_rng(seed).integers(0, 4, len(tree)).tolist()
    line, emitted = best_path(tree, truth)
    asked: list[int] = []

    def choose(node: int) -> int:
        asked.append(node)
        return truth[node]

    whole = accept(tree, choose)
    assert ((0, *whole.path), whole.tokens) == (tuple(line), tuple(emitted))
    assert asked == line
    cut = accept(tree, truth.__getitem__, ends, limit)
    count = next((i + 1 for i, token in enumerate(emitted) if token in ends), len(emitted))
    count = min(count, limit)
    assert cut.tokens == tuple(emitted[:count])
    assert (0, *cut.path) == tuple(line[:count]), "the last token is never in the cache"


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        accept(GOLDEN, lambda node: 0, limit=0)


VOCAB = 6
TABLE = np.random.default_rng(11).standard_normal((VOCAB, VOCAB, VOCAB)).astype(np.float32) * 1.5


def logits_after(text: list[int]) -> np.ndarray:
    """A language of six tokens whose next depends on the last two."""
    return TABLE[text[-2], text[-1]]


def random_tree(rng: np.random.Generator, root: int) -> TokenTree:
    """Up to 20 nodes of random tokens, siblings different."""
    tokens, parents = [root], [-1]
    for _ in range(int(rng.integers(0, 20))):
        parent, token = int(rng.integers(max(0, len(tokens) - 4), len(tokens))), int(rng.integers(VOCAB))
        if (parent, token) not in zip(parents, tokens, strict=True):
            parents.append(parent)
            tokens.append(token)
    return TokenTree(tuple(tokens), tuple(parents))


def speculate(prompt: list[int], params: SamplingParams, length: int, tree_seed: int) -> tuple[list[int], int]:
    """`length` tokens with random trees, and how many proposed nodes were accepted."""
    rng = np.random.default_rng(tree_seed)
    sampler = Sampler(params, prompt)
    text, accepted = list(prompt), 0
    while len(text) < len(prompt) + length:
        tree = random_tree(rng, text[-1])

        def verify(node: int, text: list[int] = text, tree: TokenTree = tree) -> int:
            line: list[int] = []
            while node > 0:
                line.insert(0, tree.tokens[node])
                node = tree.parents[node]
            return sampler.sample(logits_after(text + line))

        found = accept(tree, verify, limit=len(prompt) + length - len(text))
        assert [tree.tokens[node] for node in found.path] == list(found.tokens[:-1])
        text += found.tokens
        accepted += len(found.path)
    return text[len(prompt) :], accepted


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tree_seed=st.integers(0, 2**32 - 1),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=5),
    temperature=st.sampled_from([0.0, 0.8, 1.5]),
    top_p=st.sampled_from([1.0, 0.9]),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_the_tokens_are_those_of_plain_sampling(
    seed: int, tree_seed: int, prompt: list[int], temperature: float, top_p: float, penalty: float
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, repetition_penalty=penalty, seed=seed)
    sampler, text = Sampler(params, prompt), list(prompt)
    for _ in range(40):
        text.append(sampler.sample(logits_after(text)))
    assert speculate(prompt, params, 40, tree_seed)[0] == text[len(prompt) :]


def test_the_distribution_is_exact() -> None:
    """Chi-square of 6000 pairs of tokens; of a quarter of them a tree had proposed the first."""
    draws, accepted = 6000, 0
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(draws):
        tokens, nodes = speculate([1, 4], SamplingParams(temperature=0.8, seed=seed), 2, seed + 1_000_000)
        counts[tuple(tokens)] += 1
        accepted += nodes
    assert accepted > 0.25 * draws
    expected = np.zeros((VOCAB, VOCAB))
    params = SamplingParams(temperature=0.8)
    for a, p in zip(*filtered_probabilities(logits_after([1, 4]), params), strict=True):
        for b, q in zip(*filtered_probabilities(logits_after([4, int(a)]), params), strict=True):
            expected[a, b] = draws * p * q
    cells = [(expected[i, j], counts[i, j]) for i in range(VOCAB) for j in range(VOCAB)]
    rare = [cell for cell in cells if cell[0] < 5]  # too few for the statistic: one cell together
    cells = [cell for cell in cells if cell[0] >= 5]
    if rare:
        cells.append((sum(e for e, _ in rare), sum(c for _, c in rare)))
    statistic = sum((count - mean) ** 2 / mean for mean, count in cells)
    assert len(cells) == 34
    assert statistic < 63.870, "the 99.9 % point of chi-square with 33 degrees of freedom"
