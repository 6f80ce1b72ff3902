"""Bytes, bounds and bandwidth of the roofline, against sums made another way and data sheets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.decode_bytes import minimum_pool_bytes
from bench.decode_bytes import weight_bytes as stored_bytes
from edge.bench import bandwidth, roofline
from edge.bench.bandwidth import Limits, board_named, buffer_bytes, cpu_limits, last_level_cache, peak_tflops
from edge.bench.roofline import make_roofline, mean_step
from edge.bench.samples import BenchCase
from edge.bench.step_bytes import attended, pool_bytes, prompt_flops, weight_bytes
from edge.bundle import open_bundle
from edge.config import SparseConfig
from edge.cuda import Device
from edge.engine import Engine, open_engine
from edge.errors import EdgeError
from edge.memory.weights import StoredWeights
from edge.plan import EngineOptions
from plugins.build.cost import BOARDS
from tests.bench_samples import batch_result, case_result
from tests.synthetic import tiny_config

# ---- bytes -------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    context=st.integers(1, 200_000),
    topk=st.integers(2, 100),
    window=st.integers(0, 40),
    kv=st.sampled_from([("float32", 4, 0, 4), ("bfloat16", 2, 0, 2), ("int8", 1, 4, 2)]),
    dense=st.booleans(),
)
def test_pools_are_read_in_the_caches_own_types(
    context: int, topk: int, window: int, kv: tuple[str, int, int, int], dense: bool
) -> None:
    """As bench.context computes it, whose bytes the CPU kernels count."""
    name, size, scale, compressed = kv
    sparse = SparseConfig(topk=topk, window_size=64 * window, dense_len=-1)
    config = tiny_config(sparse=sparse)
    in_force = None if dense else sparse
    wanted = minimum_pool_bytes(config, context, size, in_force, scale_bytes=scale, compressed_bytes=compressed)
    assert sum(pool_bytes(config, {"kv": name, "activation": "float32"}, context, in_force)) == wanted


def test_weights_are_those_that_the_bundle_stores(tiny_bundle: Path) -> None:
    """All that a step reads by the graph, but norms and the embedding's row."""
    bundle = open_bundle(tiny_bundle)
    config, manifest = bundle.config, bundle.manifest
    found = weight_bytes(config, StoredWeights.from_manifest(manifest.weights, manifest.types), on_cpu=True)
    norms = 4 * config.hidden_size * (2 * config.num_hidden_layers + 1)
    assert sum(found) == stored_bytes(bundle) - norms - 2 * config.hidden_size  # bfloat16 in the table


@settings(max_examples=30)
@given(prompt=st.integers(1, 1500), topk=st.integers(2, 9), dense=st.booleans())
def test_operations_of_a_prompt_are_those_counted_token_by_token(prompt: int, topk: int, dense: bool) -> None:
    sparse = None if dense else SparseConfig(topk=topk, window_size=128, dense_len=-1)
    config = tiny_config()
    keys = [attended(token + 1, sparse)[0] for token in range(prompt)]
    attention = 4 * config.num_attention_heads * config.head_dim * np.mean(keys)
    c = config
    matrices = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    matrices += 3 * c.hidden_size * c.intermediate_size
    assert prompt_flops(config, prompt, sparse) == pytest.approx(c.num_hidden_layers * (2 * matrices + attention))


# ---- limits ------------------------------------------------------------------------------------------------


def test_peaks_are_those_of_the_data_sheets() -> None:
    """Dense float16 with float32 sums: 25.5, 165 and 209 TFLOP/s; Orin: half of 85 int8 TOPS."""
    found = {board.name: peak_tflops(board) for board in BOARDS}
    assert found == pytest.approx(
        {"Jetson AGX Orin": 42.5, "RTX 3060": 25.5, "RTX 4090": 165, "RTX 5090": 209}, rel=0.01
    )


@pytest.mark.parametrize(
    ("name", "model", "board"),
    [
        ("NVIDIA GeForce RTX 4090", "", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "", None),
        ("NVIDIA GeForce RTX 3060 Ti", "", None),
        ("Orin", "NVIDIA Jetson AGX Orin Developer Kit", "Jetson AGX Orin"),
        ("Orin", "NVIDIA Jetson Orin Nano Developer Kit", None),
        ("Emulated Jetson (sm_87)", "", "Jetson AGX Orin"),
    ],
)
def test_a_board_is_known_by_its_whole_name(name: str, model: str, board: str | None) -> None:
    architecture = "sm_87" if "Jetson" in name else "sm_89"
    device = Device(name, architecture, 16, 1 << 30, False, (12, 6), 0)
    found = board_named(device, model)
    assert (found and found.name) == board


