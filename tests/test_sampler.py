"""Sampling against transformers' own filters, the exact distribution, and a brute-force top_p."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import EdgeError, UsageError
from edge.sampler import Sampler, SamplingParams, apply_repetition_penalty, filtered_probabilities


def random_logits(seed: int, vocab: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def dense(ids: np.ndarray, probs: np.ndarray, vocab: int) -> np.ndarray:
    full = np.zeros(vocab)
    full[ids] = probs
    return full


def transformers_probabilities(logits: np.ndarray, params: SamplingParams, seen: list[int]) -> np.ndarray:
    """What `generate(do_sample=True)` would draw from, by transformers' processors in float64."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    processors = []
    if params.repetition_penalty != 1:
        processors.append(process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(process.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(process.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(process.TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(process.MinPLogitsWarper(params.min_p))
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for processor in processors:
        scores = processor(torch.tensor([seen]), scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([2, 3, 17, 63, 64, 65, 300, 5000]),
    scale=st.sampled_from([0.1, 1.0, 4.0, 20.0]),
    temperature=st.sampled_from([0.05, 0.6, 0.8, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50, 1000]),
    top_p=st.sampled_from([0.0, 0.3, 0.8, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    penalty=st.sampled_from([1.0, 1.02, 1.5, 0.8]),
)
def test_equals_the_filters_of_transformers(
    seed: int,
    vocab: int,
    scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
) -> None:
    logits = random_logits(seed, vocab, scale).astype(np.float64)
    seen = np.random.default_rng(seed + 1).integers(vocab, size=vocab // 3 + 1).tolist()
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty)
    penalised = apply_repetition_penalty(logits, np.unique(seen), penalty)
    ids, probs = filtered_probabilities(penalised, params)
    expected = transformers_probabilities(logits, params, seen)
    np.testing.assert_array_equal(ids, np.flatnonzero(expected))
    np.testing.assert_allclose(probs, expected[ids], rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1.0, 2.0, 4.0, 64.0]), min_size=1, max_size=40).filter(any),
    top_p=st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.99, 1.0]),
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it_and_ties_go_by_id(weights: list[float], top_p: float) -> None:
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(weights))
    ids, probs = filtered_probabilities(logits, SamplingParams(temperature=1.0, top_p=top_p))
    order = sorted((i for i, w in enumerate(weights) if w), key=lambda i: (-weights[i], i))
    # Sums of small whole numbers are exact: only a share within rounding of top_p may go either way.
    shares = np.cumsum([weights[i] for i in order]) / sum(weights)
    fewest, most = (int(np.searchsorted(shares, top_p + e)) + 1 for e in (-1e-9, 1e-9))
    assert ids.tolist() in [sorted(order[: max(1, count)]) for count in (fewest, most)]
    expected = np.array([weights[i] for i in ids])
    np.testing.assert_allclose(probs, expected / expected.sum(), rtol=1e-12)


def test_top_k_keeps_all_that_tie_with_the_kth() -> None:
    logits = np.array([1.0, 5.0, 1.0, 0.0, 1.0], dtype=np.float32)
    ids, _ = filtered_probabilities(logits, SamplingParams(temperature=1.0, top_k=2))
    assert ids.tolist() == [0, 1, 2, 4]


def test_temperature_zero_is_the_largest_logit_and_the_lowest_id_of_equals() -> None:
    logits = np.array([0.5, 2.0, -1.0, 2.0], dtype=np.float32)
    assert Sampler(SamplingParams(), []).sample(logits) == 1
    ids, probs = filtered_probabilities(logits, SamplingParams())
    assert (ids.tolist(), probs.tolist()) == ([1], [1.0])


def test_greedy_is_penalised_for_prompt_and_output() -> None:
    logits = np.array([3.0, 2.9, 2.8, -1.0], dtype=np.float32)
    before = logits.copy()
    outside_the_logits = 900
    sampler = Sampler(SamplingParams(repetition_penalty=1.2), [0, 0, outside_the_logits])
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 0]
    np.testing.assert_array_equal(logits, before)


