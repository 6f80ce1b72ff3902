"""The loop: schedule a step, execute it, sample, repeat. CLI, server and benchmarks all run on this."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edge.bundle import Bundle, open_bundle
from edge.drafters import check_speculative, make_speculation
from edge.draw import DeviceDraw, check_drawn
from edge.errors import EdgeError, UsageError
from edge.executor import DecodingExecutor, Executor
from edge.interrupts import deferred_interrupts
from edge.kv_cache import KVCache, NoPagesError
from edge.memory.fit import make_plan
from edge.memory.ledger import headroom
from edge.memory.measured import Compared, compare
from edge.plan import ALWAYS_DENSE, EngineOptions, Plan
from edge.reuse import Modes, common_prefix, record
from edge.sampler import Sampler, SamplingParams
from edge.scheduler import Scheduler
from edge.scheduler import Sequence as ScheduledSequence
from edge.session import Progress, Session, TokenEvent
from edge.session_file import CacheIdentity, restore_sequence, save_sequence
from edge.speculation.accept import Accepted, accept
from edge.speculation.speculator import Limits, Speculation, Speculator
from edge.speculation.tree import MOST_TREE_ROWS, TokenTree
from plugins import PAGE_TOKENS

Choose = Callable[[np.ndarray, list[int]], int]  # (logits [vocab], what this step drew before) -> the next token


class Engine:
    """An executor with its cache and scheduler, inside one memory plan."""

    def __init__(
        self,
        bundle: Bundle,
        executor: Executor,
        plan: Plan,
        chunk: int,
        *,
        prefix_cache: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        self.bundle = bundle
        self.plan = plan
        self.cache = KVCache(plan.num_pages, self._copy_pages)
        self.prefix_cache = prefix_cache
        self._modes = Modes(bundle.config, plan.sparse)
        self._executor = executor
        self._speculation = speculation
        self._scheduler = Scheduler(self.cache, chunk, plan.run.rows)

    @property
    def max_context(self) -> int:
        """Tokens one sequence may hold, prompt and reply together."""
        return self.plan.max_context

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.bundle.config.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply."""
        return self.bundle.config.eos_token_ids

    def check_prompt(self, ids: Sequence[int], reply: int = 1) -> None:
        """Raise if the prompt is empty, has ids the model does not know, or leaves no room for `reply` tokens."""
        check_ids(ids, self.vocab_size)
        if len(ids) + reply > self.max_context:
            raise EdgeError(
                f"the prompt has {len(ids)} tokens and the context is limited to {self.max_context}; shorten it, "
                "or raise --context or --memory"
            )

    def open_session(self) -> Session:
        """A conversation that keeps its cache between turns; close it when done."""
        return Session(self)

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        progress: Progress | None = None,
    ) -> Generator[TokenEvent, None, None]:
        """One reply in a session of its own; what earlier ones began alike is not computed again."""
        session = self.open_session()
        try:
            yield from session.generate(prompt_ids, params, progress)
        finally:
            session.close()

    @deferred_interrupts()
    def reuse(self, sequence: ScheduledSequence, prompt_ids: Sequence[int]) -> None:
        """Give a sequence a new prompt, keeping what it or the prefix cache has computed of it as a cold run would.

        The prompt's last token has to run for its logits, and not alone: see edge/scheduler.py.
        """
        mode = self._modes.of(len(prompt_ids))
        common = common_prefix(sequence.tokens[: sequence.computed], prompt_ids[:-1])
        sequence.computed = kept = self._modes.alike(sequence.runs, mode, common)
        self.cache.truncate(sequence.cache_id, kept)
        sequence.tokens, sequence.prompt_length = list(prompt_ids), len(prompt_ids)
        if self.prefix_cache:
            salt = partial(self._modes.salt, mode)
            sequence.computed = self.cache.adopt(sequence.cache_id, sequence.tokens[:-2], salt, kept)
            if sequence.computed > kept:
                sequence.runs = [(0, mode)]

    @deferred_interrupts()
    def _count(self, sequence: ScheduledSequence, count: int, length: int) -> None:
        """Note that the next `count` tokens are computed, with switch_length `length`, and publish full pages."""
        record(sequence.runs, sequence.computed, self._modes.of(length))
        sequence.computed += count
        if self.prefix_cache:
            self._publish(sequence)

    def _publish(self, sequence: ScheduledSequence) -> None:
        salt = partial(self._modes.salt_of, sequence.runs)
        self.cache.publish(sequence.cache_id, sequence.tokens, sequence.computed, salt)

    def restore_session(self, path: Path) -> Session:
        """A session as `Session.save` wrote it, with this bundle and the same attention.

        EdgeError, with nothing of it loaded, if the file is damaged, of another bundle or cache, or does not fit.
        """
        sequence, notes = restore_sequence(path, self.cache, self._executor, self._cache_identity(), self.max_context)
        if self.prefix_cache:
            self._publish(sequence)
        session = Session(self, sequence)
        session.notes = notes
        return session

    def save_sequence(self, sequence: ScheduledSequence, path: Path, notes: dict[str, Any]) -> None:
        """Write a sequence and its pages to a file; see `Session.save`."""
        save_sequence(path, sequence, self.cache, self._executor, self._cache_identity(), notes)

    def _cache_identity(self) -> CacheIdentity:
        return CacheIdentity.of(self.bundle.manifest.key, self._executor, self.plan.sparse)

    def _copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._executor.copy_pages(pairs)
        if self._speculation is not None and self._speculation.draft is not None:
            self._speculation.draft.copy_pages(pairs)

    def begin_speculation(self) -> Speculator | None:
        """For one reply; None if the engine does not speculate."""
        return None if self._speculation is None else self._speculation.begin()

    def advance(
        self, sequence: ScheduledSequence, progress: Progress | None = None, speculator: Speculator | None = None
    ) -> np.ndarray:
        """Run steps until every known token of the sequence is computed -> logits [vocab] after the last."""
        while step := self._scheduler.next_step([sequence]):
            result = self._executor.step(step.batch)
            if speculator is not None:
                speculator.follow(sequence.computed, result.hidden)
            self._count(sequence, step.counts[0], int(step.batch.switch_length[0]))
            if progress is not None:
                progress(sequence.computed, sequence.prompt_length)
            if step.logits_counts[0]:
                return result.logits[-1]
        raise AssertionError("advance() needs a sequence with pending tokens")

    def tokens(
        self,
        sequence: ScheduledSequence,
        params: SamplingParams,
        limit: int,
        progress: Progress | None = None,
        speculator: Speculator | None = None,
    ) -> Generator[int, None, None]:
        """Draw up to `limit` tokens after those of the sequence; the caller appends each before it takes the next."""
        if speculator is None and isinstance(self._executor, DecodingExecutor):
            yield from self._device_tokens(self._executor, sequence, params, limit, progress)
            return
        choose = self._choice(sequence, params)
        yield choose(self.advance(sequence, progress, speculator), [])
        if speculator is not None:
            ends = () if params.ignore_eos else self.eos_token_ids
            yield from self._speculated_tokens(sequence, choose, limit - 1, ends, speculator)
            return
        for _ in range(limit - 1):
            yield choose(self.advance(sequence), [])

    def _choice(self, sequence: ScheduledSequence, params: SamplingParams) -> Choose:
        """How the executor's own decoding draws a token."""
        if isinstance(self._executor, DecodingExecutor):
            draw = DeviceDraw(params, self.vocab_size)
            return lambda logits, drawn: draw.first(logits, [*sequence.tokens, *drawn])
        sampler = Sampler(params, sequence.tokens)
        return lambda logits, _: sampler.sample(logits)

    def _speculated_tokens(
        self,
        sequence: ScheduledSequence,
        choose: Choose,
        left: int,
        ends: tuple[int, ...],
        speculator: Speculator,
    ) -> Generator[int, None, None]:
        """`left` tokens of verified trees, of which none goes on after one of `ends`.

        Those that the caller did not take are forgotten, though they were computed.
        """
        while left:
            accepted = self._verify(sequence, choose, left, ends, speculator)
            for token in accepted.tokens[:-1]:
                yield token
                self._count(sequence, 1, sequence.length_after(1))
            yield accepted.tokens[-1]
            left -= len(accepted.tokens)

    def _verify(
        self, sequence: ScheduledSequence, choose: Choose, left: int, ends: tuple[int, ...], speculator: Speculator
    ) -> Accepted:
        """One step of the last token and of what is proposed to follow it."""
        first, length = sequence.computed, sequence.length_after(1)
        sequence.tree = self._propose(sequence, length, left, speculator)
        started = perf_counter()
        step = self._scheduler.next_step([sequence])
        assert step is not None
        tree, sequence.tree = sequence.tree or TokenTree.chain(sequence.tokens[-1:]), None
        result = self._executor.step(step.batch)
        drawn: list[int] = []

        def draw(node: int) -> int:
            drawn.append(choose(result.logits[node], drawn))
            return drawn[-1]

        accepted = accept(tree, draw, ends, left)
        if accepted.path:
            self._executor.keep_tokens(
                self.cache.pages(sequence.cache_id), first + 1, [first + node for node in accepted.path]
            )
        speculator.observe(tree, accepted, perf_counter() - started)
        if result.hidden is not None:
            speculator.follow(first, result.hidden[[0, *accepted.path]])
        self._count(sequence, 1, length)
        return accepted

    def _propose(self, sequence: ScheduledSequence, length: int, left: int, speculator: Speculator) -> TokenTree | None:
        limits = self._limits(sequence, length, left)
        if limits.depth < 1 or not (wanted := speculator.choose(sequence.tokens, limits)).rows:
            return None
        room = sequence.computed + 1 + max(wanted.rows, speculator.slots)
        try:
            self.cache.reserve(sequence.cache_id, min(room, self.max_context), sequence.computed)
        except NoPagesError:
            return None
        return speculator.propose(sequence.tokens, self.cache.pages(sequence.cache_id), length, wanted)

    def _limits(self, sequence: ScheduledSequence, length: int, left: int) -> Limits:
        """The largest tree whose nodes are computed exactly as they would be one after the other.

        That asks for one mode. In sparse attention no node may be the last token of a page either: what comes after it
        chooses blocks by a window that ends there, and nodes of a tree are in no window.
        """
        first, mode = sequence.computed, self._modes.of(length)
        room = self.max_context - 1 - first
        rows = min(self.plan.run.rows - 1, room, MOST_TREE_ROWS)
        depth = min(left - 1, rows)
        if mode.is_sparse and self.plan.sparse is not None:
            # Without local blocks the last scores come from the fine windows of a token's own page.
            stride = PAGE_TOKENS if self.plan.sparse.local_blocks else self.plan.sparse.kernel_stride
            depth = min(depth, (stride - 2 - first) % stride)
        while depth and self._modes.of(sequence.length_after(1 + depth)) != mode:
            depth -= 1
        return Limits(rows, depth)

    def _device_tokens(
        self,
        executor: DecodingExecutor,
        sequence: ScheduledSequence,
        params: SamplingParams,
        limit: int,
        progress: Progress | None,
    ) -> Generator[int, None, None]:
        """Bursts of tokens. What a burst computed beyond the last token that was taken is forgotten."""
        draw = DeviceDraw(params, self.vocab_size)
        yield draw.first(self.advance(sequence, progress), sequence.tokens)
        left = limit - 1
        while left:
            count = self._burst(sequence, min(executor.burst, left))
            step = self._scheduler.next_step([sequence])
            assert step is not None and step.counts == (1,)
            for token in executor.decode(step.batch, draw.params(sequence.tokens), count)[:, 0]:
                self._count(sequence, 1, sequence.length_after(1))
                yield check_drawn(int(token))
            left -= count

    def _burst(self, sequence: ScheduledSequence, most: int) -> int:
        """How many tokens to decode at once: `most`, or what the sequence's pages hold if there are no others."""
        try:
            self.cache.reserve(sequence.cache_id, sequence.computed + most, sequence.computed)
        except NoPagesError:
            room = len(self.cache.pages(sequence.cache_id)) * PAGE_TOKENS - sequence.computed
            return max(1, min(most, room))
        return most

    def logits(self, ids: Sequence[int], last: int) -> np.ndarray:
        """Logits [last, vocab] after each of the last `last` tokens of one sequence, teacher-forced."""
        return np.concatenate(list(self.stream_logits(ids, last)))

    def stream_logits(
        self, ids: Sequence[int], last: int, progress: Progress | None = None
    ) -> Generator[np.ndarray, None, None]:
        """What `logits` returns, step by step: as many rows at a time as the plan has."""
        self.check_prompt(ids, reply=0)
        sequence = ScheduledSequence(self.cache.open(), list(ids), prompt_length=len(ids), logits_from=len(ids) - last)
        try:
            while step := self._scheduler.next_step([sequence]):
                result = self._executor.step(step.batch)
                sequence.computed += step.counts[0]
                if progress is not None:
                    progress(sequence.computed, len(ids))
                if step.logits_counts[0]:
                    yield result.logits
        finally:
            self.cache.close(sequence.cache_id)

    def _attention(self) -> str:
        sparse = self.plan.sparse
        if sparse is None or sparse.dense_len == ALWAYS_DENSE:
            return "dense"
        return f"sparse, {sparse.selected_blocks} blocks, from {max(sparse.dense_len, 0)} tokens on"

    def ledger(self) -> tuple[Compared, ...]:
        """The plan's lines beside what the run has taken so far."""
        measured = dict(self._executor.memory())
        if self._speculation is not None and self._speculation.draft is not None:
            of_draft = self._speculation.draft.memory()
            measured |= of_draft
            if "process" in measured:  # of which the executor knows no draft
                measured["process"] = max(0, measured["process"] - sum(of_draft.values()))
        return compare(self.plan.lines, measured)

    def describe(self) -> dict[str, str]:
        """Facts for reports: model, weights, executor, threads, KV type, attention, bundle key."""
        manifest = self.bundle.manifest
        return {
            "model": manifest.name,
            "weights": manifest.weights["description"],
            "target": manifest.target,
            **self._executor.describe(),
            "attention": self._attention(),
            **({} if self._speculation is None else {"speculation": self._speculation.describe()}),
            "bundle": manifest.key[:12],
        }


