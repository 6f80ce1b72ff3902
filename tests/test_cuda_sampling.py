"""Sampling on the device: the meaning against the host's sampler, the kernel bit for bit against the meaning."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import EdgeError
from edge.sampler import SamplingParams, apply_repetition_penalty, filtered_probabilities
from plugins.sampling.launch import sample as launch_sample
from plugins.sampling.meaning import MASS_BITS, SamplingInputs, kept_masses, mark_seen, philox, sample
from tests.cuda_cases import Case, run_cases
from tests.cuda_routes import ROUTES, SEEDS
from tests.test_sampler import chi_square_sigmas, dense, random_logits

VOCABULARY = 73448  # MiniCPM4's


def sampling_inputs(logits: np.ndarray, **parameters: object) -> SamplingInputs:
    """Rows that share what is given as a number; the rest is neutral, and every row draws at another step."""
    rows = len(logits)
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7, "step": np.arange(rows)}
    dtypes = {"top_k": np.int32, "seed": np.uint64, "step": np.int32}
    arrays = {
        name: np.broadcast_to(np.asarray(value, dtypes.get(name, np.float32)), rows).copy()
        for name, value in (neutral | parameters).items()
    }
    return SamplingInputs(logits.astype(np.float32), **arrays)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_random123s_known_answers(
    counter: tuple[int, int, int, int], key: int, words: tuple[int, int, int, int]
) -> None:
    assert philox(counter, key) == words


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from([1, 2, 3, 17, 64, 300, 5000]),
    scale=st.sampled_from([0.1, 1.0, 4.0, 20.0]),
    rounded=st.booleans(),
    temperature=st.sampled_from([0.0, 0.05, 0.6, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50, 1000]),
    top_p=st.sampled_from([0.0, 0.3, 0.8, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.2, 1.0]),
)
def test_meaning_keeps_what_the_hosts_sampler_keeps(
    seed: int, vocabulary: int, scale: float, rounded: bool, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(seed, vocabulary, scale)
    if rounded:  # equal logits
        logits = np.round(logits)
    settings32 = [np.float32(v) for v in (temperature, top_p, min_p)]
    ids, masses = kept_masses(logits, settings32[0], top_k, *settings32[1:])
    params = SamplingParams(float(settings32[0]), top_k, float(settings32[1]), float(settings32[2]))
    want = dense(*filtered_probabilities(logits, params), vocabulary)
    got = dense(ids, masses / masses.sum(dtype=np.float64), vocabulary)
    # Float32 exponents up to 32; what is less likely than 2^-45 has no mass.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-12)


def test_masses_fall_with_the_logit_and_are_exact_to_float32() -> None:
    distance = np.concatenate([np.arange(0, 32, 2**-9), np.nextafter(np.arange(1, 32, dtype=np.float32), 0)])
    distance = np.sort(np.concatenate([distance, np.float32(2) ** np.arange(-30, 0), [31.19, 31.2, 1e9, 3e38]]))
    logits = -distance.astype(np.float32)
    ids, masses = kept_masses(logits, np.float32(1), 0, np.float32(1), np.float32(0))
    np.testing.assert_array_equal(ids, np.arange(len(ids)))
    assert masses[0] == 2**MASS_BITS
    assert (np.diff(masses.astype(np.int64)) <= 0).all()
    exact = 2.0**MASS_BITS * np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(masses, exact[ids], rtol=5e-6, atol=1.1)
    assert (exact[len(ids) :] < 1.1).all()


@pytest.mark.parametrize(
    "params",
    [SamplingParams(1.0), SamplingParams(0.7, top_p=0.7), SamplingParams(1.5, top_k=6, min_p=0.05)],
)
@pytest.mark.parametrize("vary", ["step", "seed"])
def test_drawn_counts_follow_the_distribution(params: SamplingParams, vary: str) -> None:
    logits = random_logits(5, 24, scale=1.5)
    draws = 8000
    numbers = {"step": 0, "seed": 99, vary: np.arange(draws)}
    chosen = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    tokens = sample(sampling_inputs(np.tile(logits, (draws, 1)), **chosen, **numbers))
    counts = np.bincount(tokens, minlength=logits.size)
    expected = dense(*filtered_probabilities(logits, params), logits.size)
    # The seeds are fixed, so a pass is no luck that may change; 3.7 sigma is about one in ten thousand.
    assert chi_square_sigmas(counts, expected) < 3.7
    flatter = SamplingParams(params.temperature * 1.5, params.top_k, params.top_p)
    assert chi_square_sigmas(counts, dense(*filtered_probabilities(logits, flatter), logits.size)) > 6


def case_of(name: str, x: SamplingInputs) -> Case:
    rows, vocabulary = x.logits.shape
    inputs = {field.name: getattr(x, field.name) for field in fields(x)}
    updated = {"seen": inputs.pop("seen")} if x.seen is not None else {}
    launch = launch_sample(rows, vocabulary, penalised=x.seen is not None)
    token = {"token": ((rows,), np.dtype(np.int32))}
    return Case(name, launch, {n: v for n, v in inputs.items() if v is not None}, token, updated)


def mixed_inputs(vocabulary: int, rows: int, penalised: bool = False) -> SamplingInputs:
    """Every filter alone and with others; ties, masked tokens and spreads differ from row to row."""
    rng = np.random.default_rng(vocabulary)
    logits = rng.standard_normal((rows, vocabulary)) * rng.choice([0.2, 2, 8], (rows, 1))
    logits = np.where(rng.random((rows, 1)) < 0.4, np.round(logits), logits)
    logits[rng.random((rows, vocabulary)) < rng.choice([0, 0, 0.5], (rows, 1))] = -np.inf
    logits[:, rng.integers(vocabulary)] = 1
    plain = sampling_inputs(
        logits,
        temperature=rng.choice([0, 0.05, 0.8, 0.8, 1, 3], rows),
        top_k=rng.choice([0, 0, 1, 3, 50, 1024], rows),
        top_p=rng.choice([0, 0.3, 0.8, 0.95, 0.9999, 1, 1], rows),
        min_p=rng.choice([0, 0, 0.02, 1], rows),
        seed=rng.integers(2**63, size=rows),
        step=rng.integers(2**31, size=rows),
    )
    if not penalised:
        return plain
    seen = rng.integers(2**32, size=(rows, -(-vocabulary // 32)), dtype=np.uint32)
    return replace(plain, penalty=rng.choice([1.02, 1.5, 0.8], rows).astype(np.float32), seen=seen)


def awkward_inputs() -> SamplingInputs:
    """Rows without a choice, with NaN, with one choice, with the largest floats, with all tokens equal."""
    logits = np.tile(np.linspace(-2, 2, 70, dtype=np.float32), (10, 1))
    logits[0] = -np.inf
    logits[1] = np.nan
    logits[2, 5] = np.inf
    logits[3, 60:] = np.nan
    logits[4] = -np.inf
    logits[4, 33] = -1e30
    logits[5] = np.where(np.arange(70) % 2, 3.4e38, -3.4e38)
    logits[6] = 0
    logits[7] = np.where(np.arange(70) % 3, 0.0, -0.0)
    logits[8, 41] = 2  # ties with the last, and comes first
    logits[9] = logits[2]
    temperature = [1, 1, 1, 1, 1, 1e-40, 1, 0, 0, 0]
    return sampling_inputs(logits, temperature=temperature, top_p=[1, 1, 1, 0.9, 0.5, 0.9, 0.5, 1, 1, 1])


def crowded_inputs() -> SamplingInputs:
    """Draws from rows of three values, where top_p ends and min_p cuts among equals on many warps."""
    rng = np.random.default_rng(8)
    return sampling_inputs(
        rng.choice([0, 1, 2], (12, 2100), p=[0.6, 0.3, 0.1]),
        top_p=np.tile([0.35, 0.5, 0.7, 1], 3),
        min_p=np.repeat([0, 0.3], 6),
        step=100 + np.arange(12),
    )


def split_ties_inputs() -> SamplingInputs:
    """A warp's 95 equal tokens, of which top_p keeps 33, before the likeliest one; the others are masked."""
    logits = np.full((8, 2100), -np.inf)
    logits[:, :95] = 0
    logits[:, 95] = np.log(60)
    return sampling_inputs(logits, top_p=0.6)


