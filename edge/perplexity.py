"""Perplexity of a model on a text, window by window."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edge.engine import Engine
from edge.errors import UsageError

# Rows of logits that are widened to float64 at once.
ROWS = 64


def perplexity(engine: Engine, ids: Sequence[int], window: int) -> float:
    """exp of the mean negative log-likelihood of `ids`, cut into windows that know nothing of each other.

    Every token but the first of its window is scored, so ceil(n / window) of n tokens are not. Memory is bounded by
    one step's logits (chunk x vocab float32). Raises UsageError if there is nothing to score, EdgeError if `window`
    does not fit the engine's context.
    """
    if window < 2 or len(ids) < 2:
        raise UsageError(f"perplexity needs 2 tokens or more, not {len(ids)} in windows of {window}")
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        tokens = ids[start : start + window]
        targets = np.asarray(tokens[1:])
        done = 0
        for logits in engine.stream_logits(tokens, len(tokens)):
            # The last row of the window predicts a token that is not in it.
            wanted = targets[done : done + len(logits)]
            total += _negative_log_likelihood(logits[: len(wanted)], wanted)
            done += len(wanted)
        count += len(targets)
    return math.exp(total / count)


def _negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum over rows of -log softmax(logits)[target]; logits [n, vocab] float32, targets [n]."""
    total = 0.0
    for start in range(0, len(targets), ROWS):
        rows, wanted = logits[start : start + ROWS].astype(np.float64), targets[start : start + ROWS]
        top = rows.max(axis=1)
        log_sum = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
        total += float((log_sum - rows[np.arange(len(wanted)), wanted]).sum())
    return total
