"""Exporting is all or nothing, streams its weights, and gives the same bytes every time."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import re
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from build_engine import weight_rows
from build_engine.checkpoint import expected_shapes, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat, choose_format, plugin_kernels
from edge.bundle import open_bundle
from edge.config import ModelConfig
from edge.errors import EdgeError, UsageError
from plugins.build.embed import kernel_modules
from tests.synthetic import hf_config, tiny_config, write_gguf_checkpoint, write_hf_checkpoint

EXACT = ExportOptions(weights=WeightFormat("exact"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_hf_checkpoint(tmp_path / "checkpoint", tiny_config())


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"checkpoint"}


def set_weight(checkpoint: Path, name: str, value: float, row: int = 0, column: int = 0) -> None:
    """Overwrite one element of a bfloat16 matrix where it lies in the file."""
    tensor = open_checkpoint(checkpoint).tensors[name].read(slice(None))
    old, new = tensor.tobytes(), np.array(tensor)
    new[row, column] = value
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


def test_a_damaged_weight_is_named_with_its_row(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where chunks of rows are read: the row counts from the tensor's beginning."""
    monkeypatch.setattr(weight_rows, "CHUNK_BYTES", 4 * 64 * 3)
    tensor = open_checkpoint(checkpoint).tensors["model.embed_tokens.weight"]
    set_weight(checkpoint, tensor.name, float("nan"), row=tensor.shape[0] - 1, column=3)
    words = rf"tensor model\.embed_tokens\.weight holds nan at row {tensor.shape[0] - 1}, column 3"
    with pytest.raises(EdgeError, match=words):
        export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT)


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
    with pytest.raises(UsageError, match=f"{(tmp_path / out).parent} is no folder"):
        export_bundle(open_checkpoint(checkpoint), tmp_path / out, EXACT)


@pytest.mark.parametrize("out", ["checkpoint/config.json", "/"])
def test_what_is_no_bundle_is_never_replaced(checkpoint: Path, tmp_path: Path, out: str) -> None:
    with pytest.raises(UsageError, match="is not a bundle"):
        export_bundle(open_checkpoint(checkpoint), tmp_path / out, ExportOptions(overwrite=True))


def test_a_link_to_a_bundle_stays_a_link(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    link = tmp_path / "current"
    link.symlink_to("versions/1")  # to a place that is yet to come
    for options in (EXACT, ExportOptions(overwrite=True)):
        export_bundle(open_checkpoint(checkpoint), link, options)
        assert link.is_symlink()
        assert open_bundle(link).manifest.weights["kind"] == options.weights.kind
    assert leftovers(tmp_path) == {"versions", "current"}
    assert leftovers(tmp_path / "versions") == {"1"}


def test_the_name_is_the_folders_even_from_within(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint)
    out = export_bundle(open_checkpoint(Path(".")), Path("../out"), EXACT)
    assert open_bundle(out).manifest.name == "checkpoint"


@pytest.mark.parametrize("name", ["a[b]*?", "ünï cöde", "-x", "x" * 200])
def test_odd_names_are_names(checkpoint: Path, tmp_path: Path, name: str) -> None:
    for _ in range(2):
        export_bundle(open_checkpoint(checkpoint), tmp_path / name, ExportOptions(overwrite=True))
    assert leftovers(tmp_path) == {name}


def test_the_umask_decides_who_may_read(checkpoint: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        out = export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT)
    finally:
        os.umask(old)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o640}


def test_two_exports_to_one_place(checkpoint: Path, tmp_path: Path) -> None:
    with (tmp_path / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EdgeError, match="another export is writing"):
            export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT)
    # The lock's file alone, left by one that was killed, is no lock.
    export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT)
    assert leftovers(tmp_path) == {"out"}


def test_formats_are_chosen_by_the_checkpoint(tmp_path: Path) -> None:
    config = tiny_config()
    hf = open_checkpoint(write_hf_checkpoint(tmp_path / "hf", config))
    q4 = open_checkpoint(write_gguf_checkpoint(tmp_path / "q4.gguf", config, quant="Q4_1"))
    assert choose_format(hf, "onnxruntime", "w4a16") == WeightFormat("w4a16", 64, True, "int8")
    assert choose_format(q4, "onnxruntime", "w4a16") == WeightFormat("w4a16", 32, False, "int8")
    assert choose_format(q4, "onnxruntime", "w4a16", 128, True, "int4") == WeightFormat("w4a16", 128, True, "int4")


@pytest.mark.parametrize("target", ["rtx", "tensorrt", "jetson"])
def test_tensorrt_gets_packed_weights_where_there_are_kernels(tmp_path: Path, target: str) -> None:
    config = tiny_config(head_dim=64, hidden_size=128, intermediate_size=256)
    known = open_checkpoint(write_gguf_checkpoint(tmp_path / "q4.gguf", config, quant="Q4_1"))
    packed = WeightFormat("w4a16", 64, True, "int8", "packed")
    assert choose_format(known, target, "w4a16") == packed
    assert choose_format(known, target, "w4a16", 128, head="exact") == dataclasses.replace(
        packed, group_size=128, head="exact"
    )
    native = WeightFormat("w4a16", 64, True, "exact", "native")
    assert choose_format(known, target, "w4a16", linear="native") == native
    assert choose_format(known, target, "exact") == dataclasses.replace(native, kind="exact")
    # No attention kernel has a head_dim of 16, and no linear one 160 inputs.
    for sizes in ({}, {"head_dim": 64, "hidden_size": 128, "intermediate_size": 160}):
        unknown = open_checkpoint(write_hf_checkpoint(tmp_path / str(len(sizes)), tiny_config(**sizes)))
        assert choose_format(unknown, target, "w4a16") == native


