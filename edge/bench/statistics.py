"""Student's t, and whether one sample of speeds is another's multiple: Welch's t test on logarithms, Holm's correction.

Why these, what they assume and what few repetitions can show: docs/compare.md. Without scipy, which devices lack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

LEVEL = 0.05
LEAST_ERROR = 1e-9  # of a logarithm: times are kept to the nanosecond, so that less is rounding
_TINY = 1e-300


@dataclass(frozen=True)
class RatioTest:
    """A ratio of geometric means with its 95 % interval, and p for "they are equal"; both None without a spread."""

    ratio: float
    interval: tuple[float, float] | None
    p: float | None


def welch_ratio(baseline: Sequence[float], candidate: Sequence[float]) -> RatioTest:
    """The candidate's speeds over the baseline's, all above 0: Welch's unequal-variances t test on their logarithms.

    B. L. Welch, "The generalization of Student's problem when several different population variances are involved",
    Biometrika 34 (1947). Speeds vary by shares of themselves, so their logarithms have the steadier spread, and
    exchanging the two sides inverts the ratio exactly.
    """
    a, b = [math.log(x) for x in baseline], [math.log(x) for x in candidate]
    difference = fmean(b) - fmean(a)
    if len(a) < 2 or len(b) < 2:
        return RatioTest(math.exp(difference), None, None)
    error_a, error_b = variance(a) / len(a), variance(b) / len(b)
    error = math.sqrt(error_a + error_b)
    if error > LEAST_ERROR:  # Welch and Satterthwaite
        degrees = error**4 / (error_a**2 / (len(a) - 1) + error_b**2 / (len(b) - 1))
    else:
        error, degrees = LEAST_ERROR, len(a) + len(b) - 2
    half = t_quantile(1 - LEVEL / 2, degrees) * error
    interval = (math.exp(difference - half), math.exp(difference + half))
    return RatioTest(math.exp(difference), interval, t_two_sided(difference / error, degrees))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being several, in their order: any below 0.05 is wrong in at most 5 % of families.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def t_two_sided(t: float, degrees: float) -> float:
    """P(|T| > |t|) of Student's t: I_x(degrees / 2, 1 / 2) at x = degrees / (degrees + t^2)."""
    complement = t * t / (degrees + t * t)
    if complement < 3 / (degrees + 5):  # x would be 1 but for a few digits
        return 1 - incomplete_beta(0.5, degrees / 2, complement)
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def t_quantile(probability: float, degrees: float) -> float:
    """The t with P(T < t) = probability, which is above 1/2: Newton's method from 0, as the tail is convex there."""
    tail, t = 2 * (1 - probability), 0.0
    peak = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    while True:
        density = peak * (1 + t * t / degrees) ** (-(degrees + 1) / 2)
        step = (t_two_sided(t, degrees) - tail) / (2 * density)
        if step <= 1e-12 * t:
            return t
        t += step


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (dlmf.nist.gov/8.17.E22)."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    # Lentz's method: the fraction from its top, as products of two converging ratios
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for numerator in (even, odd):
            d = 1 / _away_from_zero(1 + numerator * d)
            c = _away_from_zero(1 + numerator / c)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
