"""edge.AddGroupOffsets: numpy meaning, ONNX function and every compiled kernel agree with float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.group_offsets.meaning import add_group_offsets
from tests.operators import HOW, one_node, session

INPUTS = (("x", "float32", 2), ("product", "float32", 2), ("offsets", "float16", 2))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 47, 48, 49, 130]),
    columns=st.integers(1, 2400),
    groups=st.integers(1, 9),
    group_size=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 999),
)
def test_it_agrees_with_float64(rows: int, columns: int, groups: int, group_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, groups * group_size)).astype(np.float32)
    product = rng.standard_normal((rows, columns)).astype(np.float32)
    offsets = rng.standard_normal((groups, columns)).astype(np.float16)
    sums = x.astype(np.float64).reshape(rows, groups, group_size).sum(-1)
    exact = product + sums @ offsets.astype(np.float64)
    model = one_node("AddGroupOffsets", INPUTS, (("y", "float32"),))
    feeds = {"x": x, "product": product, "offsets": offsets}
    results = {how: session(how, model).run(None, feeds)[0] for how in HOW}
    for how, got in (results | {"meaning": add_group_offsets(x, product, offsets)}).items():
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=2e-4, err_msg=how)


@pytest.mark.parametrize("how", HOW)
def test_each_group_takes_its_own_offset(how: str) -> None:
    x = np.repeat(np.array([[1, 10]], np.float32), 32, axis=1) / 32
    offsets = np.stack([np.arange(16), 100 * np.arange(16)]).astype(np.float16)
    model = one_node("AddGroupOffsets", INPUTS, (("y", "float32"),))
    (got,) = session(how, model).run(None, {"x": x, "product": np.zeros((1, 16), np.float32), "offsets": offsets})
    np.testing.assert_allclose(got[0], 1001 * np.arange(16), rtol=1e-6)