def test_an_emulated_device_says_so() -> None:
    limits = bandwidth.device_limits(Device("Emulated GPU (sm_86)", "sm_86", 28, 1 << 30, False, (12, 6), 0), "")
    assert limits.gb_s == 360 and "emulated" in limits.bandwidth_source and "emulated" in limits.compute_source


def test_the_cpu_is_read_by_all_threads_beyond_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "buffer_bytes", lambda cache, available: 32 << 20)
    limits = cpu_limits(2)
    assert 0.05 < limits.gb_s < 5000 and limits.tflops is None
    assert "32 MiB by 2 threads" in limits.bandwidth_source


@pytest.mark.parametrize(
    ("cache", "available", "size"),
    [
        (32 << 20, 64 << 30, 128 << 20),
        (1 << 20, 64 << 30, 64 << 20),
        (300 << 20, 64 << 30, 1 << 30),
        (32 << 20, 256 << 20, 64 << 20),
    ],
)
def test_the_buffer_is_beyond_the_cache_and_within_memory(cache: int, available: int, size: int) -> None:
    assert buffer_bytes(cache, available) == size


def test_the_last_cache_is_the_largest(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path) == 0
    for index, text in enumerate(("48K", "2048K", "24M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{text}\n")
    assert last_level_cache(tmp_path) == 24 << 20


# ---- the whole ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return open_engine(tiny_bundle, EngineOptions(context=512, threads=1, sequences=4))


def test_weights_are_read_once_and_keys_by_every_sequence(engine: Engine) -> None:
    one, four = (mean_step(engine, BenchCase(100, 29, batch)) for batch in (1, 4))
    assert (four.weights, four.head) == (one.weights, one.head)
    assert four.kv == 4 * one.kv
    # contexts of the 28 steps are 101 to 128
    row = 2 * engine.bundle.config.num_key_value_heads * engine.bundle.config.head_dim * 4
    assert one.kv == pytest.approx(114.5 * row * engine.bundle.config.num_hidden_layers)


def test_shares_follow_from_speeds_and_limits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "find_limits", lambda *_: Limits(2.0, "given", 0.5, "given"))
    results = [case_result(100, (0.5, [0.01] * 10)), batch_result(100, 4, (0.1, 0.2, 0.3, 0.4), 0.02, steps=10)]
    found = make_roofline(engine, results, "")
    for row, result in zip(found.rows, results, strict=True):
        step, case = mean_step(engine, result.case), result.case
        assert row.decode_bound_tok_s == pytest.approx(case.batch * 2e9 / step.total)
        assert result.decode_tok_s is not None and result.prefill_tok_s is not None
        assert row.decode_share == pytest.approx(result.decode_tok_s.median * step.total / case.batch / 2e9)
        assert row.prefill_share == pytest.approx(result.prefill_tok_s.median * row.flops / 0.5e12)


def test_without_a_peak_or_a_speed_there_is_no_share(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "find_limits", lambda *_: Limits(2.0, "given", None, "unknown"))
    (row,) = make_roofline(engine, [case_result(100, (0.5, []))], "").rows
    assert row.decode_share is None and row.prefill_bound_tok_s is None and row.prefill_share is None


def test_limits_that_cannot_be_found_are_a_sentence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Limits:
        raise EdgeError("no room for two buffers")

    monkeypatch.setattr(roofline, "find_limits", refuse)
    found = make_roofline(engine, [case_result(100, (0.5, [0.1]))], "")
    assert (found.limits, found.rows, found.problem) == (None, (), "No roofline: no room for two buffers.")


def test_sparse_attention_lowers_the_bytes_that_a_long_context_reads() -> None:
    sparse = SparseConfig()
    config = tiny_config(sparse=sparse)
    manifest = SimpleNamespace(
        weights={"kind": "fp16", "group_size": 0, "symmetric": True, "head": "int8", "head_group_size": 0},
        types={"kv": "bfloat16", "activation": "float32", "embedding": "bfloat16"},
        target="onnxruntime",
    )
    steps = [
        mean_step(
            cast(Engine, SimpleNamespace(
                bundle=SimpleNamespace(config=config, manifest=manifest), plan=SimpleNamespace(sparse=in_force)
            )),
            BenchCase(131000, 64),
        )
        for in_force in (None, replace(sparse, dense_len=2**31 - 1), sparse)
    ]  # fmt: skip
    dense, off, chosen = steps
    assert dense.total == off.total and dense.compressed == 0
    assert chosen.kv == pytest.approx(dense.kv * 6144 / 131032) and 0 < chosen.compressed < dense.kv / 16
