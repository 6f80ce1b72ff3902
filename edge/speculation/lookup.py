"""Prompt lookup decoding: what followed the last time the latest tokens occurred is proposed to follow again."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np

_FIRST_BITS = 8  # of a bucket's number
_HASH = 0x9E3779B97F4A7C15  # odd, near 2**64 divided by the golden ratio (Knuth's multiplicative hashing)
_WORD = 2**64 - 1
_BULK = 16  # n-grams from which on numpy is faster than a loop


class _Occurrences:
    """Where n-grams of one length end in a token array: per hash bucket a chain, latest first, as zlib keeps them.

    `heads` holds for each bucket the latest position, `links` for each position the one before it in its bucket. There
    are at least as many buckets as tokens, so that a chain has few n-grams besides the repeated ones.
    """

    def __init__(self, n: int, tokens: array[int]) -> None:
        self._n = n
        self._tokens = tokens
        self._bits = _FIRST_BITS
        self._heads = array("i", [-1]) * (1 << self._bits)
        self._links = array("i")

    def _gram(self, last: int) -> array[int]:
        return self._tokens[last - self._n + 1 : last + 1]

    def _bucket(self, last: int) -> int:
        code = 0
        for token in self._gram(last):
            code = (code + token) * _HASH & _WORD
        return code >> 64 - self._bits

    def update(self) -> None:
        """Index the n-grams that end at tokens appended since the last time."""
        length = len(self._tokens)
        if length > len(self._heads):
            self._bits = max(self._bits + 1, (length - 1).bit_length())
            self._heads = array("i", [-1]) * (1 << self._bits)
            self._links = array("i")
        if length - len(self._links) >= _BULK + self._n:
            self._update_many()
        for last in range(len(self._links), length):
            self._links.append(-1)
            if last >= self._n - 1:
                bucket = self._bucket(last)
                self._links[last] = self._heads[bucket]
                self._heads[bucket] = last

    def _update_many(self) -> None:
        """What the loop of `update` does, with a sort."""
        self._links.extend([-1] * (max(len(self._links), self._n - 1) - len(self._links)))
        first = len(self._links)
        tokens = np.array(self._tokens[first - self._n + 1 :], np.uint64)
        count = tokens.size - self._n + 1
        codes = np.zeros(count, np.uint64)
        for i in range(self._n):
            codes = (codes + tokens[i : i + count]) * np.uint64(_HASH)
        buckets = (codes >> np.uint64(64 - self._bits)).astype(np.int64)
        heads = np.frombuffer(self._heads, np.int32)
        links = heads[buckets]
        order = np.argsort(buckets, kind="stable")
        follows = buckets[order[1:]] == buckets[order[:-1]]
        links[order[1:][follows]] = first + order[:-1][follows]
        ends = np.append(~follows, True)  # the last of each bucket
        heads[buckets[order[ends]]] = first + order[ends]
        self._links.frombytes(links.tobytes())

    def pop(self) -> None:
        """Forget the n-gram that ends at the last position, whose tokens are still there."""
        last = len(self._links) - 1
        if last >= self._n - 1:
            self._heads[self._bucket(last)] = self._links[last]
        self._links.pop()

    def earlier(self) -> Iterator[int]:
        """Where the n-gram at the end of the text ended before, latest first."""
        if len(self._tokens) < self._n:
            return
        last = len(self._links) - 1
        gram = self._gram(last)
        position = self._links[last]
        while position >= 0:
            if self._gram(position) == gram:
                yield position
            position = self._links[position]


class NgramLookup:
    """The tokens of one sequence, indexed by their n-grams of `longest` down to `shortest` tokens.

    A token costs amortised constant time, about 12 bytes for each length of n-gram, and 4 for itself.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-grams have 1 or more tokens, shortest first: {shortest} to {longest}")
        self._tokens = array("i")
        self._indexes = tuple(_Occurrences(n, self._tokens) for n in range(longest, shortest - 1, -1))

    def __len__(self) -> int:
        return len(self._tokens)

    def since(self, length: int) -> list[int]:
        """The tokens after the first `length`."""
        return self._tokens[length:].tolist()

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the sequence."""
        self._tokens.extend(tokens)
        for index in self._indexes:
            index.update()

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens; the cost is that of appending the others."""
        if not 0 <= length <= len(self):
            raise ValueError(f"{len(self)} tokens cannot be truncated to {length}")
        while len(self) > length:
            for index in self._indexes:
                index.pop()
            self._tokens.pop()

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the longest n-gram at the end where it occurred before; [] if it did not.

        Of its occurrences the latest that `most` tokens follow counts. If there is none the latest does, and the
        proposal goes on by reading itself: text of a short period goes on periodically.
        """
        if most < 1:
            return []
        for index in self._indexes:
            latest = None
            for position in index.earlier():
                if position + most < len(self):
                    return self._tokens[position + 1 : position + 1 + most].tolist()
                latest = position if latest is None else latest
            if latest is not None:
                period = self._tokens[latest + 1 :].tolist()
                return (period * -(-most // len(period)))[:most]
        return []
