"""The kernel that feeds drawn tokens back, against its meaning."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from plugins.sampling.launch import advance as launch_advance
from plugins.sampling.meaning import DecodeState, advance
from tests.cuda_routes import ROUTES, run_route

CAPACITY = 5


def random_state(rng: np.random.Generator, rows: int) -> DecodeState:
    """Sequences of all lengths: some still shorter than the prompt's switch length, some with a full history."""
    positions = rng.integers(0, 10000, rows, dtype=np.int32)
    return DecodeState(
        input_ids=rng.integers(0, 100, rows, dtype=np.int32),
        positions=positions,
        switch_length=positions + rng.integers(1, 4, rows, dtype=np.int32),
        step=rng.integers(0, 50, rows, dtype=np.int32),
        count=rng.integers(0, CAPACITY + 1, rows, dtype=np.int32),
        history=rng.integers(0, 100, (CAPACITY, rows), dtype=np.int32),
    )


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rows", [1, 32, 45])
def test_the_next_step_follows_from_the_token(route: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    expected = random_state(rng, rows)
    buffers = {field.name: getattr(expected, field.name).copy() for field in fields(DecodeState)}
    for _ in range(3):
        buffers["token"] = rng.integers(-1, 73448, rows, dtype=np.int32)
        advance(buffers["token"], expected)
        run_route(route, [launch_advance(rows, CAPACITY)], buffers)
        for field in fields(DecodeState):
            np.testing.assert_array_equal(buffers[field.name], getattr(expected, field.name), field.name)


def test_a_sequence_switches_with_its_context_and_not_before() -> None:
    one = np.ones(1, np.int32)
    state = DecodeState(7 * one, 99 * one, 120 * one, 0 * one, 0 * one, np.zeros((2, 1), np.int32))
    advance(5 * one, state)
    assert state.switch_length[0] == 120 and state.positions[0] == 100  # of a longer prompt, say
    state.positions[0] = 119
    advance(6 * one, state)
    assert state.switch_length[0] == 121 == state.positions[0] + 1
    assert state.history[:, 0].tolist() == [5, 6]