def open_engine(path: Path, options: EngineOptions) -> Engine:
    """Open a bundle, plan its memory and load its executor. A device needs the libraries of its own executor only."""
    bundle = open_bundle(path)
    check_speculative(bundle, options.speculative)
    if bundle.manifest.target == "onnxruntime":
        from edge.executors.onnxruntime import OnnxRuntimeExecutor
        from edge.executors.ort_session import Reserved
        from edge.offload import Offload

        plan = make_plan(bundle, options)
        weights, step = plan.bytes("weights"), plan.bytes("activations")
        reserved = Reserved(weights + headroom(weights), step + headroom(step), plan.run.rows)
        offload = None
        if options.offload is not None and plan.resident_pages is not None:
            offload = Offload(options.offload, plan.resident_pages)
        host = OnnxRuntimeExecutor(bundle, plan.num_pages, options.threads, plan.sparse, reserved, offload)
        speculation = make_speculation(bundle, options, plan)
        return Engine(bundle, host, plan, options.chunk, prefix_cache=options.prefix_cache, speculation=speculation)
    from edge.executors.tensorrt_open import open_tensorrt

    executor, plan, chunk = open_tensorrt(bundle, options)
    speculation = make_speculation(bundle, options, plan)
    return Engine(bundle, executor, plan, chunk, prefix_cache=options.prefix_cache, speculation=speculation)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise UsageError if there are no ids, or one that the model does not know."""
    if not len(ids):
        raise UsageError("the prompt is empty; give at least one token")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise UsageError(f"token id {bad} is outside the vocabulary of {vocab_size}; use ids 0..{vocab_size - 1}")
