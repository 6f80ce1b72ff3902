"""The language of the recall test: needles in random filler, questions at the end (numpy only, no torch).

A needle is `mark k7 v3 v19`; after the question `ask k7 is` the model must continue `v3 v19`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KEYS, VALUES, FILLERS = 32, 32, 64
WORDS = (
    *("<unk>", "<s>", "</s>", "mark", "ask", "is"),
    *(f"k{n}" for n in range(KEYS)),
    *(f"v{n}" for n in range(VALUES)),
    *(f"w{n}" for n in range(FILLERS)),
)
UNK, BOS, EOS, MARK, ASK, IS = range(6)
FIRST_KEY = 6
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_FILLER = FIRST_VALUE + VALUES
NEEDLE_LENGTH, QUESTION_LENGTH, ANSWER_LENGTH = 4, 3, 2


@dataclass(frozen=True)
class Haystack:
    """Token ids [length] that start with <s>, and per needle its key, two values and the index of its `mark`."""

    ids: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class Example:
    """A haystack, then one question and answer for each of `asked` needles.

    `rows` [questions, 2] are the indices whose next token is an answer word, `answers` [questions, 2] those words
    and `sources` [questions, 2] where in the haystack each answer word stands.
    """

    ids: np.ndarray
    rows: np.ndarray
    answers: np.ndarray
    sources: np.ndarray


def haystack(rng: np.random.Generator, length: int, needles: int) -> Haystack:
    """Random filler with `needles` needles of distinct keys at uniformly random places, in random order."""
    ids = rng.integers(FIRST_FILLER, FIRST_FILLER + FILLERS, length)
    ids[0] = BOS
    gaps = np.sort(rng.choice(length - 1 - (NEEDLE_LENGTH - 1) * needles, needles, replace=False))
    starts = 1 + gaps + (NEEDLE_LENGTH - 1) * np.arange(needles)
    keys = FIRST_KEY + rng.permutation(KEYS)[:needles]
    values = FIRST_VALUE + rng.integers(0, VALUES, (needles, 2))
    ids[starts], ids[starts + 1] = MARK, keys
    ids[starts + 2], ids[starts + 3] = values.T
    return Haystack(ids, keys, values, starts)


def example(rng: np.random.Generator, length: int, needles: int, questions: int) -> Example:
    """`length` tokens in all; the questions ask for different needles in random order."""
    step = QUESTION_LENGTH + ANSWER_LENGTH
    hay = haystack(rng, length - step * questions, needles)
    asked = rng.permutation(needles)[:questions]
    tail = np.empty((questions, step), np.int64)
    tail[:, 0], tail[:, 1], tail[:, 2], tail[:, 3:] = ASK, hay.keys[asked], IS, hay.values[asked]
    first = len(hay.ids) + step * np.arange(questions)[:, None]
    return Example(
        ids=np.concatenate([hay.ids, tail.ravel()]),
        rows=first + np.array([2, 3]),
        answers=hay.values[asked],
        sources=hay.starts[asked][:, None] + np.array([2, 3]),
    )


def jumping_positions(rng: np.random.Generator, ids: np.ndarray, jumps: int, last: int) -> np.ndarray:
    """Positions [len(ids)] that skip ahead `jumps` times, the last one `last`; a needle or question is never torn."""
    spare = last - (len(ids) - 1)
    if spare <= 0 or jumps == 0:
        return np.arange(len(ids))
    whole = np.flatnonzero((ids >= FIRST_FILLER) | (ids == MARK) | (ids == ASK))
    places = rng.choice(whole, jumps)
    sizes = rng.dirichlet(np.ones(jumps)) * spare
    steps = np.ones(len(ids))
    steps[0] = 0
    np.add.at(steps, places, sizes)
    return np.floor(np.cumsum(steps) + 1e-6).astype(np.int64)


def text(ids: np.ndarray) -> str:
    """The words of `ids`, separated by spaces."""
    return " ".join(WORDS[token] for token in ids)
