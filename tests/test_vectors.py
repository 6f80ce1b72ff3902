"""Vectors: they cover every kernel, the kernels' own source passes them in the emulator, and they can fail."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.config import ModelConfig, SparseConfig
from edge.errors import EdgeError
from edge.models import MINICPM4_05B, MINICPM4_8B
from edge.selftest.vectors import PUBLISHED, ModelKernels, decode_vectors, tree_vectors, vectors_for
from plugins.build.registry import kernels_for
from plugins.vectors import Deviation, Expected, Vector, poisoned, worst
from tests.cuda_routes import run_route
from tests.synthetic import tiny_config

# Three planes of keys and values, bf16 throughout, int8 head in groups.
TINY = ModelKernels(
    tiny_config(hidden_size=256, head_dim=64, vocab_size=1003, sparse=SparseConfig(use_nope=True, topk=8)),
    element="bf16",
    kv_element="bf16",
    weights=(4, 128),
    head=(8, 64),
)
MODELS = {**PUBLISHED, "tiny": TINY}
VECTORS = [(title, vector) for title, model in MODELS.items() for vector in vectors_for(model)]


def run(vector: Vector, changed: str | None = None, route: str = "fast") -> Deviation:
    """`changed`: the input whose values are moved by one before the kernel sees them."""
    before = vector.buffers()
    expected = vector.expect(before)
    after = {name: array.copy() for name, array in before.items()}
    if changed is not None:
        after[changed][...] = np.roll(after[changed], 1)
    given_bytes = {name: array.tobytes() for name, array in after.items()}
    run_route(route, vector.launches, after)
    for name, array in after.items():
        if name not in expected and name not in vector.outputs:
            assert array.tobytes() == given_bytes[name], f"{vector.name} changed {name}"
    return worst(expected, after)


@pytest.mark.parametrize(("title", "vector"), VECTORS, ids=[f"{title} {v.name}" for title, v in VECTORS])
def test_the_source_passes_in_the_emulator(title: str, vector: Vector) -> None:
    deviation = run(vector)
    assert deviation.passed, deviation


@pytest.mark.parametrize("vector", vectors_for(TINY), ids=lambda vector: vector.name)
def test_the_compiled_code_passes(vector: Vector) -> None:
    """As PTX: where a tolerance is zero, NVRTC's own roundings and contractions make no difference."""
    deviation = run(vector, route="ptx")
    assert deviation.passed, deviation


@pytest.mark.parametrize(
    ("start", "changed"),
    [
        ("scaled_rows", "index"),
        ("rms_norm", "weight"),
        ("add_rms_norm", "branch"),
        ("rope_table", "frequency"),
        ("swiglu", "gate_up"),
        ("sample", "logits"),
        ("advance", "token"),
        ("append", "cos"),
        ("append", "qkv"),
        ("attend_tiles", "kv_pool"),
        ("attend_split", "q"),
        ("compress", "kv_pool"),
        ("score 3", "c1_pool"),
        ("score 3", "c2_pool"),
        ("score 40", "qkv"),
        ("select", "block_scores"),
        ("gemv", "weights"),
        ("gemm", "scales"),
        ("head", "x"),
    ],
)
def test_a_wrong_input_shows(start: str, changed: str) -> None:
    vector = next(v for v in vectors_for(TINY) if v.name.startswith(start))
    assert not run(vector, changed).passed


TYPES = (("half", "half"), ("bf16", "bf16"), ("half", "uint8_t"))
FORMATS = ((None, None), ((4, 128), (4, 128)), ((4, 32), (8, 32)), ((2, 0), (8, 0)), ((8, 128), None))


@pytest.mark.parametrize("config", [MINICPM4_8B, MINICPM4_05B, TINY.config], ids=["8B", "0.5B", "tiny"])
@pytest.mark.parametrize("sparse", [None, SparseConfig(), SparseConfig(use_nope=True)], ids=["dense", "sparse", "nope"])
def test_every_kernel_of_a_model_has_a_vector(config: ModelConfig, sparse: SparseConfig | None) -> None:
    for (element, kv_element), (weights, head) in itertools.product(TYPES, FORMATS):
        model = ModelKernels(replace(config, sparse=sparse), element, kv_element, weights, head)
        needed = set(kernels_for(model.config, element, kv_element, weights, head))
        vectors = vectors_for(model)
        assert {launch.kernel for vector in vectors for launch in vector.launches} == needed
        assert len({vector.name for vector in vectors}) == len(vectors)
        for multiprocessors in (16, 170):  # what is timed is in the module too
            timed = decode_vectors(model, multiprocessors)
            assert {launch.kernel for vector in timed for launch in vector.launches} <= needed


