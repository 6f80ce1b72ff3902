"""`edge selftest` on the emulated driver: real cubins, loaded and launched as on a device, and what the user reads."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import open_bundle
from edge.cli.app import run_command
from edge.config import SparseConfig
from edge.cuda import Device, Kernels, open_device
from edge.engine import open_engine
from edge.plan import EngineOptions
from edge.selftest import kernels as selftest
from edge.selftest.kernels import ModelResult, Result, run_model, run_vector
from edge.selftest.model import GOLDEN
from edge.selftest.report import SelftestReport, failure, terminal, to_values
from edge.selftest.vectors import PUBLISHED, ModelKernels, decode_vectors, kernels_of, vectors_for
from plugins.build.cache import ROOT
from plugins.build.nvrtc import cubin
from plugins.build.registry import kernels_for
from plugins.build.sass import read_cubin
from plugins.launch import module_file
from plugins.simt.driver.library import EmulatedDriver
from plugins.vectors import Deviation
from tests.emulated import emulated_gpu
from tests.synthetic import tiny_config, write_hf_checkpoint

ARCHITECTURE = "sm_86"
TINY = ModelKernels(
    tiny_config(hidden_size=128, head_dim=64, num_attention_heads=2, sparse=SparseConfig(topk=8)),
    weights=(4, 64),
    head=(8, 64),
)
NEEDED = kernels_for(TINY.config, TINY.element, TINY.kv_element, TINY.weights, TINY.head)


# A kernel of SwiGLU's name that computes nothing.
IDLE = """#include "plugins/simt/device.h"
struct SwigluArguments { const uint16_t* gate_up; uint16_t* y; int vectors; };
template <class T, int THREADS>
DEVICE void swiglu(const SwigluArguments&) {}
"""


@pytest.fixture
def driver() -> Generator[EmulatedDriver, None, None]:
    with emulated_gpu(ARCHITECTURE, NEEDED) as driver:
        yield driver


@pytest.fixture
def idle_swiglu(driver: EmulatedDriver, tmp_path: Path) -> Generator[str, None, None]:
    """A device whose SwiGLU leaves its output as it was; gives the kernel's symbol."""
    (right,) = (kernel for kernel in NEEDED if kernel.source.startswith("swiglu"))
    (tmp_path / "idle.cu").write_text(IDLE)
    driver.add_kernels([replace(right, source=os.path.relpath(tmp_path / "idle.cu", ROOT / "plugins"))])
    yield right.symbol
    driver.add_kernels([right])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed int4 weights, for RTX GPUs."""
    folder = tmp_path_factory.mktemp("selftest")
    checkpoint = open_checkpoint(write_hf_checkpoint(folder / "checkpoint", TINY.config))
    weights = WeightFormat("w4a16", 64, symmetric=True, head="int8", linear="packed")
    return export_bundle(checkpoint, folder / "tiny", ExportOptions("rtx", weights))


# ---- on the emulated driver ------------------------------------------------------------------------------------


def test_all_vectors_of_a_model_pass_through_the_driver(driver: EmulatedDriver) -> None:
    seen: list[tuple[int, int, str]] = []
    kernels = Kernels(cubin(NEEDED, ARCHITECTURE), open_device())
    result = run_model("tiny", TINY, kernels, lambda *update: seen.append(update))
    assert [r.name for r in result.results] == [vector.name for vector in vectors_for(TINY)]
    assert all(r.deviation.passed for r in result.results)
    assert {symbol for r in result.results for symbol in r.kernels} == {kernel.symbol for kernel in NEEDED}
    assert all(r.seconds is None for r in result.results)  # an emulator has no speed
    assert seen[-1][:2] == (len(result.results),) * 2


def test_a_timed_vector_takes_turns_on_copies_and_leaves_nothing_behind(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "_CACHED_BYTES", 1 << 10)
    monkeypatch.setattr(selftest, "_ROTATED_BYTES", 1 << 20)
    kernels = Kernels(cubin(NEEDED, ARCHITECTURE), open_device())
    vector = next(v for v in vectors_for(TINY) if v.name.startswith("swiglu"))
    size = sum(array.nbytes for array in vector.buffers().values())
    held = driver.counts().bytes
    result = run_vector(vector, kernels, timed=True)
    gc.collect()
    counts = driver.counts()
    assert result.deviation.passed and result.seconds is not None
    assert counts.graph_launches == 8 and counts.launches >= 8 * (1 << 20) // (2 * size)
    assert counts.peak_bytes >= 1 << 19
    assert counts.bytes == held and not counts.graph_execs and not counts.streams and not counts.events


def test_a_kernel_that_computes_nothing_is_found(driver: EmulatedDriver, idle_swiglu: str) -> None:
    kernels = Kernels(cubin(NEEDED, ARCHITECTURE), open_device())
    report = SelftestReport(kernels.device, [run_model("tiny", TINY, kernels)])
    (wrong,) = report.failures
    assert wrong.kernels == (idle_swiglu,) and wrong.deviation.buffer == "y"


# ---- the command -----------------------------------------------------------------------------------------------


def test_a_bundles_kernels_are_those_that_its_vectors_launch(bundle: Path) -> None:
    opened = open_bundle(bundle)
    model = kernels_of(opened.manifest)
    assert model == TINY
    symbols = {launch.kernel.symbol for vector in vectors_for(model) for launch in vector.launches}
    assert read_cubin(opened.file(module_file(ARCHITECTURE)).read_bytes()).keys() == symbols


def test_selftest_of_a_bundle(
    driver: EmulatedDriver, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert run_command(["selftest", str(bundle)], debug=True) == 0
    printed = capsys.readouterr().out
    assert "Emulated GPU (sm_86)" in printed and "emulated here" in printed and "vectors are right" in printed
    assert "GB/s" not in printed and "WRONG" not in printed and "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 80

    assert run_command(["selftest", str(bundle), "--json"], debug=True) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["execution"] == "emulated here" and values["passed"]
    assert {vector["gb_s"] for model in values["models"] for vector in model["vectors"]} == {None}


def test_a_wrong_kernel_ends_in_one_sentence(
    driver: EmulatedDriver, idle_swiglu: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["selftest", str(bundle), "--json"], debug=False) == 1
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    (wrong,) = (v for model in values["models"] for v in model["vectors"] if not v["passed"])
    assert not values["passed"] and wrong["kernels"] == [idle_swiglu] and wrong["error"] is None
    assert printed.err.startswith(
        f"error: {idle_swiglu} on Emulated GPU (sm_86): y of swiglu 5x128 is off by nan where"
    )
    assert "is allowed" in printed.err and printed.err.count("\n") == 1


def test_a_bundle_without_kernels_for_the_device_says_so(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with emulated_gpu("sm_87"):
        assert run_command(["selftest", str(bundle)], debug=False) == 1
        assert "has no kernels for this GPU (sm_87)" in capsys.readouterr().err


def test_without_a_bundle_it_takes_the_kernels_that_the_wheel_has(
    driver: EmulatedDriver, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.selftest.vectors.PUBLISHED", {"Tiny, int4": TINY})
    monkeypatch.setattr("edge.selftest.modules.FOLDER", tmp_path)
    module = cubin(NEEDED, ARCHITECTURE)
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))  # what is compiled now would be found there
    (tmp_path / "Tiny-sm_86.cubin").write_bytes(module)
    assert run_command(["selftest", "--json"], debug=True) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert not (tmp_path / "cache" / "nvrtc").exists()


# ---- the report of a real device -------------------------------------------------------------------------------

ORIN = Device("Orin", "sm_87", 16, 64 << 30, True, (12, 6))
LONGEST = "attend_split 1 at 131072 sparse"


def report_of(device: Device, *deviations: Deviation) -> SelftestReport:
    results = [Result(LONGEST, ("attend_split", "combine"), d, 100_000_000, 0.0008) for d in deviations]
    return SelftestReport(device, [ModelResult("a model", results)])


def test_a_measured_report_has_bandwidths_and_fits_80_columns() -> None:
    report = report_of(ORIN, Deviation("output", 5.4e-4, 3e-3), Deviation("output", 0.25, 3e-3))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal(report))
    text = console.export_text()
    assert "GB/s" in text and " 125" in text and " 800 " in text and "WRONG" in text and "1 of 2 vectors" in text
    assert "emulated" not in text and max(map(len, text.splitlines())) <= 80
    values = to_values(report)
    assert values["execution"] == "measured here"
    assert values["models"][0]["vectors"][0]["gb_s"] == pytest.approx(125)
    json.dumps(values, allow_nan=False)


def test_names_of_all_vectors_fit_the_table() -> None:
    for model in PUBLISHED.values():
        for vector in [*vectors_for(model), *decode_vectors(model, 16)]:
            assert len(vector.name) <= 40, vector.name


def test_a_failure_names_kernel_error_and_tolerance() -> None:
    right, wrong = Deviation("output", 1e-3, 3e-3), Deviation("output", 0.25, 3e-3)
    assert failure(report_of(ORIN, right)) is None
    sentence = failure(report_of(ORIN, right, wrong, wrong))
    assert sentence is not None and sentence.startswith("attend_split, combine on Orin: output of attend_split 1 at")
    assert "off by 2.5e-01 where 3.0e-03 is allowed; 1 more vector is wrong" in sentence


# ---- golden tokens of a bundle ---------------------------------------------------------------------------------


@pytest.fixture
def recorded(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle for the CPU whose tokens were recorded."""
    copy = tmp_path / "recorded"
    shutil.copytree(tiny_bundle, copy)
    assert run_command(["selftest", str(copy), "--record"], debug=True) == 0
    return copy


