"""`edge doctor BUNDLE`: is it for this machine, does it fit, is its engine built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge.bundle import FileEntry, open_bundle
from edge.doctor.finding import Finding
from edge.doctor.report import diagnose
from edge.errors import UsageError
from tests.doctor_samples import NO_BINDINGS, NO_TENSORRT, ORIN_GPU, PLAIN, by_name, nano_jetpack_6, plain_pc, rtx_pc


@pytest.fixture
def for_target(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny bundle, as if exported for a GPU."""

    def make(target: str, *modules: str) -> Path:
        folder = Path(shutil.copytree(tiny_bundle, tmp_path / target))
        manifest = open_bundle(folder).manifest
        for name in modules:
            (folder / name).write_bytes(b"code")
        files = {**manifest.files, **{name: FileEntry("0" * 64, 4) for name in modules}}
        (folder / "manifest.json").write_text(replace(manifest, target=target, files=files).to_json())
        return folder

    return make


def add_engine(bundle: Path, /, **changes: Any) -> None:
    (bundle / "engines").mkdir(exist_ok=True)
    values = {
        "bundle": open_bundle(bundle, verify=False).manifest.key,
        "target": "jetson",
        "tensorrt": "TensorRT 10.3.0",
        "platform": "linux-aarch64",
        "compute_capabilities": ["sm87"],
        "bytes": 6,
        **changes,
    }
    (bundle / "engines" / "jetson-1.engine").write_bytes(b"engine")
    (bundle / "engines" / "jetson-1.json").write_text(json.dumps(values))


def test_a_bundle_for_this_board(for_target: Callable[..., Path], tmp_path: Path) -> None:
    bundle = for_target("jetson", "kernels-sm_87.cubin")
    machine = nano_jetpack_6().machine(tmp_path)
    found = by_name(diagnose(machine, bundle))
    assert found["kernels"] == Finding("kernels", "ok", "kernels-sm_87.cubin")
    assert found["engine"] == Finding("engine", "warning", "none yet", f"edge build {bundle} --target jetson")
    assert found["model in memory"].status == "ok"
    add_engine(bundle)
    assert by_name(diagnose(machine, bundle))["engine"] == Finding("engine", "ok", "jetson-1.engine")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tensorrt": "TensorRT 10.16.2"}, "was built by TensorRT 10.16.2, here is 10.3.0"),
        ({"bundle": "0" * 64}, "is of another export"),
        ({"platform": "linux-x86_64"}, "is for linux-x86_64"),
        ({"compute_capabilities": ["sm110"]}, "is for sm110"),
        ({"bytes": 7}, "is damaged"),
    ],
)
def test_an_engine_of_another_place(
    changes: dict[str, Any], why: str, for_target: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = for_target("jetson", "kernels-sm_87.cubin")
    add_engine(bundle, **changes)
    engine = by_name(diagnose(nano_jetpack_6().machine(tmp_path), bundle))["engine"]
    assert (engine.status, engine.found) == ("warning", f"jetson-1 {why}")
    (bundle / "engines" / "jetson-1.json").write_text("[]")
    assert by_name(diagnose(nano_jetpack_6().machine(tmp_path), bundle))["engine"].found == "jetson-1 is damaged"


def test_a_bundle_for_another_machine(for_target: Callable[..., Path], tmp_path: Path) -> None:
    """The machine is then judged as its own kind: a Jetson is not told to install TensorRT-RTX."""
    diagnosis = diagnose(nano_jetpack_6().machine(tmp_path), for_target("rtx"))
    assert diagnosis.target == "jetson"
    assert not diagnosis.healthy
    assert [f.name for f in diagnosis.findings if f.status == "problem"] == ["bundle"]
    assert by_name(diagnosis)["bundle"].remedy == "edge export CHECKPOINT --out bundle --target jetson"
    on_pc = by_name(diagnose(plain_pc().machine(tmp_path), for_target("jetson")))["bundle"]
    assert (on_pc.status, on_pc.remedy[-11:]) == ("problem", "onnxruntime")


def test_a_bundle_without_code_for_this_gpu(for_target: Callable[..., Path], tmp_path: Path) -> None:
    kernels = by_name(diagnose(rtx_pc().machine(tmp_path), for_target("rtx", "kernels-sm_86.cubin")))["kernels"]
    assert (kernels.status, kernels.found) == ("problem", "none for sm_89, only kernels-sm_86.cubin")
    assert kernels.remedy.endswith("--target rtx")


def test_a_bundle_for_the_cpu_asks_for_no_gpu(tiny_bundle: Path, tmp_path: Path) -> None:
    """Not even on a board whose GPU is broken."""
    recorded = nano_jetpack_6()
    recorded.answers |= {"gpu": NO_BINDINGS, "tensorrt": NO_TENSORRT}
    diagnosis = diagnose(recorded.machine(tmp_path), tiny_bundle)
    assert (diagnosis.target, diagnosis.healthy) == ("onnxruntime", True)
    recorded.fields["available_memory"] = 50 << 20
    assert by_name(diagnose(recorded.machine(tmp_path), tiny_bundle))["model in memory"].status == "problem"


@pytest.mark.parametrize(
    ("total", "free", "status"),
    [(1 << 10, 1 << 10, "problem"), (1 << 30, 1 << 10, "warning"), (1 << 30, 1 << 30, "ok")],
)
def test_whether_weights_and_cache_fit(
    total: int, free: int, status: str, for_target: Callable[..., Path], tmp_path: Path
) -> None:
    recorded = nano_jetpack_6()
    recorded.answers["gpu"] = {**ORIN_GPU, "total_memory": total, "free_memory": free}
    finding = by_name(diagnose(recorded.machine(tmp_path), for_target("jetson")))["model in memory"]
    assert finding.status == status


def test_a_context_that_fits_in_part_is_named(for_target: Callable[..., Path], tmp_path: Path) -> None:
    from edge.bundle import WEIGHTS
    from edge.memory.ledger import page_bytes

    path, recorded = for_target("jetson"), nano_jetpack_6()
    bundle = open_bundle(path, verify=False)
    free = bundle.manifest.files[WEIGHTS].bytes + 3 * sum(page_bytes(bundle.config, bundle.manifest.types))
    recorded.answers["gpu"] = {**ORIN_GPU, "free_memory": free}
    finding = by_name(diagnose(recorded.machine(tmp_path), path))["model in memory"]
    assert (finding.status, finding.remedy.split(",")[0]) == ("warning", f"--context {3 * 64}")


def test_a_damaged_bundle_is_a_finding_and_none_is_wrong_use(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "model.onnx").write_bytes(b"no graph")
    found = by_name(diagnose(PLAIN, bundle))["bundle"]
    assert (found.status, found.remedy) == ("problem", "copy it again or export the bundle again")
    assert "model.onnx is damaged" in found.found
    with pytest.raises(UsageError, match="edge export"):
        diagnose(PLAIN, tmp_path)
