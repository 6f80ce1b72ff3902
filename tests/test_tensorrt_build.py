"""TensorRT engines built without a GPU: files, interruptions, refusals, plugins."""

from __future__ import annotations

import ctypes
import json
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

from build_engine.checkpoint import Checkpoint, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.long_context import LongContext
from build_engine.tensorrt import BuildOptions, build_engine
from build_engine.tensorrt_flavour import alias_library, load_flavour
from edge.bundle import GRAPH, MANIFEST, WEIGHTS, FileEntry, hash_file, open_bundle
from edge.errors import EdgeError, UsageError
from tests.synthetic import write_hf_checkpoint
from tests.tensorrt_samples import CONFIG, FORMATS

OPTIONS = BuildOptions(max_context=256, chunk=32, batch=4)


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
    assert values["peak_rss_bytes"] > 100 << 20 and values["seconds"] > 0
    assert values["tensorrt"] == load_flavour("rtx").name
    assert json.loads(json.dumps(report.to_dict())) == values | {"path": str(report.path), "cached": False}

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
        assert profile.shapes["c1_pool.1"][2] == (16, 2, 4, 16)
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


# Refusals


def test_a_full_disk_is_one_sentence_and_leaves_nothing(bundle: Path) -> None:
    before = listing(bundle)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(EdgeError, match=r"engine of \d+ MiB to .*engines failed: .*free space"):
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
        (BuildOptions("tpu"), "unknown target 'tpu'"),
        (BuildOptions("jetson"), "on the board"),
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


PLUGIN_BUILD = """
import numpy as np
from onnx import TensorProto, helper
from build_engine.tensorrt_flavour import load_flavour
trt = load_flavour("rtx").api

class Twice(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
    def __init__(self):
        for base in Twice.__bases__:
            base.__init__(self)
        self.plugin_name, self.plugin_version, self.plugin_namespace, self.num_outputs = "Twice", "1", "", 1
    def get_capability_interface(self, kind): return self
    def get_output_data_types(self, types): return types
    def get_output_shapes(self, inputs, shape_inputs, builder): return [trt.DimsExprs(inputs[0])]
    def get_fields_to_serialize(self): return trt.PluginFieldCollection([])
    def configure_plugin(self, inputs, outputs): pass
    def supports_format_combination(self, position, tensors, count): return True
    def get_valid_tactics(self): return []
    def attach_to_context(self, context): return Twice()
    def clone(self): return Twice()

class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        super().__init__()
        self.name, self.plugin_version, self.plugin_namespace = "Twice", "1", ""
        self.field_names = trt.PluginFieldCollection([])
    def create_plugin(self, name, fields, phase): return Twice()

creator = Creator()
trt.get_plugin_registry().register_creator(creator, "")
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [8])
node = helper.make_node("Twice", ["x"], ["y"], domain="edge", plugin_namespace="", plugin_version="1")
graph = helper.make_graph([node], "g", [value("x")], [value("y")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("edge", 1)])
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
assert [network.get_layer(i).type for i in range(network.num_layers)] == [trt.LayerType.PLUGIN_V3]
print(builder.build_serialized_network(network, builder.create_builder_config()).nbytes)
"""


def test_a_network_with_a_plugin_parses_and_builds() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PLUGIN_BUILD], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0
