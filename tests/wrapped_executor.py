"""An executor around another one, for tests that watch or change what passes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge.engine import Engine
from edge.executor import StepBatch, StepResult


class WrappedExecutor:
    """Takes the place of an engine's executor and hands everything on to it."""

    def __init__(self, engine: Engine) -> None:
        self.inner = engine.executor
        self.num_pages = self.inner.num_pages
        engine.executor = self

    def step(self, batch: StepBatch) -> StepResult:
        return self.inner.step(batch)

    def keep_tokens(self, pages: Sequence[int], first: int, slots: Sequence[int]) -> None:
        self.inner.keep_tokens(pages, first, slots)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.inner.copy_pages(pairs)

    def save_pages(self, pages: Sequence[int]) -> np.ndarray:
        return self.inner.save_pages(pages)

    def load_pages(self, pages: Sequence[int], data: np.ndarray) -> None:
        self.inner.load_pages(pages, data)

    @property
    def page_bytes(self) -> int:
        return self.inner.page_bytes

    @property
    def page_format(self) -> str:
        return self.inner.page_format

    def describe(self) -> dict[str, str]:
        return self.inner.describe()

    def memory(self) -> Mapping[str, int]:
        return self.inner.memory()
