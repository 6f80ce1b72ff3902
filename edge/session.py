"""One conversation on an engine: prompts in, tokens out, and the cache that one turn leaves to the next."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.generation import TokenEvent
from edge.sampler import SamplingParams
from edge.scheduler import Sequence as ScheduledSequence
from edge.speculation.statistics import Speculated

if TYPE_CHECKING:
    from edge.engine import Engine

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


class Session:
    """One conversation: a sequence whose cache outlives a reply, so the next turn computes only what is new.

    `notes`: JSON values of the application that are saved and restored with the session. `speculated`: how far the last
    reply came by speculation; None without it.
    """

    def __init__(self, engine: Engine, sequence: ScheduledSequence | None = None) -> None:
        self.notes: dict[str, Any] = {}
        self.speculated: Speculated | None = None
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
        engine, sequence = self._engine, self._sequence
        generation = engine.begin(sequence, prompt_ids, params)
        self.speculated = None if generation.speculator is None else generation.speculator.statistics
        tokens = sequence.tokens
        while True:
            while not generation.ready:
                if generation.error is not None:
                    raise generation.error
                engine.step([generation])
                if progress is not None and not generation.taken:
                    progress(sequence.computed, sequence.prompt_length)
            event = engine.take(generation)
            yield event
            if event.finish_reason is not None:
                return
            if sequence.tokens is not tokens:
                raise RuntimeError("this reply was ended by a later one of the same session")

    def save(self, path: Path) -> None:
        """Write the conversation with its cache to a file, for `Engine.restore_session`."""
        self._engine.save_sequence(self._sequence, path, self.notes)

    def close(self) -> None:
        """Give the pages back."""
        self._engine.cache.close(self._sequence.cache_id)
