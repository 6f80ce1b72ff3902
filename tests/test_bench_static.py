"""`edge bench --static`: bounds from compiled code and shapes, told as bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.decode_bytes import minimum_pool_bytes
from build_engine.checkpoint import expected_shapes
from edge.bench.static import CONTEXTS, MODELS, WEIGHTS, Bound, bounds, step_bytes
from edge.cli.app import run_command
from edge.config import SparseConfig
from plugins.build.nvrtc import ARCHITECTURES, TOOLCHAINS, Toolchain
from plugins.build.registry import product_launches
from tests.command import edge
from tests.synthetic import tiny_config

# ---- the roofline ------------------------------------------------------------------------------------------


def bound_of(model: str, weights: str, attention: str, context: int) -> Bound:
    (found,) = [
        b for b in bounds() if (b.model, b.weights, b.attention, b.context) == (model, weights, attention, context)
    ]
    return found


@pytest.mark.parametrize(
    "weights,attention,tok_s",
    [
        ("int4", "sparse", (46, 81, 227, 404)),
        ("int4", "dense", (24, 43, 120, 214)),
        ("ternary", "sparse", (84, 148, 415, 739)),
    ],
)
def test_the_bounds_are_those_worked_out_by_hand(weights: str, attention: str, tok_s: tuple[int, ...]) -> None:
    """MiniCPM4-8B at 128K (spec: kernel_technology.md 6.6, which rounds)."""
    found = bound_of("MiniCPM4-8B", weights, attention, 131072).tok_s
    assert list(found) == ["Jetson AGX Orin", "RTX 3060", "RTX 4090", "RTX 5090"]
    assert list(found.values()) == pytest.approx(tok_s, rel=0.025)


def test_bytes_of_a_step_by_hand() -> None:
    step = bound_of("MiniCPM4-8B", "int4", "sparse", 131072).step
    assert step.weights + step.head == pytest.approx(4.07e9, rel=0.005)
    assert step.kv == 6144 * 32 * 1024  # 96 blocks of 64 tokens, 32 KiB each
    assert step.compressed == (8192 + 2048) * 2 * 128 * 2 * 32
    assert bound_of("MiniCPM4-8B", "int4", "dense", 131072).step.kv == 131072 * 32 * 1024


def test_weights_are_those_of_the_checkpoints() -> None:
    """Counted from the tensors that a checkpoint of the shape must have."""
    for config in MODELS.values():
        count = sum(a[0] * a[1] for name, a in expected_shapes(config) if name.endswith("_proj.weight"))
        step = step_bytes(config, 4096, WEIGHTS["ternary"], None)
        assert step.weights == count / 4
        assert step.head == 73448 * config.hidden_size * 4.125 / 8


@settings(max_examples=50)
@given(
    context=st.integers(1, 200_000),
    topk=st.integers(2, 100),
    window=st.integers(0, 40),
    dense_len=st.sampled_from([-1, 0, 8192]),
    dense=st.booleans(),
)
def test_pools_are_read_as_the_cpu_kernels_read_them(
    context: int, topk: int, window: int, dense_len: int, dense: bool
) -> None:
    """The same minimum that bench.context holds the bytes counted by the CPU kernels against."""
    sparse = None if dense else SparseConfig(topk=topk, window_size=64 * window, dense_len=dense_len)
    config = tiny_config()
    step = step_bytes(config, context, 4, sparse)
    assert step.kv + step.compressed == minimum_pool_bytes(config, context, 2, sparse)


def test_every_combination_is_there_and_sparse_only_where_it_differs() -> None:
    found = {(b.model, b.weights, b.attention, b.context) for b in bounds()}
    assert len(found) == len(bounds()) == len(MODELS) * len(WEIGHTS) * (len(CONTEXTS) + 2)
    assert not [b for b in bounds() if b.attention == "sparse" and b.context < 8192]
    for b in bounds():
        if b.attention == "sparse":
            assert b.step.total < bound_of(b.model, b.weights, "dense", b.context).step.total


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    result = edge("bench", "--static", "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    return json.loads(result.stdout)


def test_json_has_every_kernel_and_says_that_nothing_was_measured(document: dict[str, Any]) -> None:
    assert "not measurements" in document["note"] and "have not run on a device" in document["note"]
    symbols = {launch.kernel.symbol for launch in product_launches().values()}
    listed = [(kernel["name"], kernel["arch"]) for kernel in document["kernels"]]
    assert sorted(listed) == sorted((symbol, arch) for symbol in symbols for arch in ARCHITECTURES)
    assert len(document["roofline"]) == len(bounds())


def test_figures_of_a_kernel_agree_with_each_other(document: dict[str, Any]) -> None:
    for kernel in document["kernels"]:
        assert 0 < kernel["registers"] <= 255 and kernel["spills"] == kernel["stack"] == 0
        assert 1 <= kernel["ctas_per_sm"] <= 24 and 0 <= kernel["smem"] <= 99 << 10
        assert kernel["pipe_cycles"][kernel["bound"]] == max(kernel["pipe_cycles"].values())
        assert (kernel["instructions_per_hmma"] is None) == (kernel["hmma"] == 0)
        assert kernel["hmma"] == 0 or kernel["instructions_per_hmma"] == kernel["instructions"] / kernel["hmma"]


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1", "TERM": "dumb"}, {"FORCE_COLOR": "1"}])
def test_the_tables_fit_a_terminal_and_call_themselves_bounds(environment: dict[str, str]) -> None:
    result = edge("bench", "--static", **environment)
    text = result.stdout.decode()
    assert result.returncode == 0
    assert "not measurements" in text and "a bound, not a measurement" in text
    assert ("\x1b" in text) == ("FORCE_COLOR" in environment)
    if "FORCE_COLOR" not in environment:
        assert max(map(len, text.splitlines())) <= 80
        assert "\u2026" not in text  # nothing was cut


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["bundle", "--static"], "a bundle has no meaning"),
        (["--static", "--repeat", "3"], "--repeat has no meaning"),
        (["--static", "--json", "--html", "r.html"], "--html has no meaning"),
        (["--static", "--new-tokens", "32"], "--new-tokens has no meaning"),
        ([], "no bundle to measure"),
    ],
)
def test_wrong_use_is_one_sentence(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", *arguments], debug=False) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and words in stderr and stderr.count("\n") == 1


def test_without_the_compilers_it_says_what_to_install(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOOLCHAINS, "sm_87", Toolchain(("nvidia-no-such-wheel", "nvidia/x"), ()))
    assert run_command(["bench", "--static"], debug=False) == 1
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert "nvidia-no-such-wheel; pip install 'minicpm-edge[kernels]'" in stderr and stderr.count("\n") == 1
