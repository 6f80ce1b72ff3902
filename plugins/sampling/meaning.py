"""What the sampling kernel computes, bit for bit: the filters of edge/sampler.py in whole numbers.

A token's mass is 2^45 exp((logit - largest) / temperature), made from float32 by multiplication and integers alone, so
that sums are exact in any order and a seed gives the same token on every machine. Masses below 1 are 0: such tokens,
2^-45 as likely as the likeliest, cannot be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MASS_BITS = 45
_EXPONENT_BITS = 26  # fractional bits of the exponent
# 2^g - 1 = g - g (1 - g) s(g) for 0 <= g < 1; s to 3e-9 of the whole, highest power first, times 2^32.
_S = (0x000E3B2D, 0x005FC381, 0x02DA0679, 0x110E3C15, 0x4E8DEA85)


@dataclass(frozen=True)
class SamplingInputs:
    """The inputs of plugins/sampling, all of R rows; values are in the ranges of edge.sampler.SamplingParams."""

    logits: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    step: np.ndarray
    penalty: np.ndarray | None = None
    seen: np.ndarray | None = None


@dataclass
class DecodeState:
    """What a decode step leaves for the next on the device, of R rows; `history` is [capacity, R], the rest [R]."""

    input_ids: np.ndarray
    positions: np.ndarray
    switch_length: np.ndarray
    step: np.ndarray
    count: np.ndarray
    history: np.ndarray


def advance(token: np.ndarray, state: DecodeState) -> None:
    """Feed the drawn tokens [R] back: `state` becomes the next step's. A full history stays as it is."""
    rows, room = np.arange(len(token)), state.count < len(state.history)
    state.history[state.count[room], rows[room]] = token[room]
    state.count[room] += 1
    state.input_ids[:] = np.maximum(token, 0)
    state.positions += 1
    state.step += 1
    np.maximum(state.switch_length, state.positions + 1, out=state.switch_length)


def sample(x: SamplingInputs) -> np.ndarray:
    """The tokens [R] int32: the first id whose cumulative mass exceeds the share that its row's Philox word gives."""
    tokens = np.empty(len(x.logits), np.int32)
    for r, logits in enumerate(x.logits):
        if x.penalty is not None and x.seen is not None:
            logits = _penalised(logits, x.penalty[r], x.seen[r])
        ids, masses = kept_masses(logits, x.temperature[r], int(x.top_k[r]), x.top_p[r], x.min_p[r])
        word = philox((int(x.step[r]) % 2**32, 0, 0, 0), int(x.seed[r]))[0]
        position = np.uint64(_share(int(masses.sum()), word))
        tokens[r] = ids[np.searchsorted(np.cumsum(masses), position, side="right")] if len(ids) else -1
    return tokens


def mark_seen(seen: np.ndarray, tokens: np.ndarray) -> None:
    """Sets the bits of tokens [R] in seen [R, words]; -1 is none."""
    rows = np.flatnonzero(tokens >= 0)
    seen[rows, tokens[rows] // 32] |= np.uint32(1) << (tokens[rows] % 32).astype(np.uint32)


def _penalised(logits: np.ndarray, penalty: np.floating, seen: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(seen.astype("<u4").view(np.uint8), bitorder="little")[: logits.size].astype(bool)
    return np.where(bits, np.where(logits < 0, logits * penalty, logits / penalty), logits)


def kept_masses(
    logits: np.ndarray, temperature: np.floating, top_k: int, top_p: np.floating, min_p: np.floating
) -> tuple[np.ndarray, np.ndarray]:
    """The ids [n] that can be drawn from logits [vocabulary], ascending, and their masses [n] uint64; n may be 0.

    top_k keeps all that tie with the k-th largest. top_p then keeps the fewest largest whose mass reaches
    floor(top_p * total), at least one, and of equal logits the lower ids. min_p is relative to the largest.
    """
    logits = np.where(np.isnan(logits), np.float32(-np.inf), logits)
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    if temperature == 0:
        return np.array([best]), np.array([2**MASS_BITS], np.uint64)
    masses = _masses(logits, temperature)
    if 0 < top_k < logits.size:
        masses[logits < np.partition(logits, -top_k)[-top_k]] = 0
    if top_p < 1:
        masses[~_nucleus(logits, masses, float(top_p))] = 0
    masses[masses < int(float(min_p) * 2**31) << MASS_BITS - 31] = 0
    ids = np.flatnonzero(masses)
    return ids, masses[ids]


def _nucleus(logits: np.ndarray, masses: np.ndarray, top_p: float) -> np.ndarray:
    """The mask [vocabulary] of the fewest largest tokens whose mass reaches `top_p` of all."""
    order = np.argsort(-logits, kind="stable")
    descending = masses[order]
    before = np.cumsum(descending) - descending
    target = max(_share(int(masses.sum()), int(top_p * 2**32)), 1)
    mask = np.zeros(logits.size, bool)
    mask[order[before < target]] = True
    return mask


def _masses(logits: np.ndarray, temperature: np.floating) -> np.ndarray:
    """The masses [vocabulary] uint64 of every token."""
    with np.errstate(over="ignore"):
        sharpness = min(np.float32(np.log2(np.e) * 2**_EXPONENT_BITS) / temperature, np.finfo(np.float32).max)
        distance = (logits.max() - logits) * sharpness
    visible = distance < MASS_BITS << _EXPONENT_BITS
    exponent = np.where(visible, distance, 0).astype(np.uint64)
    one = np.uint64(1 << _EXPONENT_BITS)
    whole = (exponent + one - np.uint64(1)) // one
    g = (whole * one - exponent) << np.uint64(32 - _EXPONENT_BITS)
    s = np.zeros_like(g)
    for coefficient in _S:
        s = np.uint64(coefficient) + _high(s, g)
    mantissa = np.uint64(2**32) + g - _high(_high(g, (np.uint64(2**32) - g) % np.uint64(2**32)), s)
    return np.where(visible, mantissa << np.uint64(MASS_BITS - 32) >> whole, np.uint64(0))


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper 32 bits of products of 32-bit numbers."""
    return (a * b) >> np.uint64(32)


def _share(total: int, fraction: int) -> int:
    """floor(total * fraction / 2^32)"""
    return total * fraction >> 32


def philox(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 of a 64-bit key (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011)."""
    a, b, c, d = counter
    low, high = key % 2**32, key >> 32
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ low, q % 2**32, (p >> 32) ^ d ^ high, p % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return a, b, c, d
