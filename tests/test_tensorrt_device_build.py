"""Builds on a GPU, as desktops and boards do them: an emulated driver, and TensorRT-RTX's builder in TensorRT's name.

What this shows is our side: device, kernels, key, timings. TensorRT's own builder runs where there is a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_engine import tensorrt
from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.tensorrt import BuildOptions, build_engine
from build_engine.tensorrt_memory import GraphSizes, estimate_memory
from edge.bundle import open_bundle
from edge.engine_file import choose_engine
from edge.errors import EdgeError, UsageError
from edge.tensorrt import load_flavour
from plugins.build.cache import cache_folder
from tests.emulated import emulated_gpu
from tests.synthetic import tiny_config, write_hf_checkpoint

OPTIONS = BuildOptions(max_context=256, chunk=32, batch=2)
CONFIG = tiny_config(hidden_size=128, intermediate_size=256, head_dim=64)
PACKED = WeightFormat("w4a16", 64, symmetric=True, head="int8", linear="packed")
STAND_IN = """
import os
from edge.tensorrt import load_flavour
from plugins.simt.driver.library import device_facts, load_driver

load_driver().reset(device_facts(os.environ["EMULATED_GPU"]))
globals().update(vars(load_flavour("rtx").api))
__version__ = {version!r}
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package `tensorrt`, for this process and its children; timings go to a folder of the test."""
    package = tmp_path / "packages" / "tensorrt" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text(STAND_IN.format(version="10.3.0"))
    timings = tmp_path / "timing"
    timings.mkdir()
    monkeypatch.setenv("EMULATED_GPU", "sm_86")
    monkeypatch.syspath_prepend(str(package.parents[1]))
    monkeypatch.setattr(tensorrt, "cache_folder", lambda kind: timings if kind == "timing" else cache_folder(kind))
    load_flavour.cache_clear()
    yield package
    sys.modules.pop("tensorrt", None)
    load_flavour.cache_clear()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "checkpoint", CONFIG))
    return export_bundle(checkpoint, tmp_path / "bundle", ExportOptions("tensorrt", PACKED))


def test_an_engine_is_built_for_the_gpu_that_is_there(
    bundle: Path, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with emulated_gpu("sm_86"):
        report = build_engine(bundle, OPTIONS)
        assert build_engine(bundle, OPTIONS).cached
    recipe = report.recipe
    assert (recipe.target, recipe.tensorrt, recipe.compute_capabilities) == ("tensorrt", "TensorRT 10.3.0", ("sm86",))
    assert recipe.driver and recipe.plugins and f"driver {recipe.driver}" in report.describe()
    assert choose_engine(open_bundle(bundle), tensorrt=recipe.tensorrt, architecture="sm_86") == report.engine

    # Another GPU makes another engine and has other timings.
    monkeypatch.setenv("EMULATED_GPU", "sm_89")
    with emulated_gpu("sm_89"):
        other = build_engine(bundle, OPTIONS)
    assert other.path != report.path and other.recipe.compute_capabilities == ("sm89",)
    assert len(list((tmp_path / "timing").glob("*.cache"))) == 2


def test_damaged_timings_are_left_aside_with_a_note(bundle: Path, stand_in: Path, tmp_path: Path) -> None:
    with emulated_gpu("sm_86"):
        first = build_engine(bundle, OPTIONS)
        (kept,) = (tmp_path / "timing").iterdir()
        sound = kept.read_bytes()
        kept.write_bytes(b"damaged")
        first.path.with_suffix(".json").unlink()
        again = build_engine(bundle, OPTIONS)
    assert first.notes == () and not again.cached
    assert "damaged" in again.notes[0] and str(kept) in again.describe()
    assert kept.read_bytes() == sound


def test_a_gpu_that_the_bundle_has_no_kernels_for_is_refused(
    bundle: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMULATED_GPU", "sm_87")
    with emulated_gpu("sm_87"), pytest.raises(EdgeError, match=r"no kernels for sm87, only .*sm_120.* --functions"):
        build_engine(bundle, OPTIONS)
    assert not (bundle / "engines").exists()


def test_a_tensorrt_without_all_that_plugins_need_is_refused(bundle: Path, stand_in: Path) -> None:
    stand_in.write_text(STAND_IN.format(version="10.2.0"))
    with pytest.raises(UsageError, match=r"TensorRT 10\.2\.0 is too old .* 10\.3"):
        build_engine(bundle, OPTIONS)


def test_a_board_without_its_tensorrt_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.tensorrt.is_jetson", lambda: True)
    load_flavour.cache_clear()
    with pytest.raises(UsageError, match=r"apt install python3-libnvinfer, .* --system-site-packages"):
        load_flavour("jetson")


def test_a_gpu_that_shares_memory_and_an_old_tensorrt_need_more() -> None:
    sizes = GraphSizes(plain=1 << 30, shared=0, int4=0, packed=1 << 30, nodes=100, function_nodes=1000)
    host = estimate_memory(sizes, plugins=True)
    assert estimate_memory(sizes, plugins=True, streams=False) > host + sizes.weights
    assert estimate_memory(sizes, plugins=True, shares_gpu=True) > host + sizes.weights
