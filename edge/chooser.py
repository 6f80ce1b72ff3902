"""From one row of logits to the next token of one reply, whoever draws it, with its log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge.draw import DeviceDraw
from edge.executor import DrawParams
from edge.sampler import LogitEdits, Sampler, SamplingParams

PAIRS = tuple[tuple[int, float], ...]


class Constraint(Protocol):
    """Which tokens a reply may go on with, by a grammar; follows the reply token by token."""

    def mask(self) -> np.ndarray:
        """The tokens that may come next: [ceil(vocabulary / 32)] uint32, the lowest bit first."""
        ...

    def accept(self, token: int) -> None:
        """The reply goes on with this token, which the mask had."""
        ...


@dataclass(frozen=True)
class TokenLogprobs:
    """Of a token: its natural log-probability by the model, before any edit, and the likeliest tokens' (id, value)."""

    logprob: float
    top: PAIRS


@dataclass(frozen=True)
class Drawn:
    """A token, and what is told of it if that was asked for."""

    token: int
    logprobs: TokenLogprobs | None = None


class Chooser:
    """Draws the tokens of one reply, in order; the same logits, prompt and seed give the same tokens.

    on_device: the executor draws tokens, too; then the host draws as it does.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        *,
        on_device: bool = False,
        constraint: Constraint | None = None,
    ) -> None:
        self._params, self._constraint = params, constraint
        self._device = DeviceDraw(params, vocab_size) if on_device else None
        self._sampler = None if on_device else Sampler(params, prompt_ids)
        self._edits = LogitEdits(params)

    @property
    def leaves_it_to_the_device(self) -> bool:
        """May a device draw several tokens by itself? Not if the host must see each one's logits."""
        needs_logits = self._edits.any or self._constraint is not None or self._params.logprobs is not None
        return self._device is not None and not needs_logits

    def device_params(self, tokens: Sequence[int]) -> DrawParams:
        """For the device to draw what comes after `tokens`."""
        assert self._device is not None
        return self._device.params(tokens)

    def choose(self, logits: np.ndarray, tokens: Sequence[int]) -> Drawn:
        """Draw from logits [vocab] after `tokens`, the whole sequence; EdgeError if there is no choice."""
        edited = self._edits.apply(logits) if self._edits.any else logits
        if self._constraint is not None:
            edited = masked(edited, self._constraint.mask())
        if self._device is not None:
            token = self._device.first(edited, tokens)
        else:
            assert self._sampler is not None
            token = self._sampler.sample(edited)
        self._edits.count(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        wanted = self._params.logprobs
        return Drawn(token, None if wanted is None else logprobs_of(logits, token, wanted))


def masked(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits [vocab] with -inf where mask [ceil(vocab / 32)] has no bit."""
    allowed = np.unpackbits(mask.astype("<u4", copy=False).view(np.uint8), bitorder="little")[: logits.size]
    return np.where(allowed.astype(bool), logits, np.float32(-np.inf))


def logprobs_of(logits: np.ndarray, token: int, top: int) -> TokenLogprobs:
    """A token's log-probability by logits [vocab], and the `top` likeliest tokens', of equals the lower id first."""
    largest = float(logits.max())
    total = largest + float(np.log(np.exp(logits - np.float32(largest), dtype=np.float64).sum()))
    ids: list[int] = []
    if top := min(top, logits.size):
        least = np.partition(logits, logits.size - top)[logits.size - top]
        candidates = np.flatnonzero(logits >= least)
        ids = candidates[np.argsort(-logits[candidates], kind="stable")][:top].tolist()
    return TokenLogprobs(float(logits[token]) - total, tuple((i, float(logits[i]) - total) for i in ids))
