"""What steps and drafts take, learned from their seconds: a robust mean for each size, and a line through the means."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_WINDOW = 8  # latest measurements of one size that count
_OUTLIER = 1.5  # a measurement counts as at most this many times its size's median, and at least its inverse
_STALL = 2.0  # a measurement is charged as at most this many times what was expected
_LINEAR = 1.25  # a step takes at most this many times as long as its rows would one by one
_HALF_LIFE = 256  # measurements after which an old one counts half: a growing context makes steps slower

Line = tuple[float, float, float]  # a, b, and the least it may give


@dataclass
class _Measured:
    """The latest measurements of one size, their clipped mean, and when the last was made."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    mean: float = 0.0
    clock: int = 0

    def observe(self, seconds: float, clock: int) -> None:
        self.clock = clock
        self.seconds.append(seconds)
        ordered = sorted(self.seconds)
        median = ordered[(len(ordered) - 1) // 2]  # of two the lower: the first may have been a warm-up
        low, high = median / _OUTLIER, median * _OUTLIER
        self.mean = sum(min(max(value, low), high) for value in ordered) / len(ordered)


class Curve:
    """Seconds by size: near the mean of what was measured of that size, elsewhere on the line a + b * size.

    The line is the weighted least-squares fit of the means, with b >= 0; it also counts as one more measurement of
    every size, so that a size with few is not judged by an unlucky one. `anchor` is a point of the line for as long as
    only one size is known.
    """

    def __init__(self) -> None:
        self._measured: dict[int, _Measured] = {}
        self._clock = 0
        self.anchor = (0, 0.0)

    def observe(self, size: int, seconds: float) -> None:
        """Take in a measurement."""
        self._clock += 1
        self._measured.setdefault(size, _Measured()).observe(seconds, self._clock)

    @property
    def largest(self) -> int:
        """The largest size measured; 0 if there is none."""
        return max(self._measured, default=0)

    def count(self, size: int) -> int:
        """Measurements of a size that its mean is taken of."""
        return len(self._measured[size].seconds) if size in self._measured else 0

    def age(self, size: int) -> float:
        """Measurements (of any size) since the latest of this one; infinite if there was none."""
        return self._clock - self._measured[size].clock if size in self._measured else np.inf

    def mean(self, size: int) -> float:
        """Of the latest measurements of a size, clipped around their median."""
        return self._measured[size].mean

    def _weight(self, measured: _Measured) -> float:
        return len(measured.seconds) * 0.5 ** ((self._clock - measured.clock) / _HALF_LIFE)

    def _line(self) -> Line:
        points = [(size, m.mean, self._weight(m)) for size, m in self._measured.items()]
        least = min(y for _, y, _ in points)
        if len(points) == 1:
            points = [(points[0][0], points[0][1], 1.0), (*self.anchor, 1.0)]
        total = sum(w for _, _, w in points)
        x0 = sum(w * x for x, _, w in points) / total
        y0 = sum(w * y for _, y, w in points) / total
        spread = sum(w * (x - x0) ** 2 for x, _, w in points)
        slope = max(0.0, sum(w * (x - x0) * (y - y0) for x, y, w in points) / spread) if spread else 0.0
        return y0 - slope * x0, slope, least

    def at(self, sizes: Sequence[int]) -> list[float]:
        """Expected seconds of each of `sizes`; 0 if nothing was measured."""
        if not self._measured:
            return [0.0] * len(sizes)
        a, b, least = self._line()
        seconds = []
        for size in sizes:
            line = max(a + b * size, least)
            measured = self._measured.get(size)
            weight = self._weight(measured) if measured else 0.0
            seconds.append((weight * measured.mean + line) / (weight + 1) if measured else line)
        return seconds


class Costs:
    """Seconds of a step by its rows, and of drafting by depth. A property of the device: sequences may share it."""

    def __init__(self) -> None:
        self._plain = Curve()
        self._steps = Curve()
        self._drafts = Curve()
        self._tried: set[int] = set()

    def observe_step(self, rows: int, seconds: float) -> float:
        """A step of `rows` rows, the root included (1 is a plain step) -> the seconds to charge it with.

        That is less if it stalled. The first step of a size may: memory is taken, kernels are loaded. One that took
        longer than was expected is therefore not believed before the second.
        """
        if rows == 1:
            self._plain.observe(1, seconds)
            return seconds
        expected = _LINEAR * rows * self.plain
        if self._steps.largest:
            expected = min(expected, _STALL * self._steps.at([rows])[0])
        if seconds <= expected or rows in self._tried:
            self._steps.anchor = (1, self.plain)
            self._steps.observe(rows, seconds)
        self._tried.add(rows)
        return min(seconds, expected)

    def observe_draft(self, depth: int, seconds: float) -> float:
        """Drafting to this depth, with all that a plain step would not have needed -> the seconds to charge."""
        charged = min(seconds, depth * self.plain)
        self._drafts.observe(depth, charged)
        return charged

    @property
    def plain_steps(self) -> int:
        """How many plain steps count at the moment."""
        return self._plain.count(1)

    @property
    def plain(self) -> float:
        """Seconds of a plain step, of which there must have been one."""
        return self._plain.mean(1)

    @property
    def trusted_rows(self) -> int:
        """The most tree rows whose cost can be told: twice those measured, two at first."""
        return max(2, 2 * (self._steps.largest - 1))

    def age(self, rows: int) -> float:
        """Steps with a tree since the latest with `rows` rows."""
        return self._steps.age(rows)

    def relative(self, rows: Sequence[int], depths: Sequence[int]) -> npt.NDArray[np.float64]:
        """Cost [n] of drafting and verifying trees of `depths` in steps of `rows` rows, in plain steps."""
        steps = np.asarray(self._steps.at(rows)) if self._steps.largest else self.plain
        return (steps + np.asarray(self._drafts.at(depths))) / self.plain
