"""TensorRT engines built without a GPU: files, interruptions, memory, refusals."""

from __future__ import annotations

import ctypes
import json
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper

from build_engine import tensorrt, tensorrt_memory
from build_engine.checkpoint import Checkpoint, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.long_context import LongContext
from build_engine.tensorrt import BuildOptions, build_engine
from build_engine.tensorrt_compile import read_timing_cache, write_timing_cache
from edge.alias_library import alias_library
from edge.bundle import GRAPH, MANIFEST, WEIGHTS, FileEntry, hash_file, open_bundle
from edge.errors import EdgeError, UsageError
from edge.tensorrt import load_flavour
from tests.command import edge
from tests.synthetic import tiny_config, write_hf_checkpoint
from tests.tensorrt_samples import CONFIG, FORMATS

OPTIONS = BuildOptions(max_context=256, chunk=32, batch=4)
WEIGHTS_OF = {
    "exact": WeightFormat("exact"),
    "native": WeightFormat("w4a16", 64, symmetric=True, head="exact"),
    "packed": WeightFormat("w4a16", 64, symmetric=True, head="int8", linear="packed"),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_hf_checkpoint(tmp_path_factory.mktemp("hf") / "tiny", CONFIG))


@pytest.fixture
def bundle(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return export_bundle(checkpoint, tmp_path / "bundle", ExportOptions("rtx", FORMATS["exact"]))


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below `folder`, with its contents."""
    paths = folder.rglob("*")
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


# Builds


@pytest.mark.parametrize("weights", FORMATS)
def test_a_build_adds_an_engine_and_leaves_the_bundle_as_it_was(
    checkpoint: Checkpoint, tmp_path: Path, weights: str
) -> None:
    path = export_bundle(checkpoint, tmp_path / "bundle", ExportOptions("rtx", FORMATS[weights]))
    before = listing(path)
    heard: list[tuple[int, int, str]] = []
    report = build_engine(path, OPTIONS, lambda *message: heard.append(message))
    after = listing(path)
    assert {name: after[name] for name in before} == before
    stem = f"engines/rtx-{report.recipe.key[:12]}"
    assert after.keys() - before.keys() == {"engines", f"{stem}.engine", f"{stem}.json"}
    assert not report.cached and report.path == path / f"{stem}.engine"
    assert report.path.read_bytes().count(b"accelerators={sm86 sm89 sm120 }") == 2  # one program a profile

    values = json.loads((path / f"{stem}.json").read_text())
    assert values["bundle"] == open_bundle(path).manifest.key
    assert values["sha256"] == hash_file(report.path) and values["bytes"] == report.path.stat().st_size
    assert [profile["name"] for profile in values["profiles"]] == ["prefill", "decode"]
    assert values["peak_rss_bytes"] > values["peak_anonymous_bytes"] > 100 << 20 and values["seconds"] > 0
    assert values["tensorrt"] == load_flavour("rtx").name
    assert values["plugins"] == "" and "no kernels" in report.notes[0]  # head_dim 16 has none
    added = {"path": str(report.path), "cached": False, "notes": list(report.notes)}
    assert json.loads(json.dumps(report.to_dict())) == values | added

    done = [message[0] for message in heard]
    assert done == sorted(done) and done[0] >= 0 and done[-1] <= heard[-1][1]
    assert "not been run" in report.describe()


def test_sparse_attention_builds_as_its_function(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its settings are constants of the engine; the profiles hold the pools of compressed keys."""
    long_context = LongContext("sparse", {"topk": 2, "window_size": 64, "dense_len": 128})
    options = ExportOptions("rtx", FORMATS["exact"], long_context=long_context)
    report = build_engine(export_bundle(checkpoint, tmp_path / "bundle", options), OPTIONS)
    for profile in report.recipe.profiles:
        assert "sparse_settings" not in profile.shapes
        assert profile.shapes["c1_pool.1"][2][1:] == (2, 4, 16)
    assert report.measured.bytes > 0


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_an_int8_cache_builds_as_its_function(attention: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Codes are TensorRT's int8, which it neither widens nor takes for weights to dequantise."""
    sparse = {"topk": 2, "window_size": 64, "dense_len": 128} if attention == "sparse" else {}
    options = ExportOptions("rtx", FORMATS["exact"], long_context=LongContext(attention, sparse), kv="int8")
    path = export_bundle(checkpoint, tmp_path / "bundle", options)
    assert open_bundle(path).manifest.types["kv"] == "int8"
    report = build_engine(path, replace(OPTIONS, compute_capabilities=("sm86",)))
    for profile in report.recipe.profiles:
        assert profile.shapes["kv_pool.1"][2][1:] == (2, 2, 64, 16)
        assert profile.shapes["kv_scales.1"][2][1:] == (2, 2, 64)
    assert report.measured.bytes > 0


def test_an_intact_engine_is_kept_and_a_damaged_one_built_again(bundle: Path) -> None:
    first = build_engine(bundle, OPTIONS)
    second = build_engine(bundle, OPTIONS, lambda *message: pytest.fail("compiled again"))
    assert second.cached and replace(second, cached=False) == first

    built = first.path.read_bytes()
    first.path.write_bytes(bytes([built[0] ^ 1]) + built[1:])
    third = build_engine(bundle, OPTIONS)
    assert not third.cached and third.measured.sha256 == hash_file(first.path)
    # TensorRT-RTX numbers a few internal things by memory address, so some bytes in a thousand may change.
    again = np.frombuffer(first.path.read_bytes(), np.uint8)
    assert np.mean(again != np.frombuffer(built, np.uint8)) < 0.001

    first.path.with_suffix(".json").unlink()
    assert not build_engine(bundle, OPTIONS).cached


def test_an_engine_of_another_recipe_has_another_file(bundle: Path) -> None:
    every = build_engine(bundle, replace(OPTIONS, compute_capabilities=("sm86", "sm120")))
    narrow = build_engine(bundle, replace(OPTIONS, compute_capabilities=("sm89",)))
    longer = build_engine(bundle, replace(OPTIONS, batch=5))
    assert len({every.path, narrow.path, longer.path}) == len(list((bundle / "engines").glob("*.engine"))) == 3
    assert b"sm120" in every.path.read_bytes() and b"sm120" not in narrow.path.read_bytes()


def test_smollm2_builds_with_int4_weights(smollm2: Checkpoint, tmp_path: Path) -> None:
    path = export_bundle(smollm2, tmp_path / "bundle", ExportOptions("rtx", FORMATS["w4a16"]))
    measured = build_engine(path).measured
    print(f"\nSmolLM2 w4a16: {measured.seconds:.1f} s, {measured.peak_rss_bytes / 2**20:.0f} MiB peak")
    stored = open_bundle(path).manifest.files[WEIGHTS].bytes
    assert stored < measured.bytes < 1.5 * stored  # float16 copies of the projections would double it


# Interruptions


def test_an_exception_of_the_progress_callback_stops_the_build(bundle: Path) -> None:
    before = listing(bundle)

    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(bundle, OPTIONS, stop)
    assert listing(bundle) == before
    assert not psutil.Process().children()


def test_ctrl_c_at_the_command_line_leaves_nothing(bundle: Path) -> None:
    before = listing(bundle)
    edge = [sys.executable, "-c", "from edge.cli import main; main()"]
    command = [*edge, "build", str(bundle)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    while not (bundle / "engines").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1]
    assert process.returncode != 0
    assert listing(bundle) == before


def test_ctrl_c_while_the_folder_is_made_leaves_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(bundle)

    def interrupted(path: Path, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engine(bundle, OPTIONS)
    assert listing(bundle) == before


def test_a_compiler_that_dies_is_reported(bundle: Path) -> None:
    before = listing(bundle)

    def kill(signal_number: int) -> Callable[[int, int, str], None]:
        return lambda *message: psutil.Process().children()[0].send_signal(signal_number)

    with pytest.raises(EdgeError, match="lack of memory"):
        build_engine(bundle, OPTIONS, kill(signal.SIGKILL))
    with pytest.raises(EdgeError, match="SIGABRT"):
        build_engine(bundle, OPTIONS, kill(signal.SIGABRT))
    assert listing(bundle) == before


def test_two_builds_of_one_bundle_do_not_mix(bundle: Path) -> None:
    errors: list[str] = []

    def build_again(*message: object) -> None:
        if not errors:
            with pytest.raises(EdgeError) as caught:
                build_engine(bundle, OPTIONS)
            errors.append(str(caught.value))

    report = build_engine(bundle, OPTIONS, build_again)
    assert "another build" in errors[0]
    assert hash_file(report.path) == report.measured.sha256


def test_what_a_killed_build_left_is_cleared_away(bundle: Path) -> None:
    (bundle / "engines").mkdir()
    leftover = bundle / "engines" / ".rtx-0123456789ab.engine.partial"
    leftover.write_bytes(b"half an engine")
    build_engine(bundle, OPTIONS)
    assert not leftover.exists()


# Memory


def test_a_build_that_cannot_fit_is_refused_before_it_starts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(bundle)
    monkeypatch.setattr(tensorrt_memory, "available_memory", lambda: 100 << 20)
    monkeypatch.setattr(tensorrt_memory, "available_swap", lambda: 28 << 20)
    with pytest.raises(EdgeError, match=r"needs about 0\.\d+ GiB and 0\.12 GiB are free; close .*swap.*w4a16"):
        build_engine(bundle, OPTIONS, lambda *message: pytest.fail("started"))
    assert listing(bundle) == before

    with pytest.raises(EdgeError, match=r"needs about .*--memory allows 0\.10 GiB; give --memory \d+MiB"):
        build_engine(bundle, replace(OPTIONS, memory=100 << 20), lambda *message: pytest.fail("started"))
    assert listing(bundle) == before


def test_float16_weights_are_told_of_int4_too(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export_bundle(checkpoint, tmp_path / "bundle", ExportOptions("rtx", WeightFormat("fp16")))
    monkeypatch.setattr(tensorrt_memory, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr(tensorrt_memory, "available_swap", lambda: 0)
    with pytest.raises(EdgeError, match="export with --weights w4a16"):
        build_engine(path, OPTIONS, lambda *message: pytest.fail("started"))


def test_the_memory_that_a_refusal_asks_for_is_enough(bundle: Path) -> None:
    run = edge("build", bundle, "--max-context", "256", "--memory", "1MiB")
    asked = re.search(rb"give --memory (\d+MiB)", run.stderr)
    assert run.returncode == 1 and run.stderr.count(b"\n") == 1 and asked is not None
    run = edge("build", bundle, "--max-context", "256", "--memory", asked[1].decode())
    assert run.returncode == 0, run.stderr


def test_a_build_that_outgrows_its_memory_is_stopped(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(bundle)
    monkeypatch.setattr(tensorrt, "estimate_memory", lambda *_, **__: 0)
    with pytest.raises(EdgeError, match=r"stopped: it takes more than the 0\.12 GiB of --memory"):
        build_engine(bundle, replace(OPTIONS, memory=120 << 20))
    assert listing(bundle) == before
    assert not psutil.Process().children()

    free = iter([1 << 40] * 5)
    monkeypatch.setattr(tensorrt_memory, "available_memory", lambda: next(free, 0))
    monkeypatch.setattr(tensorrt_memory, "available_swap", lambda: 0)
    with pytest.raises(EdgeError, match=r"stopped: it has .* and the machine has no more"):
        build_engine(bundle, OPTIONS)
    assert listing(bundle) == before


@pytest.mark.parametrize(
    ("weights", "functions"), [("exact", False), ("native", False), ("packed", False), ("exact", True)]
)
def test_the_estimate_is_near_and_not_below(tmp_path: Path, weights: str, functions: bool) -> None:
    """A model whose weights outweigh the compiler."""
    config = tiny_config(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        head_dim=64,
        num_hidden_layers=4,
        vocab_size=32000,
        max_position_embeddings=1024,
    )
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "hf", config))
    path = export_bundle(checkpoint, tmp_path / "bundle", ExportOptions("rtx", WEIGHTS_OF[weights]))
    needed = tensorrt_memory.estimate_memory(tensorrt_memory.graph_sizes(path / GRAPH), plugins=not functions)
    measured = build_engine(path, BuildOptions(plugins=not functions)).measured.peak_anonymous_bytes
    print(f"\n{weights}, functions {functions}: {needed >> 20} MiB estimated, {measured >> 20} measured")
    assert measured <= needed <= 1.4 * measured


# Timings of builds on a GPU


def test_timings_are_kept_whole_and_damaged_ones_ignored(tmp_path: Path) -> None:
    path = tmp_path / "any.cache"
    assert read_timing_cache(path) == (b"", "")
    write_timing_cache(path, b"timings")
    assert read_timing_cache(path) == (b"timings", "") and list(tmp_path.iterdir()) == [path]
    stored = path.read_bytes()
    for damaged in (stored[:-1], stored + b"x", stored[:20], bytes([stored[0] ^ 1]) + stored[1:]):
        path.write_bytes(damaged)
        data, note = read_timing_cache(path)
        assert data == b"" and "damaged" in note and str(path) in note
    path.unlink()
    path.mkdir()
    assert read_timing_cache(path)[0] == b"" and "cannot be read" in read_timing_cache(path)[1]


# Refusals


def test_a_full_disk_is_one_sentence_and_leaves_nothing(bundle: Path) -> None:
    before = listing(bundle)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(EdgeError, match=r"engine to .*engines failed after \d+ MiB: .*free space"):
            build_engine(bundle, OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(bundle) == before


def test_a_folder_that_cannot_be_written_is_named(bundle: Path) -> None:
    (bundle / "engines").write_text("in the way")
    with pytest.raises(EdgeError, match=r"cannot write in .*engines"):
        build_engine(bundle, OPTIONS)


def test_errors_of_tensorrt_reach_the_user(bundle: Path) -> None:
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    model.graph.node.append(helper.make_node("NonZero", ["logits"], ["where"], name="data_dependent"))
    model.graph.output.append(helper.make_tensor_value_info("where", onnx.TensorProto.INT64, [2, None]))
    manifest, graph = open_bundle(bundle).manifest, bundle / GRAPH
    graph.write_bytes(model.SerializeToString())
    entry = FileEntry(hash_file(graph), graph.stat().st_size)
    (bundle / MANIFEST).write_text(replace(manifest, files={**manifest.files, GRAPH: entry}).to_json())
    before = listing(bundle)
    with pytest.raises(EdgeError, match=r"TensorRT-RTX \S+ cannot read .*NonZero.*data_dependent"):
        build_engine(bundle, OPTIONS)
    assert listing(bundle) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (BuildOptions("jetson"), "exported for rtx; export .*--target jetson"),
        (BuildOptions(max_context=257), "--max-context 257 .* limit of 256"),
        (BuildOptions(compute_capabilities=("sm87",)), "'sm87'; choose from .*sm89"),
    ],
)
def test_wrong_options_are_refused(bundle: Path, options: BuildOptions, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_engine(bundle, options)


@pytest.mark.parametrize("name", ["max_context", "chunk", "batch"])
def test_sizes_start_at_one(name: str) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        replace(OPTIONS, **{name: 0})
    with pytest.raises(UsageError, match="--verify is -1"):
        BuildOptions(verify=-1)
    with pytest.raises(UsageError, match="--verify is 66; it can be at most 65: a tree's root and 64 drafted tokens"):
        BuildOptions(verify=66)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'tpu'; engines are built for rtx, tensorrt, jetson"):
        BuildOptions("tpu")


def test_targets_whose_tensorrt_is_not_here_say_what_to_do(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for target, words in (("jetson", "on the board"), ("tensorrt", "pip install tensorrt")):
        path = export_bundle(checkpoint, tmp_path / target, ExportOptions(target, FORMATS["exact"]))
        with pytest.raises(UsageError, match=words):
            build_engine(path)
        assert not (path / "engines").exists()


def test_a_bundle_for_another_executor_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = export_bundle(checkpoint, tmp_path / "cpu", ExportOptions("onnxruntime", FORMATS["exact"]))
    with pytest.raises(UsageError, match="--target rtx"):
        build_engine(path)


def test_a_missing_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    load_flavour.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'minicpm-edge\[rtx\]'"):
        build_engine(bundle)


# Plugins


def test_an_alias_library_answers_to_its_name_with_what_it_depends_on(tmp_path: Path) -> None:
    name = "libedge_alias_of_libm.so"
    with pytest.raises(OSError):
        ctypes.CDLL(name)
    (tmp_path / "any.so").write_bytes(alias_library(name, "libm.so.6"))
    ctypes.CDLL(str(tmp_path / "any.so"))
    (tmp_path / "any.so").unlink()
    hypot = ctypes.CDLL(name).hypot
    hypot.restype, hypot.argtypes = ctypes.c_double, [ctypes.c_double, ctypes.c_double]
    assert hypot(3, 4) == 5
