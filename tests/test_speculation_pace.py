"""How much to verify: simulated devices and texts against the best fixed choice, and against plain decoding always."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pace_simulation import DEVICES, Template, best_chain, run_lookup, run_text, run_tree

from edge.speculation.acceptance import ChainAcceptance, TreeAcceptance
from edge.speculation.adaptive import TAX, Pace
from edge.speculation.costs import Costs, Curve
from edge.speculation.lookup import NgramLookup
from edge.speculation.shadow import Shadow
from edge.speculation.speculator import PLAIN
from edge.speculation.statistics import Speculated
from edge.speculation.tree import TokenTree

TEMPLATES = {
    "good draft": Template((0.7, 0.12, 0.06, 0.03, 0.02), 6),
    "poor draft": Template((0.35, 0.12, 0.06, 0.03, 0.02, 0.01), 6),
    "bad draft": Template((0.03, 0.02, 0.01), 6),
}


@pytest.mark.parametrize("p", [0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("device", DEVICES)
def test_chains_are_about_as_long_as_is_best(device: str, p: float) -> None:
    run = run_lookup(DEVICES[device], lambda token: p, 3000, seed=1)
    assert run.rate(1000, 3000) > 0.9 * best_chain(DEVICES[device], p)
    assert run.rate(0, 3000) > 0.95
    assert run.rate(0, 300) > 0.94, "the beginning may cost three steps"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("device", ["memory-bound", "tiles of 8", "half", "compute-bound"])
def test_trees_are_about_as_large_as_is_best(device: str, template: str) -> None:
    run = run_tree(DEVICES[device], lambda depth: 0.1 * depth, TEMPLATES[template], 3000, seed=2)
    best = TEMPLATES[template].best(DEVICES[device], lambda depth: 0.1 * depth)
    assert run.rate(1000, 3000) > 0.9 * best
    assert run.rate(0, 3000) > 0.95


@pytest.mark.parametrize("device", DEVICES)
def test_text_that_changes(device: str) -> None:
    """Prose, then copying, then prose: each part near its best soon after it began, and prose never slow."""
    cost = DEVICES[device]
    run = run_lookup(cost, lambda token: 0.95 if 1500 <= token < 4000 else 0.05, 6000, seed=3)
    assert run.rate(0, 1000) > 0.95
    assert run.rate(2500, 4000) > 0.9 * best_chain(cost, 0.95)
    assert run.rate(4100, 6000) > 0.95


def test_proposals_that_are_rare_and_a_context_that_grows() -> None:
    cost = DEVICES["memory-bound"]
    run = run_lookup(cost, lambda token: 0.9, 3000, seed=4, available=0.3, drift=1e-3)
    tree_steps = np.asarray(run.rows) > 0
    speed = np.asarray(run.emitted)[tree_steps].sum() / np.asarray(run.seconds)[tree_steps].sum()
    assert speed > 0.85 * best_chain(cost, 0.9)
    prose = run_lookup(DEVICES["half"], lambda token: 0.1, 3000, seed=5, available=0.3, drift=1e-3)
    assert prose.rate(0, 3000) > 0.96


def test_a_first_step_that_takes_long_does_not_turn_it_off() -> None:
    pace = Pace(ChainAcceptance())
    emitted = time = 0.0
    seen: set[int] = set()
    for _ in range(300):
        rows, *_ = pace.choose(64, 64)
        seconds = (1 + 0.01 * rows) * (1 if rows in seen else 30)  # allocation, kernels loaded, a graph captured
        seen.add(rows)
        if rows:
            pace.verified(TokenTree.chain(range(rows + 1)), range(1, rows + 1), seconds)
        else:
            pace.plain(seconds)
        emitted += 1 + rows
        time += seconds
    assert emitted > 40 * 200


class OneMoment:
    """A pace after some plain steps of a second and trees of three nodes."""

    def __init__(self, accepted: int, seconds: float, trees: int = 30) -> None:
        self.pace = Pace(ChainAcceptance())
        for _ in range(20):
            self.pace.plain(1.0)
        for _ in range(trees):
            self.pace.verified(TokenTree.chain(range(4)), range(1, accepted + 1), seconds)


def test_choices_are_repeatable_and_limited() -> None:
    assert Pace(ChainAcceptance()).choose(64, 64) == PLAIN, "no plain step was measured yet"
    moment = OneMoment(accepted=3, seconds=1.1)
    choice = moment.pace.choose(64, 64)
    assert choice == moment.pace.choose(64, 64) == OneMoment(accepted=3, seconds=1.1).pace.choose(64, 64)
    assert choice[0] == choice[1] > 3
    assert moment.pace.choose(2, 64) == moment.pace.choose(64, 2)
    assert moment.pace.choose(2, 64)[:2] == (2, 2)
    assert moment.pace.choose(0, 64) == moment.pace.choose(64, 0) == PLAIN
    assert OneMoment(accepted=0, seconds=2.0).pace.choose(64, 64) == PLAIN


@settings(max_examples=15, deadline=None)
@given(
    slope=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    phases=st.lists(st.tuples(st.integers(1, 300), st.sampled_from([0.0, 0.2, 0.7, 1.0])), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_the_text_it_never_loses_more_than_the_tax(
    slope: float, phases: list[tuple[int, float]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pace = Pace(ChainAcceptance())
    emitted = time = steps = 0.0
    for length, p in phases:
        for _ in range(length):
            rows, *_ = pace.choose(64, 64)
            wrong = np.flatnonzero(rng.random(rows) >= p)
            accepted = int(wrong[0]) if wrong.size else rows
            seconds = 1 + slope * rows
            if rows:
                pace.verified(TokenTree.chain(range(rows + 1)), range(1, accepted + 1), seconds)
            else:
                pace.plain(seconds)
            emitted, time, steps = emitted + 1 + accepted, time + seconds, steps + 1
            # Three steps at the start, and one tree whose cost was not known before: of two rows, at most two steps.
            assert time <= emitted + TAX * steps + 3 + 2


def test_expected_acceptance_of_chains() -> None:
    rng = np.random.default_rng(6)
    acceptance = ChainAcceptance()
    sums = []
    for step in range(1500):
        right = np.flatnonzero(rng.random(7) >= 0.8)
        acceptance.observe(TokenTree.chain(range(8)), range(1, (int(right[0]) if right.size else 7) + 1))
        if step > 200:
            sums.append(acceptance.expected(20))
    truth = np.cumsum(0.8 ** np.arange(1, 21))
    np.testing.assert_allclose(np.mean(sums, axis=0), truth, rtol=0.08)


@pytest.mark.parametrize("template", ["good draft", "poor draft"])
def test_expected_acceptance_of_trees_smaller_and_larger_than_those_tried(template: str) -> None:
    whole = TEMPLATES[template]
    rng = np.random.default_rng(7)
    tree = whole.tree.limited(4, 24)
    acceptance = TreeAcceptance(6)
    means: dict[tuple[int, int], list[float]] = {}
    for step in range(1500):
        right = {whole.tree.tokens[node] for node in whole.path(rng)}
        acceptance.observe(tree, [node for node in range(1, len(tree)) if tree.tokens[node] in right])
        if step > 200 and step % 10 == 0:
            shapes = acceptance.shapes(63, 6)
            for rows, depth, value in zip(shapes.rows, shapes.depths, shapes.expected, strict=True):
                means.setdefault((rows, depth), []).append(value)
    for (rows, depth), values in means.items():
        smaller = whole.tree.limited(depth, 1 + rows)
        if len(smaller) == 1 + rows:
            truth = sum(whole.probabilities[token] for token in smaller.tokens[1:])
            tried = depth <= 4 and len(tree.limited(depth, 1 + rows)) == 1 + rows
            assert np.mean(values) == pytest.approx(truth, rel=0.06 if tried else 0.3), (rows, depth)


def test_costs_by_their_measurements() -> None:
    curve = Curve()
    assert curve.at([3]) == [0.0]
    for size in (2, 4, 8):
        for _ in range(8):
            curve.observe(size, 1 + 0.5 * size)
    assert curve.at([3, 4, 20]) == pytest.approx([2.5, 3.0, 11.0], rel=1e-3)
    curve.observe(4, 300.0)
    assert curve.at([4])[0] == pytest.approx(3.0, rel=0.1), "one stall"
    for _ in range(8):
        curve.observe(4, 6.0)
    assert curve.at([4])[0] == pytest.approx(6.0, rel=0.1), "it did get slower"


def test_a_device_is_measured_once_for_all_sequences() -> None:
    costs = Costs()
    first = Pace(ChainAcceptance(), costs)
    for _ in range(3):
        first.plain(1.0)
        first.verified(TokenTree.chain(range(16)), [], 1.1)
    assert Pace(ChainAcceptance(), costs).choose(12, 12)[0] > 2


class Judged(Pace):
    """Notes what a shadow reports."""

    def __init__(self) -> None:
        super().__init__(ChainAcceptance())
        self.reports: list[tuple[tuple[int, ...], int]] = []

    def unverified(self, tree: TokenTree, path: Sequence[int]) -> None:
        super().unverified(tree, path)
        assert list(path) == list(range(1, len(path) + 1))
        self.reports.append((tree.tokens[1:], len(path)))


@given(text=st.lists(st.integers(0, 2), max_size=80), stride=st.integers(1, 3))
def test_a_shadow_reports_what_its_proposals_came_to(text: list[int], stride: int) -> None:
    lookup, pace = NgramLookup(), Judged()
    shadow = Shadow(lookup, pace)
    reports = []
    proposal: list[int] = []
    made = 0
    for begin in range(0, len(text), stride):
        lookup.extend(text[begin : begin + stride])
        shadow.follow()
        came = text[made : begin + stride][: len(proposal)]
        if proposal and (came == proposal or came != proposal[: len(came)]):
            right = 0
            while right < len(came) and came[right] == proposal[right]:
                right += 1
            reports.append((tuple(proposal), right))
            proposal = []
        if not proposal:
            proposal, made = lookup.propose(8), begin + stride
    assert pace.reports == reports


def test_a_shadow_notices_copying_where_trying_out_is_dear() -> None:
    """Text of a language with six continuations of each word, in which a reply then quotes its prompt."""
    cost = DEVICES["other kernels from 2 rows on"]
    copying: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        following = rng.integers(0, 300, (300, 6))

        def prose(length: int, rng: np.random.Generator = rng, following: np.ndarray = following) -> list[int]:
            text = [0]
            while len(text) < length:
                text.append(int(following[text[-1], min(int(rng.geometric(0.45)) - 1, 5)]))
            return text

        prompt = prose(1500)
        reply = prose(1000) + prompt[200:1000] + prose(1000)
        for shadow in (True, False):
            run = run_text(cost, prompt, reply, seed, shadow=shadow)
            copying[shadow].append(1 / run.rate(1000, 1800))
            assert run.rate(0, 1000) > 0.95
            assert run.rate(1800, 2800) > 0.94
    assert np.mean(copying[True]) < 0.85 * np.mean(copying[False])


def test_statistics() -> None:
    done = Speculated()
    assert done.mean_accept_length == 1
    done.add(proposed=5, emitted=4, draft_seconds=0.25)
    done.add(proposed=5, emitted=1, draft_seconds=0.25)
    assert (done.steps, done.proposed, done.accepted, done.emitted) == (2, 10, 3, 5)
    assert (done.mean_accept_length, done.draft_seconds, dict(done.lengths)) == (2.5, 0.5, {4: 1, 1: 1})
