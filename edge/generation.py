"""The loop: a step of every reply in progress, whatever each of them is at. Sessions and the server run on this."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, cast

import numpy as np

from edge.chooser import Chooser, Drawn, TokenLogprobs, logprobs_of
from edge.draw import check_drawn, stack
from edge.errors import EdgeError
from edge.executor import DecodingExecutor, StepResult
from edge.kv_cache import NoPagesError
from edge.sampler import SamplingParams
from edge.scheduler import Scheduler, Step
from edge.scheduler import Sequence as ScheduledSequence
from edge.speculation.accept import accept
from edge.speculation.speculator import Limits, Speculator
from edge.speculation.tree import MOST_TREE_ROWS, TokenTree
from plugins import PAGE_TOKENS

if TYPE_CHECKING:
    from edge.engine import Engine


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. finish_reason: None while there is more, 'stop' (end token) or 'length'."""

    token_id: int
    finish_reason: str | None
    logprobs: TokenLogprobs | None = None


class Generation:
    """One reply in progress: its sequence, how its tokens are drawn, and those that were not taken yet.

    limit: tokens at most. ends: tokens after which there is nothing. `error`: why no token could be chosen.
    prompt_logprobs: of the prompt's tokens from the second on, as far as they are computed.
    """

    def __init__(
        self,
        sequence: ScheduledSequence,
        params: SamplingParams,
        limit: int,
        ends: tuple[int, ...],
        chooser: Chooser,
        speculator: Speculator | None = None,
    ) -> None:
        self.sequence, self.params, self.limit, self.ends = sequence, params, limit, ends
        self.chooser, self.speculator = chooser, speculator
        self.taken = 0
        self.ready: deque[Drawn] = deque()
        self.error: EdgeError | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return self.limit - self.taken - len(self.ready)


