"""From one row of logits to one token: the filters of transformers, in its order, and a seeded draw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from edge.errors import EdgeError, UsageError

Ids = npt.NDArray[np.int64]
Probs = npt.NDArray[np.float64]
Logits = npt.NDArray[np.floating[Any]]


def _real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


MOST_LOGPROBS = 20  # alternatives that are listed for a token

# What each field may be, and how the error says so. Comparisons are written so that NaN fails them.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda v: _real(v) and 0 <= v < math.inf, "a finite number of at least 0 (0 is greedy)"),
    "top_k": (lambda v: _integer(v) and v >= 0, "a whole number of at least 0 (0 keeps every token)"),
    "top_p": (lambda v: _real(v) and 0 <= v <= 1, "a number from 0 to 1 (1 keeps every token)"),
    "min_p": (lambda v: _real(v) and 0 <= v <= 1, "a number from 0 to 1 (0 keeps every token)"),
    "repetition_penalty": (
        lambda v: _real(v) and 0 < v < math.inf,
        "a finite number above 0 (1 is no penalty)",
    ),
    "presence_penalty": (lambda v: _real(v) and -2 <= v <= 2, "a number from -2 to 2 (0 is no penalty)"),
    "frequency_penalty": (lambda v: _real(v) and -2 <= v <= 2, "a number from -2 to 2 (0 is no penalty)"),
    "logit_bias": (
        lambda v: (
            isinstance(v, Mapping) and all(map(_integer, v)) and all(_real(b) and abs(b) <= 100 for b in v.values())
        ),
        "token ids with numbers from -100 to 100",
    ),
    "logprobs": (
        lambda v: v is None or (_integer(v) and 0 <= v <= MOST_LOGPROBS),
        f"a whole number from 0 to {MOST_LOGPROBS}, or none",
    ),
    "prompt_logprobs": (lambda v: isinstance(v, bool), "true or false"),
    "seed": (
        lambda v: v is None or (_integer(v) and 0 <= v < 2**64),
        "a whole number from 0 to 2**64 - 1, or none for a fresh one",
    ),
    "max_tokens": (lambda v: _integer(v) and v >= 1, "a whole number of at least 1"),
    "stop": (
        lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
        "a tuple of non-empty strings",
    ),
    "ignore_eos": (lambda v: isinstance(v, bool), "true or false"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How a request wants its tokens chosen, and when it ends. A value out of range raises UsageError.

    presence_penalty and frequency_penalty are taken from the logits of tokens of the reply, once and for each time;
    logit_bias is added. logprobs: how many of the likeliest tokens are listed with their log-probabilities beside the
    one that was chosen; None lists nothing. prompt_logprobs: the prompt's tokens have theirs, too.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name, (valid, rule) in _RULES.items():
            value = getattr(self, name)
            if not valid(value):
                raise UsageError(f"{name} is {value!r}: it must be {rule}")


def apply_repetition_penalty(logits: Logits, seen_ids: Ids, penalty: float) -> Logits:
    """A copy of `logits` [vocab] in which every id of `seen_ids` is less likely (penalty > 1) or more (< 1).

    `seen_ids` holds each id once; ids outside the vocabulary are ignored. Finite logits stay finite.
    """
    logits = logits.copy()
    seen_ids = seen_ids[seen_ids < logits.size]
    seen, range_ = logits[seen_ids].astype(np.float64), np.finfo(logits.dtype)
    factor = float(logits.dtype.type(min(max(penalty, float(range_.tiny)), float(range_.max))))
    changed = np.where(seen < 0, seen * factor, seen / factor).clip(range_.min, range_.max)
    logits[seen_ids] = np.where(np.isfinite(seen), changed, seen)
    return logits


def sampling_params(defaults: Mapping[str, Any], **chosen: Any) -> SamplingParams:
    """What the user chose, then the model's generation_config, then greedy. A greedy choice drops the filters."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values: dict[str, Any] = {name: defaults[name] for name in names if defaults.get(name) is not None}
    if defaults.get("do_sample") is False:
        values.pop("temperature", None)
    values.update({name: value for name, value in chosen.items() if value is not None})
    if "stop" in values:
        values["stop"] = tuple(values["stop"])
    return SamplingParams(**values)


