"""keep.cu, and the averages after it, against plugins/infllmv2/meaning.py: exact moves in pools of every form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.infllmv2 import meaning
from plugins.infllmv2.launch import compress
from plugins.paged_attention import NO_TREE
from plugins.paged_attention.launch import AttentionShape, keep
from plugins.paged_attention.meaning import keep_tokens
from plugins.paged_attention.pages import device_order, quantise_pool
from plugins.vectors import ELEMENTS
from tests.cuda_routes import ROUTES, run_route

PAGE, PAGES = 64, 5
WINDOWS = {"c1_pool": meaning.FINE, "c2_pool": meaning.COARSE}


def run_keep(route: str, shape: AttentionShape, first: int, slots: np.ndarray, seed: int = 0) -> None:
    """All pages hold random values; what is kept, and nothing else, must be what the meaning makes of it."""
    rng, dtype = np.random.default_rng(seed), ELEMENTS[shape.element]
    pages = rng.permutation(PAGES).astype(np.int32)
    pool = rng.normal(size=(PAGES, shape.planes, shape.kv_heads, PAGE, shape.head_dim)).astype(dtype)
    pools = {"kv_pool": pool}
    if shape.is_byte:
        pools["kv_pool"], pools["kv_scales"] = quantise_pool(pool)
    windows = {
        name: rng.normal(size=(PAGES, shape.kv_heads, PAGE // stride, shape.head_dim)).astype(dtype)
        for name, (_, stride) in WINDOWS.items()
    }
    kept = np.arange(first, first + len(slots), dtype=np.int32)
    buffers = {
        **pools,
        **{name: array.copy() for name, array in windows.items()},
        "kv_pool": device_order(pools["kv_pool"]),
        "slots": slots.astype(np.int32),
        "kept": kept,
        "query_start": np.array([0, len(slots)], np.int32),
        "page_table": pages[None],
        "tree_start": np.array([NO_TREE], np.int32),
    }
    buffers = {name: array.copy() for name, array in buffers.items()}
    launches = [keep(shape), *([compress(shape).bind({"slots": "kept"})] if shape.limit else [])]
    run_route(route, launches, buffers, seed)
    scales = pools.get("kv_scales")
    if shape.limit:
        meaning.keep_tokens(pools["kv_pool"], windows["c1_pool"], windows["c2_pool"], pages, first, slots, scales)
    else:
        keep_tokens(pools["kv_pool"], pages, first, slots, scales)
    assert buffers["kv_pool"].tobytes() == device_order(pools["kv_pool"]).tobytes()
    if scales is not None:
        assert buffers["kv_scales"].tobytes() == scales.tobytes()
    step = 2.0**-10 if shape.element == "half" else 2.0**-7  # sums in another order are rounded once
    for name, expected in windows.items():
        got, want = buffers[name].astype(np.float32), expected.astype(np.float32)
        np.testing.assert_allclose(got, want, rtol=step, atol=1e-5, err_msg=name)


SHAPES = {
    "dense": {"head_dim": 128, "element": "bf16", "kv_element": "bf16"},
    "dense bytes": {"head_dim": 64, "kv_element": "uint8_t"},
    "sparse": {"head_dim": 64, "limit": 4},
    "sparse bytes": {"head_dim": 128, "kv_element": "uint8_t", "limit": 4, "use_nope": True},
}


def shape_of(name: str, tokens: int) -> AttentionShape:
    return AttentionShape(tokens, 1, PAGES, 8, 2, **SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("route", ROUTES)
def test_a_path_closes_up(route: str, name: str) -> None:
    """Within a page and over its end; slots that stay, that neighbours take over, and windows of both kinds' ends."""
    paths = {188: [188, 190, 191, 196, 250], 127: [127], 255: [256, 260, 300, 318], 63: [*range(64, 128)]}
    for seed, (first, slots) in enumerate(paths.items()):
        run_keep(route, shape_of(name, len(slots)), first, np.array(slots), seed)


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_path(name: str, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, PAGE * (PAGES - 1)))
    nodes = data.draw(st.sets(st.integers(0, 63), min_size=1))
    run_keep("fast", shape_of(name, len(nodes)), first, first + np.array(sorted(nodes)), first)
