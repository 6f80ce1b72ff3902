"""Exporting is all or nothing, streams its weights, and gives the same bytes every time."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat, choose_format
from edge.bundle import open_bundle
from edge.errors import EdgeError, UsageError
from tests.synthetic import tiny_config, write_gguf_checkpoint, write_hf_checkpoint

EXACT = ExportOptions(weights=WeightFormat("exact"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_hf_checkpoint(tmp_path / "checkpoint", tiny_config())


def leftovers(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {"checkpoint"}


def set_weight(checkpoint: Path, name: str, value: float) -> None:
    """Overwrite the first element of one bfloat16 tensor where it lies in the file."""
    tensor = open_checkpoint(checkpoint).tensors[name].read(slice(None))
    old, new = tensor.tobytes(), np.array(tensor)
    new.reshape(-1)[0] = value
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new.tobytes()))


@pytest.mark.parametrize("options", [EXACT, ExportOptions(), ExportOptions(weights=WeightFormat(symmetric=True))])
def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path, tmp_path: Path, options: ExportOptions) -> None:
    bundles = [open_bundle(export_bundle(open_checkpoint(checkpoint), tmp_path / name, options)) for name in "ab"]
    assert bundles[0].manifest == bundles[1].manifest


def test_the_key_depends_on_what_changes_results(checkpoint: Path, tmp_path: Path) -> None:
    formats = [WeightFormat("exact"), WeightFormat(), WeightFormat(group_size=64), WeightFormat(head="int4")]
    bundles = [
        export_bundle(open_checkpoint(checkpoint), tmp_path / str(i), ExportOptions(weights=weights))
        for i, weights in enumerate(formats)
    ]
    assert len({open_bundle(bundle).manifest.key for bundle in bundles}) == len(formats)


def test_an_existing_folder_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="exists"):
            export_bundle(open_checkpoint(checkpoint), out, ExportOptions(overwrite=overwrite))
    assert (out / "mine.txt").read_text() == "precious"


def test_a_failing_overwrite_keeps_the_old_bundle(checkpoint: Path, tmp_path: Path) -> None:
    out = export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT)
    key = open_bundle(out).manifest.key
    set_weight(checkpoint, "model.layers.1.mlp.down_proj.weight", float("nan"))
    with pytest.raises(EdgeError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        export_bundle(open_checkpoint(checkpoint), out, ExportOptions(overwrite=True))
    assert open_bundle(out).manifest.key == key
    assert leftovers(tmp_path) == {"out"}


def test_overwriting_replaces_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    out = export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT)
    export_bundle(open_checkpoint(checkpoint), out, ExportOptions(overwrite=True))
    assert open_bundle(out).manifest.weights["kind"] == "w4a16"
    assert leftovers(tmp_path) == {"out"}


def test_a_weight_too_large_for_float16_is_named(checkpoint: Path, tmp_path: Path) -> None:
    set_weight(checkpoint, "model.layers.0.self_attn.o_proj.weight", 1e6)
    options = ExportOptions("rtx", WeightFormat("exact"))
    with pytest.raises(EdgeError, match=r"o_proj\.weight: the value 9.*65504"):
        export_bundle(open_checkpoint(checkpoint), tmp_path / "out", options)
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize("out", ["nowhere/out", "checkpoint/config.json/out"])
def test_a_missing_parent_is_named(checkpoint: Path, tmp_path: Path, out: str) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        export_bundle(open_checkpoint(checkpoint), tmp_path / out, EXACT)


def test_two_exports_to_one_place(checkpoint: Path, tmp_path: Path) -> None:
    with (tmp_path / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EdgeError, match="another export is writing"):
            export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT)


def test_formats_are_chosen_by_the_checkpoint(tmp_path: Path) -> None:
    config = tiny_config()
    hf = open_checkpoint(write_hf_checkpoint(tmp_path / "hf", config))
    q4 = open_checkpoint(write_gguf_checkpoint(tmp_path / "q4.gguf", config, quant="Q4_1"))
    assert choose_format(hf, "onnxruntime", "w4a16") == WeightFormat("w4a16", 64, True, "int8")
    assert choose_format(q4, "onnxruntime", "w4a16") == WeightFormat("w4a16", 32, False, "int8")
    assert choose_format(q4, "rtx", "w4a16") == WeightFormat("w4a16", 64, True, "exact")
    assert choose_format(q4, "onnxruntime", "w4a16", 128, True, "int4") == WeightFormat("w4a16", 128, True, "int4")


def start_slow_export(checkpoint: Path, out: Path, **limits: int) -> subprocess.Popen[str]:
    """`edge export` in a process of its own that says so and then waits when it is half done."""
    code = f"""
import sys, time, resource
for name, value in {limits!r}.items():
    resource.setrlimit(getattr(resource, name), (value, value))
import build_engine.weights_file as w
add = w.WeightsFile.add
def slow(self, name, *arguments):
    if "layers.1.post" in name:
        print("halfway", flush=True)
        time.sleep(60)
    return add(self, name, *arguments)
if not {limits!r}:
    w.WeightsFile.add = slow
sys.argv = ["edge", "export", {str(checkpoint)!r}, "--out", {str(out)!r}, "--weights", "exact"]
from edge.cli import main
main()
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    process = start_slow_export(checkpoint, tmp_path / "out")
    assert process.stdout is not None
    assert process.stdout.readline() == "halfway\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (1, "interrupted\n")
    assert leftovers(tmp_path) == set()


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(checkpoint: Path, tmp_path: Path) -> None:
    process = start_slow_export(checkpoint, tmp_path / "out")
    assert process.stdout is not None
    assert process.stdout.readline() == "halfway\n"
    process.kill()
    process.wait()
    left = leftovers(tmp_path)
    assert "out" not in left
    for name in left - {".out.lock"}:
        with pytest.raises(UsageError):
            open_bundle(tmp_path / name)
    export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT)
    assert leftovers(tmp_path) == {"out"}


def test_a_full_disk_is_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    process = start_slow_export(checkpoint, tmp_path / "out", RLIMIT_FSIZE=100_000)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith("error: writing ")
    assert stderr.count("\n") == 1
    assert leftovers(tmp_path) == set()


def test_an_unwritable_parent_is_named(checkpoint: Path) -> None:
    with pytest.raises(EdgeError, match="cannot write in /proc"):  # where even root makes no files
        export_bundle(open_checkpoint(checkpoint), Path("/proc/out"), EXACT)


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    """Resident memory, mapped pages included, over what the process held before the export."""
    config = tiny_config(hidden_size=1024, intermediate_size=4096, head_dim=64, num_hidden_layers=6, vocab_size=65536)
    folder = tmp_path / "checkpoint"
    write_hf_checkpoint(folder, config)
    size = (folder / "model.safetensors").stat().st_size
    code = f"""
import resource
from pathlib import Path
from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_bundle(open_checkpoint(Path({str(folder)!r})), Path({str(tmp_path / "out")!r}), ExportOptions())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert size > 200 << 20
    # float32 work on 64 MiB chunks: about 300 MiB whatever the model's size, mapped pages included.
    assert grown < 400 << 20


def test_progress_ends_at_the_total(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT, lambda d, t, name: calls.append((d, t)))
    totals = {total for _, total in calls}
    assert len(totals) == 1
    assert [done for done, _ in calls] == list(range(1, totals.pop() + 1))
