"""Student's t, Welch's test and Holm's correction, against scipy and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from edge.bench.statistics import holm, incomplete_beta, t_quantile, t_two_sided, welch_ratio

speeds = st.lists(st.floats(0.1, 1e4), min_size=2, max_size=8)


@settings(deadline=None)
@given(st.floats(0.1, 1e4), st.floats(0.1, 50), st.floats(0, 1))
def test_the_incomplete_beta_function_is_scipys(a: float, b: float, x: float) -> None:
    assert incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), rel=1e-8, abs=1e-12)


@settings(deadline=None)
@given(st.floats(-60, 60), st.floats(1, 1e5), st.floats(0.51, 0.9999))
def test_students_t_is_scipys(t: float, degrees: float, probability: float) -> None:
    assert t_two_sided(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), rel=1e-7, abs=1e-14)
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-6)


@pytest.mark.parametrize(
    ("degrees", "published"),
    [(1, 12.706), (4, 2.776), (9, 2.262), (10, 2.228), (15, 2.131), (30, 2.042), (60, 2.000), (120, 1.980)],
)
def test_students_quantiles_match_the_published_table(degrees: int, published: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(published, abs=6e-4)


@settings(deadline=None)
@given(speeds, speeds)
def test_welchs_test_is_scipys(baseline: list[float], candidate: list[float]) -> None:
    a, b = np.log(baseline), np.log(candidate)
    if np.std(a) < 1e-6 and np.std(b) < 1e-6:
        return  # scipy warns of samples without a spread
    expected = stats.ttest_ind(b, a, equal_var=False)
    interval = expected.confidence_interval(0.95)
    found = welch_ratio(baseline, candidate)
    assert found.ratio == pytest.approx(stats.gmean(candidate) / stats.gmean(baseline))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert found.interval is not None
    assert np.log(found.interval) == pytest.approx([interval.low, interval.high], rel=1e-6, abs=1e-6)


def test_samples_without_a_spread() -> None:
    assert welch_ratio([5.0], [6.0, 6.0]).p is None and welch_ratio([5.0], [6.0, 6.0]).interval is None
    assert welch_ratio([5.0] * 3, [5.0] * 4).p == 1
    assert welch_ratio([0.1] * 3, [0.1 + 1e-17] * 7).p == 1
    different = welch_ratio([5.0] * 3, [6.0] * 3)
    assert different.p is not None and different.p < 1e-9 and different.ratio == pytest.approx(1.2)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=9))
def test_holms_correction_is_its_definition(p_values: list[float]) -> None:
    """Rejected at any level: the k smallest, as long as the i-th is at most level / (m - i + 1)."""
    adjusted = holm(p_values)
    for level in (0.001, 0.05, 0.3):
        order = sorted(range(len(p_values)), key=lambda i: p_values[i])
        rejected = set()
        for rank, index in enumerate(order):
            if p_values[index] * (len(order) - rank) > level:
                break
            rejected.add(index)
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected
