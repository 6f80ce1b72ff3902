"""The benchmark over context: what a decode step must read, what the kernels say they read, and the plot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.context import DecodeCase
from bench.context_plot import context_svg
from bench.decode_bytes import bits_a_weight, ideal_bits, minimum_pool_bytes, weight_bytes
from bench.decode_worker import MODES, WARM_UP, decode, fill_pools, measure, next_token, pool_values
from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.long_context import LongContext
from edge.bundle import Bundle, open_bundle
from edge.config import SparseConfig
from edge.executors.onnxruntime import OnnxRuntimeExecutor
from edge.models import MINICPM4_05B, MINICPM4_8B
from plugins.ort.library import take_pool_bytes_read
from tests.bench_samples import of_class
from tests.synthetic import tiny_config, write_hf_checkpoint

BFLOAT16 = 2
# 6 of the blocks are selected: 1 first, 3 local, 2 by score. Dense below 512.
SPARSE = SparseConfig(topk=4, window_size=128, dense_len=512)
CONFIG = tiny_config(sparse=SPARSE)
ROW = CONFIG.num_key_value_heads * CONFIG.head_dim * BFLOAT16  # one token's keys in a layer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("context"), "bfloat16")


def make_bundle(folder: Path, kv: str) -> Bundle:
    checkpoint = open_checkpoint(write_hf_checkpoint(folder / "model", tiny_config()))
    sparse = {"topk": SPARSE.topk, "window_size": SPARSE.window_size, "dense_len": SPARSE.dense_len}
    weights = WeightFormat("w4a16", 32, symmetric=True, head="int4")
    options = ExportOptions(weights=weights, long_context=LongContext("sparse", sparse), kv=kv)
    return open_bundle(export_bundle(checkpoint, folder / "bundle", options))


@pytest.fixture(scope="module")
def executor(bundle: Bundle) -> OnnxRuntimeExecutor:
    executor = OnnxRuntimeExecutor(bundle, num_pages=40, threads=2)
    fill_pools(executor, bundle)
    return executor


def test_minimum_is_that_of_the_specification() -> None:
    # infllmv2.md 5.2, a layer of 8B at 131072 tokens: 5.24 MB of compressed keys, 6.29 MB of blocks, 134.2 MB dense
    layer = replace(MINICPM4_8B, num_hidden_layers=1)
    assert minimum_pool_bytes(layer, 131072, BFLOAT16, SparseConfig()) == 5_242_880 + 6_291_456
    assert minimum_pool_bytes(layer, 131072, BFLOAT16, None) == 134_217_728
    assert round(minimum_pool_bytes(MINICPM4_8B, 131072, BFLOAT16, SparseConfig()) / 1e6) == 369
    assert round(minimum_pool_bytes(MINICPM4_8B, 131072, BFLOAT16, None) / 1e9, 2) == 4.29
    # and of 5.1: the 0.5B shape keeps 512 bytes a token and layer, 384 MiB at 32K
    assert minimum_pool_bytes(MINICPM4_05B, 32768, BFLOAT16, None) == 384 << 20
    assert minimum_pool_bytes(MINICPM4_05B, 32768, BFLOAT16, SparseConfig()) == 24 * (3_145_728 + 655_360)


def test_minimum_is_dense_until_blocks_are_left_out() -> None:
    always = SparseConfig(dense_len=-1)
    for context, sparse in ((8191, SparseConfig()), (6144, always), (100, always)):
        assert minimum_pool_bytes(CONFIG, context, 4, sparse) == minimum_pool_bytes(CONFIG, context, 4, None)
    for context, sparse in ((8192, SparseConfig()), (6145, always)):
        assert minimum_pool_bytes(CONFIG, context, 4, sparse) != minimum_pool_bytes(CONFIG, context, 4, None)


@settings(max_examples=20, deadline=None)
@given(context=st.integers(1, 2000))
def test_a_dense_step_reads_every_key_and_value_once(executor: OnnxRuntimeExecutor, context: int) -> None:
    take_pool_bytes_read()
    executor.step(next_token(context - 1, "dense"))
    assert take_pool_bytes_read() == minimum_pool_bytes(CONFIG, context, BFLOAT16, None)
    assert take_pool_bytes_read() == 0


@settings(max_examples=20, deadline=None)
@given(context=st.integers(SPARSE.dense_len, 2000))
def test_a_sparse_step_reads_its_blocks_and_windows_once(executor: OnnxRuntimeExecutor, context: int) -> None:
    take_pool_bytes_read()
    executor.step(next_token(context - 1, "sparse"))
    read = take_pool_bytes_read()
    minimum = minimum_pool_bytes(CONFIG, context, BFLOAT16, SPARSE)
    # Short of the formula by what is missing in the last block and by the windows of local blocks; never over it by
    # more than the odd window that it rounds away.
    layers, last_block = CONFIG.num_hidden_layers, -context % 64
    windows = 4 * (SPARSE.local_blocks + 1)
    assert minimum - layers * ROW * (2 * last_block + windows) <= read <= minimum + layers * ROW


def test_filled_pools_have_the_spread_of_keys_and_of_their_averages(executor: OnnxRuntimeExecutor) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16)
    spreads = [np.std(pool_values(pool, dtype).astype(np.float32)) for pool in executor._pools]
    assert spreads == pytest.approx(2 * [1, 32**-0.5, 128**-0.5], rel=0.1)


def test_a_step_on_an_int8_cache_reads_codes_and_scales(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, "int8")
    executor = OnnxRuntimeExecutor(bundle, num_pages=40, threads=2)
    fill_pools(executor, bundle)
    codes, scales = (pool_values(pool, np.dtype(t)) for pool, t in zip(executor._pools, ("i1", "f4"), strict=False))
    assert np.std(codes * scales[0]) == pytest.approx(1, rel=0.1) and np.ptp(scales) == 0
    minimum = minimum_pool_bytes(CONFIG, 1000, 1, None, scale_bytes=4)
    assert decode(executor, 1000 - WARM_UP - 1, 1, "dense")[1] == minimum
    assert minimum == 2 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * (CONFIG.head_dim + 4) * 1000
    cases = measure(str(bundle.path), contexts=[1000], rounds=1, steps=1, threads=1)["cases"]
    for mode, case in zip(MODES, cases, strict=True):
        assert case["pool_bytes"] == pytest.approx(case["minimum_pool_bytes"], rel=0.2 if mode == "sparse" else 0)


def test_weights_of_a_step_are_all_but_the_embedding(bundle: Bundle) -> None:
    c = bundle.config
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    matrices = c.num_hidden_layers * (c.hidden_size * (heads + c.num_attention_heads * c.head_dim))
    matrices += c.num_hidden_layers * 3 * c.hidden_size * c.intermediate_size + c.vocab_size * c.hidden_size
    norms = 4 * c.hidden_size * (2 * c.num_hidden_layers + 1)
    assert weight_bytes(bundle) == matrices // 2 + 4 * matrices // 32 + norms + 2 * c.hidden_size


def test_bits_of_a_weight_beside_the_ideal(bundle: Bundle) -> None:
    """Groups of 32: a float32 scale is stored, a float16 one would do; a row's scale counts for all its inputs."""
    assert bits_a_weight(bundle) == 4 + 32 / 32
    assert ideal_bits(WeightFormat("w4a16", 32, symmetric=True), bundle.config) == 4 + 16 / 32
    assert ideal_bits(WeightFormat("w4a16", 64, symmetric=True), bundle.config) == 4.25
    assert ideal_bits(WeightFormat("w4a16", 32), bundle.config) == 4 + 32 / 32
    square = replace(bundle.config, intermediate_size=bundle.config.hidden_size)
    assert ideal_bits(WeightFormat("ternary", 0, symmetric=True), square) == 2 + 16 / square.hidden_size