def test_a_bundle_for_the_cpu_must_give_the_tokens_of_its_record(
    recorded: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((recorded / GOLDEN).read_text())
    assert open_bundle(recorded).manifest.key == open_bundle(tiny_bundle).manifest.key
    # The tokens are the model's likeliest ones, and none was a near tie: by the logits of a run without a cache.
    ids = record["prompt"] + record["tokens"]
    logits = logits_of(recorded, ids)[len(record["prompt"]) - 1 : -1]
    assert logits.argmax(1).tolist() == record["tokens"]
    ordered = np.sort(logits, 1)
    assert (ordered[:, -1] - ordered[:, -2] >= 0.1).all() and 4 <= len(record["tokens"]) <= 16
    capsys.readouterr()
    assert run_command(["selftest", str(recorded), "--json"], debug=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] and said["device"] is None and said["golden"]["expected"] == record["tokens"]

    record["tokens"][2] ^= 1
    (recorded / GOLDEN).write_text(json.dumps(record))
    assert run_command(["selftest", str(recorded)], debug=False) == 1
    printed = capsys.readouterr()
    assert f"golden token 3 of {len(record['tokens'])} is" in printed.err and "ONNX Runtime on the CPU" in printed.out


def test_without_a_record_the_cpu_kernels_run_the_selftest_model(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["selftest", str(tiny_bundle)], debug=True) == 0
    assert "all 32 golden tokens came" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "{}", '{"prompt": [1], "tokens": []}', '{"prompt": [1], "tokens": [320]}', "7"])
def test_a_damaged_record_is_one_sentence(text: str, recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recorded / GOLDEN).write_text(text)
    assert run_command(["selftest", str(recorded)], debug=False) == 1
    assert f"{GOLDEN} is damaged" in capsys.readouterr().err.replace("\n", " ")


def test_a_record_needs_a_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["selftest", "--record"], debug=False) == 2
    assert "--record needs the bundle" in capsys.readouterr().err


def logits_of(bundle: Path, ids: list[int]) -> np.ndarray:
    """[tokens, vocabulary], of the whole sequence at once."""
    engine = open_engine(bundle, EngineOptions(context=256, logits_rows=128))
    return engine.logits(ids, len(ids))
