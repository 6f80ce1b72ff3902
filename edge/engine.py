"""The loop: schedule a step, execute it, sample, repeat. CLI, server and benchmarks all run on this."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge.bundle import Bundle, open_bundle
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
from edge.session_file import CacheIdentity, restore_sequence, save_sequence
from plugins import PAGE_TOKENS

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. finish_reason: None while there is more, 'stop' (end token) or 'length'."""

    token_id: int
    finish_reason: str | None


class Session:
    """One conversation: a sequence whose cache outlives a reply, so the next turn computes only what is new.

    `notes`: JSON values of the application that are saved and restored with the session.
    """

    def __init__(self, engine: Engine, sequence: ScheduledSequence | None = None) -> None:
        self.notes: dict[str, Any] = {}
        self._engine = engine
        self._sequence = sequence or ScheduledSequence(engine.cache.open())

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        progress: Progress | None = None,
    ) -> Generator[TokenEvent, None, None]:
        """Tokens after `prompt_ids` (the whole conversation so far). What is cached of it is not computed again.

        `progress(done, total)` counts prompt tokens during the prefill. A new call ends an earlier reply.
        """
        self._engine.check_prompt(prompt_ids)
        sequence = self._sequence
        self._engine.reuse(sequence, prompt_ids)
        tokens = sequence.tokens
        limit = min(params.max_tokens, self._engine.max_context - len(prompt_ids))
        end_tokens = () if params.ignore_eos else self._engine.eos_token_ids
        for index, token in enumerate(self._engine.tokens(sequence, params, limit, progress)):
            tokens.append(token)
            reason = "length" if index + 1 == limit else None
            if token in end_tokens:
                reason = "stop"
            yield TokenEvent(token, reason)
            if reason is not None:
                return
            if sequence.tokens is not tokens:
                raise RuntimeError("this reply was ended by a later one of the same session")

    def save(self, path: Path) -> None:
        """Write the conversation with its cache to a file, for `Engine.restore_session`."""
        self._engine.save_sequence(self._sequence, path, self.notes)

    def close(self) -> None:
        """Give the pages back."""
        self._engine.cache.close(self._sequence.cache_id)


class Engine:
    """An executor with its cache and scheduler, inside one memory plan."""

    def __init__(
        self, bundle: Bundle, executor: Executor, plan: Plan, chunk: int, *, prefix_cache: bool = True
    ) -> None:
        self.bundle = bundle
        self.plan = plan
        self.cache = KVCache(plan.num_pages, executor.copy_pages)
        self.prefix_cache = prefix_cache
        self._modes = Modes(bundle.config, plan.sparse)
        self._executor = executor
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

    def advance(self, sequence: ScheduledSequence, progress: Progress | None = None) -> np.ndarray:
        """Run steps until every known token of the sequence is computed -> logits [vocab] after the last."""
        while step := self._scheduler.next_step([sequence]):
            result = self._executor.step(step.batch)
            self._count(sequence, step.counts[0], int(step.batch.switch_length[0]))
            if progress is not None:
                progress(sequence.computed, sequence.prompt_length)
            if step.logits_counts[0]:
                return result.logits[-1]
        raise AssertionError("advance() needs a sequence with pending tokens")

    def tokens(
        self, sequence: ScheduledSequence, params: SamplingParams, limit: int, progress: Progress | None = None
    ) -> Generator[int, None, None]:
        """Draw up to `limit` tokens after those of the sequence; the caller appends each before it takes the next."""
        if isinstance(self._executor, DecodingExecutor):
            yield from self._device_tokens(self._executor, sequence, params, limit, progress)
            return
        sampler = Sampler(params, sequence.tokens)
        for index in range(limit):
            yield sampler.sample(self.advance(sequence, progress if index == 0 else None))

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
                self._count(sequence, 1, max(sequence.prompt_length, sequence.computed + 1))
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
        return compare(self.plan.lines, self._executor.memory())

    def describe(self) -> dict[str, str]:
        """Facts for reports: model, weights, executor, threads, KV type, attention, bundle key."""
        manifest = self.bundle.manifest
        return {
            "model": manifest.name,
            "weights": manifest.weights["description"],
            "target": manifest.target,
            **self._executor.describe(),
            "attention": self._attention(),
            "bundle": manifest.key[:12],
        }


def open_engine(path: Path, options: EngineOptions) -> Engine:
    """Open a bundle, plan its memory and load its executor. A device needs the libraries of its own executor only."""
    bundle = open_bundle(path)
    if bundle.manifest.target == "onnxruntime":
        from edge.executors.onnxruntime import OnnxRuntimeExecutor, Reserved
        from edge.offload import Offload

        plan = make_plan(bundle, options)
        weights, step = plan.bytes("weights"), plan.bytes("activations")
        reserved = Reserved(weights + headroom(weights), step + headroom(step), plan.run.rows)
        offload = None
        if options.offload is not None and plan.resident_pages is not None:
            offload = Offload(options.offload, plan.resident_pages)
        host = OnnxRuntimeExecutor(bundle, plan.num_pages, options.threads, plan.sparse, reserved, offload)
        return Engine(bundle, host, plan, options.chunk, prefix_cache=options.prefix_cache)
    from edge.executors.tensorrt_open import open_tensorrt

    executor, plan, chunk = open_tensorrt(bundle, options)
    return Engine(bundle, executor, plan, chunk, prefix_cache=options.prefix_cache)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise UsageError if there are no ids, or one that the model does not know."""
    if not len(ids):
        raise UsageError("the prompt is empty; give at least one token")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise UsageError(f"token id {bad} is outside the vocabulary of {vocab_size}; use ids 0..{vocab_size - 1}")