def test_every_case_is_measured_in_every_round(bundle: Bundle) -> None:
    result = measure(str(bundle.path), contexts=[64, 640], rounds=3, steps=4, threads=2)
    cases = result["cases"]
    assert [(case["mode"], case["context"]) for case in cases] == [(mode, n) for mode in MODES for n in (64, 640)]
    assert all(len(case["step_s"]) == 3 and min(case["step_s"]) > 0 for case in cases)
    dense, long_dense = cases[2:]
    lengths = range(64 + WARM_UP + 1, 64 + WARM_UP + 5)
    assert dense["pool_bytes"] == dense["minimum_pool_bytes"] == np.mean([4 * ROW * n for n in lengths])
    assert cases[1]["pool_bytes"] < long_dense["pool_bytes"] == long_dense["minimum_pool_bytes"]


def test_bytes_of_warm_up_steps_do_not_count(executor: OnnxRuntimeExecutor) -> None:
    seconds, read = decode(executor, 127, 1, "dense")
    assert len(seconds) == 1 and read == 4 * ROW * (127 + WARM_UP + 1)


def test_speeds_are_compared_round_by_round() -> None:
    first = DecodeCase("sparse", 512, (0.1, 0.4, 0.1), 1, 1)
    last = DecodeCase("sparse", 32768, (0.2, 0.8, 0.1), 1, 1)
    assert last.tok_s == pytest.approx(5)
    assert last.speed_against(first) == pytest.approx(0.5)


def test_plot_is_a_file_of_its_own_with_both_panels() -> None:
    speed = {"edge, sparse": {512: 90.0, 131072: 70.0}, "llama.cpp Q4_0": {512: 80.0}}
    megabytes = {"edge, sparse": {512: 6.5, 131072: 137.0}, "sparse minimum": {512: 6.5, 131072: 138.4}}
    root = ET.fromstring(context_svg(["a < b"], speed, megabytes))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for element in root.iter():
        element.tag = element.tag.removeprefix("{http://www.w3.org/2000/svg}")
    texts = [element.text for element in root.iter("text")]
    for said in ("a < b", "Decode speed (tok/s)", "Read by a step (MB)", "512", "128K", "llama.cpp Q4_0", "138"):
        assert (said in texts) == (said != "138"), said  # a minimum has no mark of its own
    assert len(of_class(root, "line")) == 2 * 4