class LogitEdits:
    """What a request adds to logits before anything is drawn from them: its bias, and penalties on what it said."""

    def __init__(self, params: SamplingParams) -> None:
        self._bias_ids = np.fromiter(params.logit_bias, np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._counts: Counter[int] = Counter()

    @property
    def any(self) -> bool:
        """Is there anything to do?"""
        return bool(self._bias_ids.size or self._presence or self._frequency)

    def apply(self, logits: Logits) -> Logits:
        """A copy of `logits` [vocab] with bias and penalties; UsageError if the bias is for an unknown token."""
        logits = logits.copy()
        if self._bias_ids.size:
            if self._bias_ids.min() < 0 or self._bias_ids.max() >= logits.size:
                raise UsageError(f"logit_bias names a token outside the vocabulary; use ids 0..{logits.size - 1}")
            logits[self._bias_ids] += self._bias
        if self._counts and (self._presence or self._frequency):
            said = np.fromiter(self._counts, np.int64)
            times = np.fromiter(self._counts.values(), np.float32)
            logits[said] -= np.float32(self._presence) + np.float32(self._frequency) * times
        return logits

    def count(self, token: int) -> None:
        """A token was drawn."""
        self._counts[token] += 1


def filtered_probabilities(logits: Logits, params: SamplingParams) -> tuple[Ids, Probs]:
    """The distribution a token is drawn from: temperature, then top_k, top_p and min_p.

    `logits` is [vocab], with the repetition penalty already applied. Returns the ids that can be drawn,
    ascending, and their probabilities, which sum to 1. Temperature 0 is all mass on the largest logit.
    Between equal logits the lower id wins; only top_k keeps all that tie with the k-th, as transformers does.
    Raises EdgeError if a logit is NaN or +inf, or all are -inf.
    """
    best = _argmax(logits)
    if params.temperature == 0:
        return np.array([best]), np.ones(1)
    top_ids = _top_k_ids(logits, params.top_k) if 0 < params.top_k < logits.size else None
    weights = (logits if top_ids is None else logits[top_ids]).astype(np.float64)
    weights -= float(logits[best])
    with np.errstate(over="ignore"):  # a tiny temperature takes the others to -inf, which is probability 0
        weights /= params.temperature
    np.exp(weights, out=weights)
    keep = weights > 0
    if params.top_p < 1:
        keep &= _top_p_mask(weights, params.top_p)
    if params.min_p > 0:
        keep &= weights >= params.min_p  # the largest weight is exp(0) = 1
    kept = np.flatnonzero(keep)
    weights = weights[kept]
    return kept if top_ids is None else top_ids[kept], weights / weights.sum()


def _top_k_ids(logits: Logits, top_k: int) -> Ids:
    candidates = logits
    rows = logits[: logits.size // 64 * 64].reshape(64, -1).max(axis=0)
    if top_k < rows.size:
        # At least top_k logits reach the k-th largest of these maxima: select among those few.
        candidates = logits[logits >= _kth_largest(rows, top_k)]
    return np.flatnonzero(logits >= _kth_largest(candidates, top_k))


def _kth_largest(values: Logits, k: int) -> Any:
    return np.partition(values, values.size - k)[values.size - k]


def _top_p_mask(weights: Probs, top_p: float) -> npt.NDArray[np.bool_]:
    """The fewest largest of `weights` [n] whose share reaches `top_p`, at least one; of equals the first."""
    total = weights.sum()
    # Weights under this floor (half of what would be exact, against rounding) sum to less than the share to
    # drop, so only the few others need sorting.
    floor = 0.5 * (1 - top_p) * total / weights.size
    descending = np.sort(weights[weights > floor])[::-1]
    mass_before = np.concatenate(([0.0], np.cumsum(descending)[:-1]))
    count = max(1, int(np.searchsorted(mass_before, top_p * total)))
    smallest = descending[count - 1]
    mask = weights > smallest
    ties = np.flatnonzero(weights == smallest)
    mask[ties[: count - np.count_nonzero(mask)]] = True
    return mask


def _argmax(logits: Logits) -> int:
    best = int(logits.argmax())  # the first NaN, if there is one
    value = float(logits[best])
    if math.isfinite(value):
        return best
    if value == -math.inf:
        problem = f"all {logits.size} logits are -inf"
    else:
        problem = f"the logit of token {best} is {value}"
    raise EdgeError(f"no token can be chosen because {problem}: check the weights and any token mask in use")


class Sampler:
    """Chooses the tokens of one request; the same seed, prompt and logits always give the same tokens."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self._rng = np.random.Generator(np.random.PCG64(params.seed))
        self._penalises = params.repetition_penalty != 1
        self._seen = np.unique(np.asarray(prompt_ids if self._penalises else (), dtype=np.int64))

    def sample(self, logits: Logits) -> int:
        """The next token by `logits` [vocab], remembered for the penalty; EdgeError if there is no choice."""
        if self._penalises:
            logits = apply_repetition_penalty(logits, self._seen, self.params.repetition_penalty)
        token = _argmax(logits) if self.params.temperature == 0 else self._draw(logits)
        if self._penalises and not (self._seen == token).any():
            self._seen = np.append(self._seen, token)
        return token

    def _draw(self, logits: Logits) -> int:
        ids, probs = filtered_probabilities(logits, self.params)
        cumulative = np.cumsum(probs)
        position = np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right")
        return int(ids[min(int(position), ids.size - 1)])  # the product may round up to the last sum