class Loop:
    """Steps of the replies of one engine.

    While tokens of a reply are ready, the cache has all of them but the last, though the sequence does not know them
    yet: those that nobody takes are forgotten.
    """

    def __init__(self, engine: Engine, scheduler: Scheduler) -> None:
        self._engine, self.scheduler = engine, scheduler

    def step(self, generations: Iterable[Generation], chunk: int | None = None) -> int:
        """A step of those of which no token is ready -> tokens of prompts in it. NoPagesError if none can run.

        chunk: prompt tokens at most, if that is less than the engine's.
        """
        waiting = [g for g in generations if not g.ready and g.error is None and g.left]
        if not waiting:
            return 0
        executor = self._engine.executor
        if all(map(_draws_on_device, waiting)):
            self._burst(cast(DecodingExecutor, executor), waiting)  # each chooser has found it to be one
            return 0
        self._propose(waiting)
        started = perf_counter()
        step = self.scheduler.next_step([g.sequence for g in waiting], chunk)
        assert step is not None
        trees = [sequence.tree for sequence in step.sequences]
        for g in waiting:
            g.sequence.tree = None
        result = executor.step(step.batch)
        by_sequence = {id(g.sequence): g for g in waiting}
        chosen = [by_sequence[id(sequence)] for sequence in step.sequences]
        prompts = sum(count for g, count in zip(chosen, step.counts, strict=True) if g.sequence.pending > 1)
        for part in _parts(step, result, trees):
            self._finish(chosen[part.index], part, None if prompts else started)
        return prompts

    def take(self, generation: Generation) -> TokenEvent:
        """The next token that is ready, now part of the sequence. The caller ends after a finish_reason."""
        sequence = generation.sequence
        if sequence.pending:
            self._engine.count(sequence, 1, sequence.length_after(1))
        drawn = generation.ready.popleft()
        sequence.tokens.append(drawn.token)
        generation.taken += 1
        reason = "length" if generation.taken == generation.limit else None
        if drawn.token in generation.ends:
            reason = "stop"
        return TokenEvent(drawn.token, reason, drawn.logprobs)

    def _finish(self, generation: Generation, part: _Part, started: float | None) -> None:
        """What a step computed of one reply: its tokens are counted, and what follows them is drawn.

        started: when the step began, if it had nothing but replies.
        """
        sequence, speculator = generation.sequence, generation.speculator
        first, is_reply = sequence.computed, sequence.pending == 1 and generation.taken > 0
        if part.logits is None:
            self._count(generation, part, ())
            return
        if sequence.logits_from is not None:
            self._list_prompt(generation, first, part)
            if first + part.count < len(sequence.tokens):
                self._count(generation, part, ())
                return
            sequence.logits_from = None
        tree = part.tree or TokenTree.chain(sequence.tokens[-1:])
        logits, drawn = part.logits[-len(tree) :], list[Drawn]()

        def choose(node: int) -> int:
            drawn.append(generation.chooser.choose(logits[node], [*sequence.tokens, *(d.token for d in drawn)]))
            return drawn[-1].token

        try:
            accepted = accept(tree, choose, generation.ends, generation.left)
        except EdgeError as error:
            generation.error = error
            return
        root = first + part.count - 1
        if accepted.path:
            pages = self._engine.cache.pages(sequence.cache_id)
            self._engine.executor.keep_tokens(pages, root + 1, [root + node for node in accepted.path])
        if speculator is not None and is_reply:
            speculator.observe(tree, accepted, None if started is None else perf_counter() - started)
        self._count(generation, part, accepted.path)
        generation.ready.extend(drawn)

    def _count(self, generation: Generation, part: _Part, path: Sequence[int]) -> None:
        sequence = generation.sequence
        if generation.speculator is not None:
            rows = [*range(part.count), *(part.count - 1 + node for node in path)]
            hidden = None if part.hidden is None else part.hidden[rows]
            generation.speculator.follow(sequence.computed, hidden)
        self._engine.count(sequence, part.count, part.length)

    def _list_prompt(self, generation: Generation, first: int, part: _Part) -> None:
        tokens, top = generation.sequence.tokens, generation.params.logprobs or 0
        assert part.logits is not None
        start = first + part.count - len(part.logits)
        for position, logits in enumerate(part.logits, start + 1):
            if position < len(tokens):
                generation.prompt_logprobs.append(logprobs_of(logits, tokens[position], top))

    def _propose(self, waiting: Sequence[Generation]) -> None:
        """Trees below the last tokens of those that speculate. They share the rows of a step.

        Where prompts are computed there are none: that time would not tell what a tree costs.
        """
        speculating = [g for g in waiting if g.speculator is not None and g.sequence.pending == 1 and g.taken]
        if not speculating:
            return
        share = 1 + (self._engine.plan.run.rows - len(waiting)) // len(speculating)
        if any(g.sequence.pending > 1 for g in waiting):
            share = 1
        for g in speculating:
            assert g.speculator is not None
            g.speculator.beside(len(waiting))
            g.sequence.tree = self._tree(g, g.speculator, share)

    def _tree(self, generation: Generation, speculator: Speculator, share: int) -> TokenTree | None:
        sequence = generation.sequence
        length = sequence.length_after(1)
        limits = self._limits(sequence, length, generation.left, share)
        if not (wanted := speculator.choose(sequence.tokens, limits)).rows:
            return None
        room = sequence.computed + 1 + max(wanted.rows, speculator.slots)
        cache = self._engine.cache
        try:
            cache.reserve(sequence.cache_id, min(room, self._engine.max_context), sequence.computed)
        except NoPagesError:
            return None
        return speculator.propose(sequence.tokens, cache.pages(sequence.cache_id), length, wanted)

    def _limits(self, sequence: ScheduledSequence, length: int, left: int, share: int) -> Limits:
        """The largest tree whose nodes are computed exactly as they would be one after the other.

        That asks for one mode. In sparse attention no node may be the last token of a page either: what comes after it
        chooses blocks by a window that ends there, and nodes of a tree are in no window.
        """
        first, modes, sparse = sequence.computed, self._engine.modes, self._engine.plan.sparse
        mode = modes.of(length)
        room = self._engine.max_context - 1 - first
        rows = max(0, min(share - 1, room, MOST_TREE_ROWS))
        depth = min(left - 1, rows)
        if mode.is_sparse and sparse is not None:
            # Without local blocks the last scores come from the fine windows of a token's own page.
            stride = PAGE_TOKENS if sparse.local_blocks else sparse.kernel_stride
            depth = min(depth, (stride - 2 - first) % stride)
        while depth and modes.of(sequence.length_after(1 + depth)) != mode:
            depth -= 1
        return Limits(rows, depth)

    def _burst(self, executor: DecodingExecutor, waiting: Sequence[Generation]) -> None:
        """Several tokens of each reply. What is drawn after the last token that is taken is forgotten."""
        count = min(executor.burst, *(g.left for g in waiting))
        for g in waiting:
            count = self._room(g.sequence, count)
        step = self.scheduler.next_step([g.sequence for g in waiting])
        assert step is not None
        by_sequence = {id(g.sequence): g for g in waiting}
        chosen = [by_sequence[id(sequence)] for sequence in step.sequences]
        vocab_size = self._engine.vocab_size
        params = stack([g.chooser.device_params(g.sequence.tokens) for g in chosen], vocab_size)
        tokens = executor.decode(step.batch, params, count)
        for g, drawn in zip(chosen, tokens.T.tolist(), strict=True):
            self._engine.count(g.sequence, 1, g.sequence.length_after(1))
            try:
                for token in drawn[: _length(drawn, g.ends)]:
                    g.ready.append(Drawn(check_drawn(token)))
            except EdgeError as error:
                g.error = error

    def _room(self, sequence: ScheduledSequence, most: int) -> int:
        """How many tokens to decode at once: `most`, or what the sequence's pages hold if there are no others."""
        cache = self._engine.cache
        try:
            cache.reserve(sequence.cache_id, sequence.computed + most, sequence.computed)
        except NoPagesError:
            room = len(cache.pages(sequence.cache_id)) * PAGE_TOKENS - sequence.computed
            return max(1, min(most, room))
        return most


def _draws_on_device(generation: Generation) -> bool:
    """May a device go on with it by itself? The first token comes from a prompt's logits, which the host has."""
    is_reply = generation.sequence.pending == 1 and generation.taken > 0
    return is_reply and generation.speculator is None and generation.chooser.leaves_it_to_the_device


def _length(tokens: Sequence[int], ends: Sequence[int]) -> int:
    """Of tokens up to the first that is an end or that could not be drawn."""
    return next((i + 1 for i, token in enumerate(tokens) if token in ends or token < 0), len(tokens))


@dataclass(frozen=True)
class _Part:
    """One sequence's share of a step: its place in the step, its tokens, its rows of logits and hidden states.

    hidden has a row for each token and node of the tree; length is its switch_length.
    """

    index: int
    count: int
    length: int
    tree: TokenTree | None
    logits: np.ndarray | None
    hidden: np.ndarray | None


def _parts(step: Step, result: StepResult, trees: Sequence[TokenTree | None]) -> Iterator[_Part]:
    row = 0
    for index, (count, wanted, tree) in enumerate(zip(step.counts, step.logits_counts, trees, strict=True)):
        start, end = step.batch.query_start[index : index + 2]
        logits = result.logits[row : row + wanted] if wanted else None
        hidden = None if result.hidden is None else result.hidden[start:end]
        yield _Part(index, count, int(step.batch.switch_length[index]), tree, logits, hidden)
        row += wanted
