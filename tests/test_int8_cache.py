"""The int8 KV cache: its codes, both operators against float64 and numpy on every route, and whole models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import open_bundle
from edge.config import ModelConfig, SparseConfig
from edge.engine import Engine, open_engine
from edge.memory.ledger import page_bytes
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from plugins.infllmv2.meaning import infllmv2_attention
from plugins.paged_attention.meaning import paged_attention, quantise, stored_values
from plugins.paged_attention.pages import quantise_pool
from tests.operators import HOW, KERNELS, Feeds, bind_pool, from_pages, one_node, session, to_pages
from tests.synthetic import tiny_config, write_hf_checkpoint
from tests.test_infllmv2 import WINDOWS, Sparse, expected_rows, fill_windows, sparse_feeds, sparse_steps
from tests.test_paged_attention import Ragged, make_feeds, ragged, rotated64

POOLS = {"kv_pool": "int8", "kv_scales": "float32", "c1_pool": "bfloat16", "c2_pool": "bfloat16"}
EVERY = ["meaning", *HOW]


# Codes


@given(arrays.arrays(np.float32, (5, 16), elements=st.floats(-1e6, 1e6, width=32)))
def test_a_code_is_the_nearest_of_255_steps(x: np.ndarray) -> None:
    codes, scales = quantise(x)
    error = np.abs(x.astype(np.float64) - codes * scales[:, None].astype(np.float64))
    assert (error <= 0.5001 * scales[:, None] + 1e-38).all()
    largest = np.abs(codes.astype(int)).max(axis=1)
    is_normal = np.abs(x).max(axis=1) > 1e-30
    assert (largest[is_normal] == 127).all() and not scales[~x.any(axis=1)].any()
    assert np.array_equal(quantise(-x)[0], -codes)


# Operators. The routes differ in where they round: a code may be one off where a rotation was contracted.


def operator_model(case: Ragged, feeds: Feeds) -> bytes:
    sizes = {"num_heads": case.heads, "num_kv_heads": case.kv_heads, "head_dim": case.dim, "scale": case.dim**-0.5}
    if isinstance(case, Sparse):
        sizes |= {"use_nope": int(case.use_nope), "max_blocks": case.selected}
    elif case.window:
        sizes["window"] = case.window
    return one_node(
        ("InfLLMv2Attention" if isinstance(case, Sparse) else "PagedAttention") + "Int8" * ("kv_scales" in feeds),
        tuple((name, array.dtype.name, array.ndim) for name, array in feeds.items()),
        (("output", "float32"), *((f"{name}_out", feeds[name].dtype.name) for name in POOLS if name in feeds)),
        **sizes,
    )


def int8_feeds(case: Ragged) -> Feeds:
    """The step of another test with its cache in int8: slots that hold no past token have a scale of NaN."""
    feeds = sparse_feeds(replace(case, pool="bfloat16")) if isinstance(case, Sparse) else make_feeds(case)
    codes, scales = quantise_pool(feeds["kv_pool"])
    named = [(name, array) for name, array in feeds.items() if name != "kv_pool"]
    return dict([*named[:3], ("kv_pool", codes), ("kv_scales", scales), *named[3:]])


def run(how: str, case: Ragged, feeds: Feeds) -> Feeds:
    """Output and pools after the step, by name; every pool is one buffer bound as input and output."""
    if how == "meaning":
        after = {name: array.copy() for name, array in feeds.items()}
        sizes = {"num_heads": case.heads, "num_kv_heads": case.kv_heads, "scale": case.dim**-0.5}
        if isinstance(case, Sparse):
            output = infllmv2_attention(**after, **sizes, use_nope=case.use_nope)
        else:
            rest = {name: array for name, array in after.items() if name != "kv_pool"}
            output = paged_attention(pool=after["kv_pool"], **rest, **sizes, window=case.window)
        return after | {"output": output}
    after = {name: feeds[name].copy() for name in POOLS if name in feeds}
    after["kv_pool"] = to_pages(how, feeds["kv_pool"]).copy()
    one = session(how, operator_model(case, feeds))
    binding = one.io_binding()
    for name, array in feeds.items():
        if name in after:
            bind_pool(binding, name, after[name])
        else:
            binding.bind_cpu_input(name, array)
    binding.bind_output("output", "cpu")
    one.run_with_iobinding(binding)
    return after | {"kv_pool": from_pages(how, after["kv_pool"]), "output": binding.get_outputs()[-1].numpy()}


def check_pools(how: str, case: Ragged, feeds: Feeds, after: Feeds) -> None:
    """New tokens are quantised to nearest, each with its scale; nothing else in the cache has changed."""
    _, k, v = rotated64(case, feeds)
    planes = [k, v]
    if isinstance(case, Sparse) and case.use_nope:
        planes.append(feeds["qkv"].reshape(len(k), -1, case.dim)[:, case.heads : -case.kv_heads].astype(np.float64))
    touched = np.zeros(feeds["kv_scales"].shape, bool)
    for b, (first, last) in enumerate(zip(feeds["query_start"], feeds["query_start"][1:], strict=False)):
        slots = feeds["slots"][first:last]
        page, slot = feeds["page_table"][b][slots // 64], slots % 64
        for plane, values in enumerate(planes):
            codes, scales = quantise(values[first:last])
            got = after["kv_pool"][page, plane, :, slot].astype(int)
            np.testing.assert_allclose(after["kv_scales"][page, plane, :, slot], scales, rtol=1e-5, err_msg=how)
            assert np.abs(got - codes).max(initial=0) <= (plane == 0), f"{how}: plane {plane}"
            assert (got != codes).sum() <= 2 + 0.02 * got.size, how
            touched[page, plane, :, slot] = True
    for name in ("kv_pool", "kv_scales"):
        assert after[name][~touched].tobytes() == feeds[name][~touched].tobytes(), f"{how} wrote outside its {name}"


def tolerance(how: str, case: Ragged) -> float:
    """Where bytes are multiplied, queries have 15 bits of their largest value, and weights 16."""
    exact = 5e-6 * max(1.0, case.magnitude)
    return 5e-4 * max(1.0, case.magnitude) if how == "x86_64_v4_bf16" else exact


def check_dense(how: str, case: Ragged, feeds: Feeds, close: float | None = None) -> None:
    after = run(how, case, feeds)
    check_pools(how, case, feeds, after)
    q, _, _ = rotated64(case, feeds)
    held = stored_values(after["kv_pool"], after["kv_scales"]).astype(np.float64)
    expected = np.empty_like(q)
    for b, (first, last) in enumerate(zip(feeds["query_start"], feeds["query_start"][1:], strict=False)):
        for row in range(first, last):
            slots = case.seen(b, int(feeds["slots"][row]))
            if case.window:
                slots = slots[slots // 64 > feeds["positions"][row] // 64 - case.window]
            keys, values = held[feeds["page_table"][b][slots // 64], :2, :, slots % 64].swapaxes(0, 1)
            for h in range(case.heads):
                scores = keys[:, h // case.group] @ q[row, h] * case.dim**-0.5
                weights = np.exp(scores - scores.max())
                expected[row, h] = weights @ values[:, h // case.group] / weights.sum()
    close = close or tolerance(how, case)
    np.testing.assert_allclose(after["output"], expected.reshape(len(q), -1), rtol=0, atol=close, err_msg=how)


@pytest.mark.parametrize("how", KERNELS)
@settings(max_examples=25, deadline=None)
@given(case=ragged(most_new=130, max_sequences=3, pools=["float32"]))
def test_dense_kernels(how: str, case: Ragged) -> None:
    check_dense(how, case, int8_feeds(case))


@settings(max_examples=12, deadline=None)
@given(case=ragged(most_new=70, max_sequences=3, pools=["float32"]))
def test_dense_function_and_meaning(case: Ragged) -> None:
    for how in ("meaning", "function"):
        check_dense(how, case, int8_feeds(case))


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("magnitude", [1.0, 300.0])
def test_a_long_context_is_split_over_threads(how: str, magnitude: float) -> None:
    case = Ragged(past=(3000, 1024, 1023), new=(1, 1, 1), group=4, dim=64, magnitude=magnitude)
    check_dense(how, case, int8_feeds(case))


@pytest.mark.parametrize("how", KERNELS)
def test_queries_of_two_whole_bytes_are_multiplied_exactly(how: str) -> None:
    """15-bit queries, whose lower bytes add up instead of cancelling; only the weights are rounded, to 16 bits."""
    case = Ragged(past=(200,), new=(3,), dim=64, group=8, kv_heads=1)
    feeds = int8_feeds(case)
    whole = 128 * np.random.default_rng(0).integers(-120, 120, (3, 8, 64)) + 60
    whole[..., 0] = 127 * 128
    feeds["qkv"].reshape(3, 10, 64)[:, :8] = whole * 2.0**-12
    check_dense(how, case, feeds | {"cos": np.ones_like(feeds["cos"]), "sin": np.zeros_like(feeds["sin"])}, 1.5e-4)


@pytest.mark.parametrize("how", EVERY)
def test_heads_wider_than_bytes_can_sum(how: str) -> None:
    """Of 272: the kernel of bytes would overflow from 256 on, so that another one runs."""
    for dim in (256, 272):
        case = Ragged(past=(70,), new=(3,), dim=dim)
        check_dense(how, case, int8_feeds(case))


def check_sparse(how: str, case: Sparse) -> None:
    feeds = int8_feeds(case)
    after = run(how, case, feeds)
    check_pools(how, case, feeds, after)
    held = {"kv_pool": stored_values(after["kv_pool"], after["kv_scales"]), **{name: after[name] for name in WINDOWS}}
    averaged = {**feeds, "kv_pool": held["kv_pool"]} | {name: feeds[name].astype(np.float32) for name in WINDOWS}
    for name in WINDOWS:
        touched = np.zeros(feeds[name].shape, bool)
        for b, (first, last) in enumerate(zip(feeds["query_start"], feeds["query_start"][1:], strict=False)):
            plain = feeds["slots"][first:last][feeds["slots"][first:last] < feeds["tree_start"][b]]
            touched |= fill_windows(averaged, name, feeds["page_table"][b], plain)
        assert after[name][~touched].tobytes() == feeds[name][~touched].tobytes(), f"{how} wrote outside its {name}"
        kept, right = after[name][touched].astype(np.float32), averaged[name][touched]
        np.testing.assert_allclose(kept, right, rtol=2**-8, atol=1e-6, err_msg=f"{how}: {name}")
    output = after["output"].astype(np.float64).reshape(-1, case.kv_heads, case.group, case.dim)
    assert np.isfinite(output).all(), how
    for b in range(len(case.new)):
        for row, g, acceptable in expected_rows(replace(case, pool="bfloat16"), feeds, held, b):
            error = min(np.abs(output[row, g] - expected).max() for expected in acceptable)
            assert error <= tolerance(how, case), f"{how}: row {row} of sequence {b}, KV head {g} is {error:.1e} off"


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("use_nope", [False, True])
@pytest.mark.parametrize("new", [(1, 0, 1), (3, 2, 130)])
def test_sparse_attention(how: str, use_nope: bool, new: tuple[int, ...]) -> None:
    check_sparse(how, Sparse((700, 70, 410), new, dim=64, group=4, selected=6, use_nope=use_nope))


@pytest.mark.parametrize("how", KERNELS)
@settings(max_examples=12, deadline=None)
@given(case=sparse_steps(most_new=70))
def test_sparse_kernels(how: str, case: Sparse) -> None:
    check_sparse(how, replace(case, magnitude=1.0))


# Models

SPARSE = SparseConfig(topk=3, window_size=128, dense_len=-1, use_nope=True)
CONFIGS = {
    "dense": tiny_config(max_position_embeddings=1024),
    "sparse": tiny_config(sparse=SPARSE, max_position_embeddings=1024),
}


def engines(config: ModelConfig, folder: Path, kv: str, *chunks: int) -> list[Engine]:
    if not (folder / "model").exists():
        write_hf_checkpoint(folder / "model", config)
    options = ExportOptions(weights=WeightFormat("exact"), kv=kv)
    path = export_bundle(open_checkpoint(folder / "model"), folder / kv, options)
    return [open_engine(path, EngineOptions(context=1024, chunk=chunk, threads=2)) for chunk in chunks]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_in_chunks_of_any_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a token stores depends on nothing but the token, and the ONNX functions say the same."""
    config = CONFIGS[name]
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 500).tolist()
    whole, *cut = engines(config, tmp_path, "int8", 512, 1, 63, 100)
    assert whole.describe()["kv"] == "int8"
    wanted = whole.logits(ids, 500)
    for engine in cut:
        assert np.abs(engine.logits(ids, 500) - wanted).max() <= 1e-3 * np.abs(wanted).max()
    (exact,) = engines(config, tmp_path, "float32", 512)
    error = np.abs(exact.logits(ids, 160) - wanted[-160:])
    if name == "dense":  # a block more or less is another matter
        assert 0 < error.max() <= 3e-2 * np.abs(wanted).max()
    monkeypatch.setattr("plugins.ort.library.find_library", lambda: None)
    functions = open_engine(tmp_path / "int8", EngineOptions(context=1024, chunk=128))
    assert np.abs(functions.logits(ids[:300], 300) - wanted[:300]).max() <= 1e-3 * np.abs(wanted).max()