@pytest.mark.parametrize("vector", decode_vectors(TINY, 16), ids=lambda vector: vector.name)
def test_a_decode_step_at_131072_tokens_passes_too(vector: Vector) -> None:
    assert run(vector).passed


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kv", ["bf16", "uint8_t"])
def test_trees_pass_in_the_emulator(kv: str, sparse: bool) -> None:
    for vector in tree_vectors(replace(TINY.attention, kv_element=kv), sparse=sparse):
        deviation = run(vector)
        assert deviation.passed, (vector.name, deviation)


@pytest.mark.parametrize("changed", ["slots", "tree_start", "tree_mask"])
def test_a_wrong_tree_shows(changed: str) -> None:
    tiles = tree_vectors(TINY.attention, sparse=True)[1]
    assert not run(tiles, changed).passed


def test_a_model_that_kernels_do_not_fit_is_refused_by_name() -> None:
    with pytest.raises(EdgeError, match="head_dim 16 has no attention kernel"):
        vectors_for(ModelKernels(tiny_config()))


# ---- the judge -----------------------------------------------------------------------------------------------


def judge(want: list[float], got: list[float], absolute: float = 0, relative: float = 0) -> Deviation:
    return worst({"y": Expected(np.array(want), absolute, relative)}, {"y": np.array(got)})


@pytest.mark.parametrize(
    ("want", "got", "passed"),
    [
        ([1, 2], [1, 2], True),
        ([1, 2], [1, 2.001], False),
        ([1, np.nan], [1, np.nan], True),
        ([1, np.nan], [1, 3], False),
        ([1, 3], [1, np.nan], False),
        ([np.inf, -np.inf], [np.inf, -np.inf], True),
        ([np.inf], [-np.inf], False),
        ([np.inf], [1e30], False),
    ],
)
def test_without_a_tolerance_values_must_be_the_same(want: list[float], got: list[float], passed: bool) -> None:
    assert judge(want, got).passed is passed


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    want=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6),
    errors=st.lists(st.floats(-1, 1), min_size=6, max_size=6),
    absolute=st.sampled_from([0.0, 0.1]),
    relative=st.sampled_from([0.0, 0.01]),
)
def test_the_worst_element_decides(want: list[float], errors: list[float], absolute: float, relative: float) -> None:
    got = [w + e for w, e in zip(want, errors, strict=False)]
    found = judge(want, got, absolute, relative)
    assert found.passed == all(abs(g - w) <= absolute + relative * abs(w) for w, g in zip(want, got, strict=True))
    assert (found.error, found.allowed) in [
        (abs(w - g), absolute + relative * abs(w)) for w, g in zip(want, got, strict=True)
    ]


def test_of_several_buffers_the_worst_is_told() -> None:
    expected = {
        "a": Expected(np.zeros(2), absolute=1.0),
        "b": Expected(np.zeros(2), absolute=0.1),
        "c": Expected(np.zeros(2)),
    }
    got = {"a": np.array([0, 0.5]), "b": np.array([0.09, 0]), "c": np.zeros(2)}
    assert worst(expected, got) == Deviation("b", 0.09, 0.1)
    assert worst(expected, got | {"c": np.array([0, 1e-9])}) == Deviation("c", 1e-9, 0)


def test_a_buffer_that_no_kernel_wrote_fails() -> None:
    for dtype, want in ((np.float16, 1.0), (np.int32, 3)):
        values = np.full(3, want, dtype)
        assert not worst({"y": Expected(values, 1.0, 1.0)}, {"y": poisoned((3,), np.dtype(dtype))}).passed


def test_a_vector_is_the_same_every_time() -> None:
    for vector in vectors_for(TINY):
        first, again = vector.buffers(), vector.buffers()
        assert all(first[name].tobytes() == again[name].tobytes() for name in first)