def start_export(checkpoint: Path, out: Path, patch: str, *options: str) -> subprocess.Popen[str]:
    """`edge export` in a process of its own, after `patch` has set the scene there."""
    arguments = ["edge", "export", str(checkpoint), "--out", str(out), "--weights", "exact", *options]
    code = f"import os, resource, signal, sys, time\n{patch}\nsys.argv = {arguments!r}\n"
    code += "from edge.cli import main\nmain()"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


WAIT_HALFWAY = """
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
from build_engine.weights_file import WeightsFile
add = WeightsFile.add
def slow(self, name, *arguments):
    if "layers.1.post" in name:
        print("halfway", flush=True)
        time.sleep(60)
    return add(self, name, *arguments)
WeightsFile.add = slow
"""
KILL_BETWEEN_RENAMES = """
rename = os.rename
def kill_after(*arguments):
    rename(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = kill_after
"""


@pytest.fixture
def halfway(checkpoint: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An export that has written half of its weights and waits."""
    process = start_export(checkpoint, tmp_path / "out", WAIT_HALFWAY)
    assert process.stdout is not None
    assert process.stdout.readline() == "halfway\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_export_leaves_nothing(
    halfway: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    halfway.send_signal(number)
    _, stderr = halfway.communicate(timeout=30)
    assert (halfway.returncode, stderr) == (1, "interrupted\n")
    assert leftovers(tmp_path) == set()


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(
    halfway: subprocess.Popen[str], checkpoint: Path, tmp_path: Path
) -> None:
    halfway.kill()
    halfway.wait()
    left = leftovers(tmp_path)
    assert "out" not in left
    for name in left - {".out.lock"}:
        with pytest.raises(UsageError):
            open_bundle(tmp_path / name)
    export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT)
    assert leftovers(tmp_path) == {"out"}


def test_of_two_exports_to_one_place_the_second_is_refused(
    halfway: subprocess.Popen[str], checkpoint: Path, tmp_path: Path
) -> None:
    before = leftovers(tmp_path)
    with pytest.raises(EdgeError, match="another export is writing"):
        export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT)
    assert leftovers(tmp_path) == before
    export_bundle(open_checkpoint(checkpoint), tmp_path / "other", EXACT)


def test_an_overwrite_killed_at_the_worst_moment_loses_no_bundle(checkpoint: Path, tmp_path: Path) -> None:
    """Between the renames the old bundle is beside its place: the next export puts it back before all else."""
    out = export_bundle(open_checkpoint(checkpoint), tmp_path / "out", ExportOptions())
    process = start_export(checkpoint, out, KILL_BETWEEN_RENAMES, "--overwrite")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(UsageError, match="already exists"):
        export_bundle(open_checkpoint(checkpoint), out, EXACT)
    assert open_bundle(out).manifest.weights["kind"] == "w4a16"
    assert leftovers(tmp_path) == {"out"}


@pytest.mark.parametrize("room", [1, 100_000])
def test_a_full_disk_is_one_sentence(checkpoint: Path, tmp_path: Path, room: int) -> None:
    """A limit on the size of files fails in the same calls as a disk without space."""
    patch = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))"
    process = start_export(checkpoint, tmp_path / "out", patch)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r"error: writing .*/out failed \(File too large\); \d+ MiB are free: .*\n", stderr)
    assert stdout == ""
    assert leftovers(tmp_path) == set()


def test_an_unwritable_parent_is_named(checkpoint: Path) -> None:
    with pytest.raises(EdgeError, match="writing /proc/out failed"):  # where even root makes no files
        export_bundle(open_checkpoint(checkpoint), Path("/proc/out"), EXACT)


def write_hollow_checkpoint(folder: Path, config: ModelConfig) -> int:
    """A checkpoint of bfloat16 zeros that take no room on disk -> bytes of its weights."""
    header: dict[str, object] = {}
    size = 0
    for name, shape in expected_shapes(config):
        end = size + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return size


PACKED = ExportOptions("jetson", WeightFormat("w4a16", 64, symmetric=True, head="int8", linear="packed"))


@pytest.mark.parametrize("options", [ExportOptions(), PACKED], ids=["onnxruntime", "packed"])
def test_memory_does_not_grow_with_the_weights(tmp_path: Path, options: ExportOptions) -> None:
    """Peak resident memory over what the process held before; pages of the mapped file count while they are mapped."""
    config = tiny_config(hidden_size=1024, intermediate_size=4096, head_dim=64, num_hidden_layers=18, vocab_size=65536)
    size = write_hollow_checkpoint(tmp_path / "checkpoint", config)
    if options.target == "jetson":
        kernel_modules(plugin_kernels(config, options.weights), "jetson")  # compiled before, into the cache
    code = f"""
import resource
from pathlib import Path
from build_engine.checkpoint import expected_shapes, open_checkpoint
from build_engine.export import ExportOptions, LongContext, WeightFormat, export_bundle
options = {options}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_bundle(open_checkpoint(Path({str(tmp_path / "checkpoint")!r})), Path({str(tmp_path / "out")!r}), options)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert size > 550 << 20
    # Some copies of one chunk of 64 MiB float32: about 280 MiB, whatever the model's size.
    assert grown < 400 << 20


def test_progress_ends_at_the_total(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    export_bundle(open_checkpoint(checkpoint), tmp_path / "out", EXACT, lambda d, t, name: calls.append((d, t)))
    totals = {total for _, total in calls}
    assert len(totals) == 1
    assert [done for done, _ in calls] == list(range(1, totals.pop() + 1))
