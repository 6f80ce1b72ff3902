"""The host's part where the device draws the tokens: parameters for the kernel, and the first token of a reply.

The first token comes from a prefill step's logits, which the host has; it is drawn by the kernel's own meaning
(plugins/sampling), so a reply does not depend on where a burst of decode steps begins.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from edge.errors import EdgeError
from edge.executor import DrawParams
from edge.sampler import SamplingParams
from plugins.sampling.meaning import SamplingInputs, sample


class DeviceDraw:
    """How one request's tokens are drawn; a request without a seed gets one."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self._params, self._vocab_size = params, vocab_size
        self._seed = secrets.randbits(64) if params.seed is None else params.seed

    def params(self, tokens: Sequence[int]) -> DrawParams:
        """For the token after `tokens`, of one sequence."""
        p = self._params
        penalty = seen = None
        if p.repetition_penalty != 1:
            penalty = np.array([p.repetition_penalty], np.float32)
            is_seen = np.zeros(-(-self._vocab_size // 32) * 32, np.uint8)
            is_seen[np.asarray(tokens)] = 1
            seen = np.packbits(is_seen, bitorder="little").view("<u4")[None]
        return DrawParams(
            temperature=np.array([p.temperature], np.float32),
            top_k=np.array([min(p.top_k, self._vocab_size)], np.int32),
            top_p=np.array([p.top_p], np.float32),
            min_p=np.array([p.min_p], np.float32),
            seed=np.array([self._seed], np.uint64),
            step=np.array([len(tokens)], np.int32),
            penalty=penalty,
            seen=seen,
        )

    def first(self, logits: np.ndarray, tokens: Sequence[int]) -> int:
        """Draw from logits [vocab] after `tokens`."""
        params = self.params(tokens)
        values = {field.name: getattr(params, field.name) for field in fields(params)}
        return check_drawn(int(sample(SamplingInputs(logits[None], **values))[0]))


def stack(rows: Sequence[DrawParams], vocab_size: int) -> DrawParams:
    """Parameters of several sequences, each of which was of one."""
    values = {field.name: [getattr(row, field.name) for row in rows] for field in fields(DrawParams)}
    if all(penalty is None for penalty in values["penalty"]):
        values["penalty"] = values["seen"] = None  # type: ignore[assignment]
    else:
        neutral, nothing = np.ones(1, np.float32), np.zeros((1, -(-vocab_size // 32)), np.uint32)
        values["penalty"] = [neutral if penalty is None else penalty for penalty in values["penalty"]]
        values["seen"] = [nothing if seen is None else seen for seen in values["seen"]]
    return DrawParams(**{name: None if column is None else np.concatenate(column) for name, column in values.items()})


def check_drawn(token: int) -> int:
    """EdgeError for -1, which stands for logits that leave no choice."""
    if token < 0:
        raise EdgeError("no token can be chosen because no logit is finite: check the weights")
    return token