def flat_tail_inputs() -> SamplingInputs:
    """A likely token, and a tail whose every mass just exceeds what top_p may leave out of account."""
    logits = np.full((1, 1023), np.log(1.5 / 1022))
    logits[0, 600] = 0
    return sampling_inputs(logits, top_p=0.5)


def boundary_inputs() -> SamplingInputs:
    """1024 equal tokens and Philox words 674 and 576 times 2^22: where a token's share, and a warp's, begins."""
    return sampling_inputs(np.zeros((2, 1024)), seed=0, step=[4136581, 231885480])


# A token, fewer than a warp, whole warps and a ragged one, more than a load of four in some warps, and in all.
@pytest.mark.parametrize("route", ROUTES)
def test_kernel_is_its_meaning(route: str) -> None:
    cases = [case_of("awkward", awkward_inputs())]
    cases += [case_of(f"{v}", mixed_inputs(v, rows)) for v, rows in ((1, 2), (31, 4), (1024, 4), (1025, 8), (4500, 8))]
    cases.append(case_of("penalised", mixed_inputs(1200, 8, penalised=True)))
    if route != "race":  # slow, and these rows are about values
        special = (crowded_inputs, split_ties_inputs, flat_tail_inputs, boundary_inputs)
        cases += [case_of(inputs.__name__, inputs()) for inputs in special]
    for seed in SEEDS[route]:
        for case, result in zip(cases, run_cases(route, cases, seed), strict=True):
            want = sample(SamplingInputs(**case.inputs, **case.updated))
            np.testing.assert_array_equal(result.outputs["token"], want, err_msg=f"{case.name}, seed {seed}")
            for name, before in case.updated.items():
                mark_seen(after := before.copy(), want)
                np.testing.assert_array_equal(result.outputs[name], after)


