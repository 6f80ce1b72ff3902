"""Devices whose steps take known times and texts that accept with known probabilities, to try `Pace` on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from edge.speculation.accept import accept
from edge.speculation.acceptance import ChainAcceptance, TreeAcceptance
from edge.speculation.adaptive import Pace
from edge.speculation.lookup import NgramLookup
from edge.speculation.shadow import Shadow
from edge.speculation.tree import TokenTree

Cost = Callable[[int], float]
STALLS = 0.005  # the share of steps that take four times as long
PLAIN = 0.005  # seconds of a plain step that does not stall
UNIT = PLAIN * (1 + 3 * STALLS)  # on average

# Time of a step by its rows, in plain steps.
DEVICES: dict[str, Cost] = {
    "memory-bound": lambda rows: 1 + 0.01 * (rows - 1),
    "tiles of 8": lambda rows: 1 + 0.15 * ((rows - 1) // 8),
    "other kernels from 2 rows on": lambda rows: 1 if rows == 1 else 1.8 + 0.02 * rows,
    "half": lambda rows: 1 + 0.2 * (rows - 1),
    "compute-bound": lambda rows: float(rows),
}


@dataclass
class Run:
    """What a simulated reply took; all times in plain steps."""

    seconds: list[float] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def rate(self, first: int, last: int) -> float:
        """Tokens per plain step's time, between two tokens of the reply."""
        ends = np.cumsum(self.emitted)
        part = (ends > first) & (ends <= last)
        return np.asarray(self.emitted)[part].sum() / np.asarray(self.seconds)[part].sum()


class Device:
    """Seconds of steps: 5 ms times the cost, noise of some percent, now and then a stall."""

    def __init__(self, cost: Cost, rng: np.random.Generator, drift: float = 0.0) -> None:
        self._cost = cost
        self._rng = rng
        self._drift = drift

    def seconds(self, rows: int, token: int) -> float:
        stall = 4 if self._rng.random() < STALLS else 1
        growth = 1 + self._drift * token
        return PLAIN * growth * self._cost(rows) * stall * float(np.exp(0.04 * self._rng.standard_normal()))


def run_lookup(
    cost: Cost,
    acceptance: Callable[[int], float],
    tokens: int,
    seed: int,
    available: float = 1.0,
    drift: float = 0.0,
    pace: Pace | None = None,
) -> Run:
    """Chains each of whose tokens is right with the probability `acceptance` has at this token of the reply."""
    rng = np.random.default_rng(seed)
    device = Device(cost, rng, drift)
    pace = Pace(ChainAcceptance()) if pace is None else pace
    run, token = Run(), 0
    while token < tokens:
        rows, depth, _ = pace.choose(64, 64)
        assert rows == depth
        if rng.random() >= available:
            rows = 0
        seconds = device.seconds(1 + rows, token)
        right = rng.random(rows) < acceptance(token)
        accepted = rows if right.all() else int(right.argmin())
        if rows:
            pace.verified(TokenTree.chain(range(rows + 1)), range(1, accepted + 1), seconds)
        else:
            pace.plain(seconds)
        run.seconds.append(seconds / UNIT / (1 + drift * token))
        run.rows.append(rows)
        run.emitted.append(1 + accepted)
        token += 1 + accepted
    return run


def best_chain(cost: Cost, p: float) -> float:
    """Tokens per plain step's time of the best fixed length."""
    return max(sum(p**i for i in range(rows + 1)) / cost(1 + rows) for rows in range(65))


class Template:
    """The 64 likeliest nodes of a tree in which the draft's i-th choice is right with the i-th of `ranks`."""

    def __init__(self, ranks: tuple[float, ...], depth: int) -> None:
        nodes = [(1.0, 0, -1, -1)]  # probability, depth, parent, rank
        frontier = [(p, 1, 0, rank) for rank, p in enumerate(ranks)]
        while len(nodes) < 65 and frontier:
            best = max(frontier)
            frontier.remove(best)
            nodes.append(best)
            if best[1] < depth:
                frontier += [(best[0] * p, best[1] + 1, len(nodes) - 1, rank) for rank, p in enumerate(ranks)]
        self.tree = TokenTree(tuple(range(len(nodes))), tuple(node[2] for node in nodes))
        self.probabilities = np.asarray([node[0] for node in nodes])
        self._next = {(node[2], node[3]): i for i, node in enumerate(nodes)}
        self._ranks = ranks

    def path(self, rng: np.random.Generator) -> list[int]:
        """The nodes that are right this time."""
        node, path = 0, []
        while True:
            rank = int(np.searchsorted(np.cumsum(self._ranks), rng.random(), side="right"))
            if (node, rank) not in self._next:
                return path
            node = self._next[node, rank]
            path.append(node)

    def best(self, cost: Cost, draft: Callable[[int], float]) -> float:
        """Tokens per plain step's time of the best fixed depth and size."""
        rates = [1.0]
        for depth in range(1, int(self.tree.depths.max()) + 1):
            expected = np.cumsum(self.probabilities[self.tree.depths <= depth])
            rates += [e / (cost(1 + rows) + draft(depth)) for rows, e in enumerate(expected) if rows >= depth]
        return max(rates)


def run_tree(cost: Cost, draft: Callable[[int], float], template: Template, tokens: int, seed: int) -> Run:
    """Trees of a draft whose levels cost `draft(depth)` plain steps."""
    rng = np.random.default_rng(seed)
    device = Device(cost, rng)
    pace = Pace(TreeAcceptance(6))
    run, token = Run(), 0
    while token < tokens:
        rows, depth, _ = pace.choose(64, 6)
        path: list[int] = []
        drafted = 0.0
        if rows:
            tree = template.tree.limited(depth, 1 + rows)
            right = {template.tree.tokens[node] for node in template.path(rng)}
            path = [node for node in range(1, len(tree)) if tree.tokens[node] in right]
            drafted = PLAIN * draft(depth) * float(np.exp(0.04 * rng.standard_normal()))
            rows = len(tree) - 1
        seconds = device.seconds(1 + rows, token)
        if rows:
            pace.verified(tree, path, seconds, drafted)
        else:
            pace.plain(seconds)
        run.seconds.append((seconds + drafted) / UNIT)
        run.rows.append(rows)
        run.emitted.append(1 + len(path))
        token += 1 + len(path)
    return run


def run_text(cost: Cost, prompt: list[int], reply: list[int], seed: int, *, shadow: bool) -> Run:
    """A reply that is known beforehand, decoded with prompt lookup as an engine would."""
    device = Device(cost, np.random.default_rng(seed))
    pace, lookup = Pace(ChainAcceptance()), NgramLookup()
    watch = Shadow(lookup, pace)
    lookup.extend(prompt)
    lookup.extend(reply[:1])
    run, done = Run(), 1
    while done < len(reply):
        rows, *_ = pace.choose(min(64, len(reply) - done), 64)
        proposal = lookup.propose(rows)
        tree = TokenTree.chain([reply[done - 1], *proposal])
        seconds = device.seconds(len(tree), done)
        found = accept(tree, lambda node, done=done: reply[done + node], limit=len(reply) - done)
        lookup.extend(found.tokens)
        done += len(found.tokens)
        if proposal:
            pace.verified(tree, found.path, seconds)
            watch.reset()
        else:
            pace.plain(seconds)
            if shadow:
                watch.follow()
        run.seconds.append(seconds / UNIT)
        run.rows.append(len(proposal))
        run.emitted.append(len(found.tokens))
    return run
