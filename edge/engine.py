"""The loop: schedule a step, execute it, sample, repeat. CLI, server and benchmarks all run on this."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge.bundle import Bundle, open_bundle
from edge.chooser import Chooser, Constraint
from edge.drafters import check_speculative, make_speculation
from edge.errors import EdgeError, UsageError
from edge.executor import DecodingExecutor, Executor
from edge.generation import Generation, Loop, TokenEvent
from edge.interrupts import deferred_interrupts
from edge.kv_cache import KVCache
from edge.memory.fit import make_plan
from edge.memory.ledger import regions
from edge.memory.measured import Compared, compare
from edge.plan import ALWAYS_DENSE, EngineOptions, Plan
from edge.reuse import Modes, common_prefix, record
from edge.sampler import SamplingParams
from edge.scheduler import Scheduler
from edge.scheduler import Sequence as ScheduledSequence
from edge.session import Progress, Session
from edge.session_file import CacheIdentity, restore_sequence, save_sequence
from edge.speculation.speculator import Speculation


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
        self.modes = Modes(bundle.config, plan.sparse)
        self.executor = executor
        self.speculation = speculation
        self.chunk = chunk
        self._loop = Loop(self, Scheduler(self.cache, chunk, plan.run.rows))

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
    def reuse(self, sequence: ScheduledSequence, tokens: Sequence[int], prompt_length: int | None = None) -> None:
        """Give a sequence new tokens, keeping what it or the prefix cache has computed of them as a cold run would.

        They are a prompt of `prompt_length` tokens, None: all of them, and as much of its reply as there was. The last
        token has to run for its logits, and not alone: see edge/scheduler.py.
        """
        prompt_length = len(tokens) if prompt_length is None else prompt_length
        mode = self.modes.of(prompt_length)
        common = common_prefix(sequence.tokens[: sequence.computed], tokens[:-1])
        sequence.computed = kept = self.modes.alike(sequence.runs, mode, common)
        self.cache.truncate(sequence.cache_id, kept)
        sequence.tokens, sequence.prompt_length = list(tokens), prompt_length
        sequence.tree, sequence.logits_from = None, None
        sequence.cuts = self.modes.cuts(prompt_length, len(tokens))
        if self.prefix_cache:
            salt = partial(self.modes.salt, mode)
            sequence.computed = self.cache.adopt(sequence.cache_id, sequence.tokens[:-2], salt, kept)
            if sequence.computed > kept:
                sequence.runs = [(0, mode)]

    @deferred_interrupts()
    def forget(self, sequence: ScheduledSequence) -> None:
        """Give a sequence's pages back and keep its tokens; `reuse` computes it again."""
        self.cache.truncate(sequence.cache_id, 0)
        sequence.computed, sequence.runs = 0, []
        sequence.tree, sequence.cuts = None, ()

    @deferred_interrupts()
    def count(self, sequence: ScheduledSequence, count: int, length: int) -> None:
        """Note that the next `count` tokens are computed, with switch_length `length`, and publish full pages."""
        record(sequence.runs, sequence.computed, self.modes.of(length))
        sequence.computed += count
        if self.prefix_cache:
            self._publish(sequence)

    def _publish(self, sequence: ScheduledSequence) -> None:
        salt = partial(self.modes.salt_of, sequence.runs)
        self.cache.publish(sequence.cache_id, sequence.tokens, sequence.computed, salt)

    def restore_session(self, path: Path) -> Session:
        """A session as `Session.save` wrote it, with this bundle and the same attention.

        EdgeError, with nothing of it loaded, if the file is damaged, of another bundle or cache, or does not fit.
        """
        sequence, notes = restore_sequence(path, self.cache, self.executor, self._cache_identity(), self.max_context)
        if self.prefix_cache:
            self._publish(sequence)
        session = Session(self, sequence)
        session.notes = notes
        return session

    def save_sequence(self, sequence: ScheduledSequence, path: Path, notes: dict[str, Any]) -> None:
        """Write a sequence and its pages to a file; see `Session.save`."""
        save_sequence(path, sequence, self.cache, self.executor, self._cache_identity(), notes)

    def _cache_identity(self) -> CacheIdentity:
        return CacheIdentity.of(self.bundle.manifest.key, self.executor, self.plan.sparse)

    def _copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.executor.copy_pages(pairs)
        if self.speculation is not None and self.speculation.draft is not None:
            self.speculation.draft.copy_pages(pairs)

    def begin(
        self,
        sequence: ScheduledSequence,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        constraint: Constraint | None = None,
    ) -> Generation:
        """A reply to a prompt, which is the sequence's from now on; nothing of it is computed yet."""
        self.check_prompt(prompt_ids)
        if params.prompt_logprobs:
            self.forget(sequence)
            sequence.tokens, sequence.prompt_length = list(prompt_ids), len(prompt_ids)
            sequence.logits_from = 0
        else:
            self.reuse(sequence, prompt_ids)
        on_device = isinstance(self.executor, DecodingExecutor)
        chooser = Chooser(params, prompt_ids, self.vocab_size, on_device=on_device, constraint=constraint)
        return Generation(
            sequence,
            params,
            limit=min(params.max_tokens, self.max_context - len(prompt_ids)),
            ends=() if params.ignore_eos else self.eos_token_ids,
            chooser=chooser,
            speculator=None if self.speculation is None else self.speculation.begin(),
        )

    def step(self, generations: Iterable[Generation], chunk: int | None = None) -> int:
        """One step of replies, all at once; see Loop."""
        return self._loop.step(generations, chunk)

    def take(self, generation: Generation) -> TokenEvent:
        """The next token of a reply that has one ready; see Loop."""
        return self._loop.take(generation)

    def advance(self, sequence: ScheduledSequence) -> np.ndarray:
        """Run steps until every known token of the sequence is computed -> logits [vocab] after the last."""
        while step := self._loop.scheduler.next_step([sequence]):
            result = self.executor.step(step.batch)
            self.count(sequence, step.counts[0], int(step.batch.switch_length[0]))
            if step.logits_counts[0]:
                return result.logits[-1]
        raise AssertionError("advance() needs a sequence with pending tokens")

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
            while step := self._loop.scheduler.next_step([sequence]):
                result = self.executor.step(step.batch)
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
        measured = dict(self.executor.memory())
        if self.speculation is not None and self.speculation.draft is not None:
            of_draft = self.speculation.draft.memory()
            measured |= of_draft
            if "process" in measured:  # of which the executor knows no draft
                measured["process"] = max(0, measured["process"] - sum(of_draft.values()))
        return compare(self.plan.lines, measured)

    def describe(self) -> dict[str, str]:
        """Facts for reports: model, weights, executor, threads, KV type, attention, limits of a run, bundle key."""
        manifest, run = self.bundle.manifest, self.plan.run
        return {
            "model": manifest.name,
            "weights": manifest.weights["description"],
            "target": manifest.target,
            **self.executor.describe(),
            "attention": self._attention(),
            "context": f"{run.context} tokens",
            "chunk": f"{run.chunk} tokens",
            "sequences": str(run.sequences),
            **({} if self.speculation is None else {"speculation": self.speculation.describe()}),
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
        reserved = Reserved(*regions(plan.bytes("activations")), plan.run.rows)
        offload = None
        if options.offload is not None and plan.resident_pages is not None:
            offload = Offload(options.offload, plan.resident_pages)
        host = OnnxRuntimeExecutor(
            bundle,
            plan.num_pages,
            options.threads,
            plan.sparse,
            reserved,
            offload,
            takes_turns=options.speculative == "eagle",
        )
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