def test_meaning_penalises_as_the_hosts_sampler_does() -> None:
    x = mixed_inputs(1200, 4, penalised=True)
    bits = np.unpackbits(x.seen.view(np.uint8), axis=1, bitorder="little")[:, :1200]
    host = [
        apply_repetition_penalty(row, np.flatnonzero(b), float(p))
        for row, b, p in zip(x.logits, bits, x.penalty, strict=True)
    ]
    np.testing.assert_array_equal(sample(x), sample(replace(x, logits=np.stack(host), penalty=None, seen=None)))


def test_awkward_rows_end_as_documented() -> None:
    tokens = sample(awkward_inputs())
    assert tokens[[0, 1, 2, 4, 7, 8, 9]].tolist() == [-1, -1, -1, 33, 0, 41, -1]
    assert tokens[3] < 60
    assert tokens[5] % 2 == 1
    assert sample(boundary_inputs()).tolist() == [674, 576]
    assert tokens[6] < 35  # the first half of 70 equal ones is the share of 0.5


@pytest.mark.parametrize("route", ["race", "ptx"])
def test_a_models_vocabulary(route: str) -> None:
    logits = (np.arange(VOCABULARY) * 7919 % 100_003 / 6250).astype(np.float32)
    x = sampling_inputs(np.tile(logits, (3, 1)), temperature=0.8, top_p=[0.8, 1, 0.95], top_k=[0, 0, 40])
    case = case_of("model", x)
    (result,) = run_cases(route, [case])
    np.testing.assert_array_equal(result.outputs["token"], sample(x))
    # The first row is read for its maximum, its sum, three digits of top_p and the draw, the last by top_k too.
    assert result.read["logits"] <= (6 + 2 + 9 + 3 / 32) * x.logits[0].nbytes + 100


def test_a_token_does_not_depend_on_its_batch() -> None:
    x = mixed_inputs(1025, 6)
    inputs = case_of("all", x).inputs
    whole = run_cases("fast", [case_of("all", x)])[0].outputs["token"]
    alone = [case_of(f"{r}", SamplingInputs(**{n: v[r : r + 1].copy() for n, v in inputs.items()})) for r in range(6)]
    assert [int(result.outputs["token"][0]) for result in run_cases("fast", alone)] == whole.tolist()


@pytest.mark.parametrize("vocabulary", [0, 2**18 + 1])
def test_vocabularies_that_the_kernel_cannot_count_are_refused(vocabulary: int) -> None:
    with pytest.raises(EdgeError, match=f"vocabulary of {vocabulary}"):
        launch_sample(1, vocabulary)