def test_a_second_turn_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    config = CONFIGS["sparse"]
    (engine,) = engines(config, tmp_path, "int8", 64)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, 400).tolist()
    session_ = engine.open_session()
    first = [event.token_id for event in session_.generate(ids, params)]
    again = [*ids, *first, 5, 6, 7]
    second = [event.token_id for event in session_.generate(again, params)]
    session_.close()
    assert second == [event.token_id for event in engine.generate(again, params)]


def test_a_page_has_half_the_bytes_and_its_scales(tmp_path: Path) -> None:
    config = tiny_config(sparse=replace(SPARSE, use_nope=False), head_dim=64)
    write_hf_checkpoint(tmp_path / "model", config)
    pages = {}
    for kv in ("int8", "bfloat16"):
        options = ExportOptions(weights=WeightFormat("exact"), kv=kv)
        bundle = open_bundle(export_bundle(open_checkpoint(tmp_path / "model"), tmp_path / kv, options))
        pages[kv] = sum(page_bytes(bundle.config, bundle.manifest.types))
    rows = config.num_hidden_layers * config.num_key_value_heads * 64
    compressed = 5 * 2 * rows
    assert pages["bfloat16"] == 2 * 64 * 2 * rows + compressed
    assert pages["int8"] == 2 * 64 * rows + 2 * 64 * 4 * rows // 64 + compressed
    assert pages["int8"] < 0.55 * pages["bfloat16"]