def test_penalty_makes_a_negative_logit_smaller() -> None:
    penalised = apply_repetition_penalty(np.array([-2.0, 2.0, 1.0], np.float32), np.array([0, 1]), 2.0)
    assert penalised.tolist() == [-4.0, 1.0, 1.0]


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e300])
def test_no_penalty_makes_a_logit_infinite(penalty: float) -> None:
    logits = np.array([-2.0, 2.0, 0.0, 1.0, -np.inf], np.float32)
    penalised = apply_repetition_penalty(logits, np.array([0, 1, 2, 4]), penalty)
    assert np.isfinite(penalised[:4]).all() and penalised[3] == 1 and penalised[4] == -np.inf
    assert penalised[1] > 1e37 if penalty < 1 else penalised[1] < 1e-37


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=11),
        SamplingParams(temperature=0.7, top_p=0.7, seed=12),
        SamplingParams(temperature=1.5, top_k=6, min_p=0.05, seed=13),
    ],
)
def test_drawn_counts_follow_the_distribution(params: SamplingParams) -> None:
    logits = random_logits(5, 24, scale=1.5)
    draws = 30_000
    sampler = Sampler(params, [])
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=logits.size)
    expected = transformers_probabilities(logits, params, [0])
    # The seed is fixed, so a pass is no luck that may change; 3.7 sigma is about one in ten thousand.
    assert chi_square_sigmas(counts, expected) < 3.7
    other = SamplingParams(temperature=params.temperature * 1.15, top_k=params.top_k, top_p=params.top_p)
    assert chi_square_sigmas(counts, dense(*filtered_probabilities(logits, other), logits.size)) > 6


def chi_square_sigmas(counts: np.ndarray, probs: np.ndarray) -> float:
    """Pearson's statistic as a standard normal deviate (Wilson and Hilferty's cube root)."""
    assert not counts[probs == 0].any()
    expected = probs[probs > 0] * counts.sum()
    statistic = float(((counts[probs > 0] - expected) ** 2 / expected).sum())
    spread = 2 / (9 * (expected.size - 1))
    return ((statistic / (expected.size - 1)) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def test_a_seed_fixes_the_tokens_on_every_machine() -> None:
    # Logits by integer arithmetic, so that nothing but the sampler can change the tokens.
    rows = [(np.arange(73448) * (7919 + row) % 100_003 / 6250).astype(np.float32) for row in range(8)]

    def tokens(params: SamplingParams) -> list[int]:
        sampler = Sampler(params, [1, 2, 3])
        return [sampler.sample(row) for row in rows]

    params = SamplingParams(temperature=0.8, top_p=0.8, repetition_penalty=1.02, seed=2024)
    assert tokens(params) == [49641, 15758, 22169, 58787, 73143, 10462, 5817, 13285]
    assert tokens(SamplingParams(temperature=0.8, seed=1)) != tokens(SamplingParams(temperature=0.8, seed=2))
    assert tokens(SamplingParams(temperature=0.8)) != tokens(SamplingParams(temperature=0.8))


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.full(1000, -np.inf, dtype=np.float32)
    logits[[7, 500]] = [0.0, -3.0]
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=9.0, top_k=50, top_p=0.99)):
        ids, probs = filtered_probabilities(logits, params)
        assert ids.tolist() == [7, 500]
        assert probs.sum() == pytest.approx(1)


def test_a_tiny_temperature_is_greedy_without_warnings(recwarn: pytest.WarningsRecorder) -> None:
    logits = np.array([1.0, 3e38, -3e38], dtype=np.float32)
    ids, probs = filtered_probabilities(logits, SamplingParams(temperature=1e-300))
    assert (ids.tolist(), probs.tolist()) == ([1], [1.0])
    assert not recwarn.list


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("position", "value", "says"),
    [(3, np.nan, "token 3 is nan"), (2, np.inf, "token 2 is inf"), (slice(None), -np.inf, "all 5 logits")],
)
def test_logits_without_a_choice_are_an_error(
    temperature: float, position: int | slice, value: float, says: str
) -> None:
    logits = np.arange(5, dtype=np.float32)
    logits[position] = value
    with pytest.raises(EdgeError, match=says):
        Sampler(SamplingParams(temperature=temperature, repetition_penalty=1.1), [0]).sample(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (-0.1, math.nan, math.inf, "1", None, True)],
        *[("top_k", v) for v in (-1, 1.5, True)],
        *[(name, v) for name in ("top_p", "min_p") for v in (-0.01, 1.01, math.nan)],
        *[("repetition_penalty", v) for v in (0, -1.0, math.nan, math.inf)],
        *[("seed", v) for v in (-1, 2**64, 0.5)],
        *[("max_tokens", v) for v in (0, 2.0)],
        *[("stop", v) for v in ("END", ["END"], ("",), (1,))],
        ("ignore_eos", 1),
    ],
)
def test_params_out_of_range_name_field_and_value(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"^{name} is ") as raised:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert repr(value) in str(raised.value)


def test_params_take_the_ends_of_their_ranges() -> None:
    SamplingParams(0, 0, 0, 0, 0.01, 0, 1, (), False)
    SamplingParams(100, 10**6, 1, 1, 10, 2**64 - 1, 10**6, ("a", "b"), True)
