"""TensorRT-RTX engines with our plugins inside, judged by the network's layers and by the engine's own plain text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import onnx
import pytest

from build_engine.checkpoint import Checkpoint, LazyTensor, expected_shapes, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.tensorrt import BuildOptions, BuildReport, build_engine
from edge.bundle import GRAPH, open_bundle
from edge.config import LongRope, ModelConfig, SparseConfig
from edge.engine_file import choose_engine, plugin_hash
from edge.errors import EdgeError, UsageError
from edge.models import MINICPM4_05B
from edge.tensorrt import load_flavour
from tests.synthetic import tiny_config, write_hf_checkpoint

CONTEXT = 16384
OPTIONS = BuildOptions(chunk=512, batch=4)
# A float16 for each new token and each of the context: one head's scores. TensorRT's own scratch is 8 MB.
SCORES = (512 + 4) * CONTEXT * 2
DENSE = tiny_config(
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=CONTEXT,
)
SPARSE = replace(
    DENSE,
    long_rope=LongRope((1.0,) * 32, tuple(1.0 + i / 4 for i in range(32)), original_max_position_embeddings=64),
    sparse=SparseConfig(topk=16, window_size=512, dense_len=1024),
)
PACKED = WeightFormat("w4a16", 64, symmetric=True, head="int8", linear="packed")
NATIVE = WeightFormat("w4a16", 64, symmetric=True, head="exact")
LAYER = {"AddRMSNorm": 2, "SwiGLU": 1}  # plugins of every layer


def bundle_of(folder: Path, config: ModelConfig, weights: WeightFormat) -> Path:
    checkpoint = open_checkpoint(write_hf_checkpoint(folder / "checkpoint", config))
    return export_bundle(checkpoint, folder / "bundle", ExportOptions("rtx", weights))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(tmp_path_factory.mktemp("dense"), DENSE, PACKED)


@pytest.fixture(scope="module")
def with_plugins(dense: Path) -> BuildReport:
    return build_engine(dense, OPTIONS)


PARSE = """
import json, sys
from pathlib import Path
from build_engine.tensorrt_compile import parse
from edge.tensorrt import error_logger, load_flavour
from plugins.plugin import PluginHost
from plugins.tensorrt import register_plugins

flavour, host, errors = load_flavour("rtx"), PluginHost(), []
trt = flavour.api
logger = error_logger(trt, errors)
builder = trt.Builder(logger)
creators = register_plugins(trt, host)
network, parser = parse(flavour, builder, logger, Path(sys.argv[1]), {creator.name for creator in creators})
assert network is not None, [parser.get_error(i).desc() for i in range(parser.num_errors)]
found = []
for layer in (network.get_layer(i) for i in range(network.num_layers)):
    if layer.type == trt.LayerType.PLUGIN_V3:
        layer.__class__ = trt.IPluginV3Layer
        found.append((layer.name, layer.plugin.plugin_name))
print(json.dumps(found))
"""


def plugin_layers(bundle: Path) -> dict[str, str]:
    """{layer: operator} of the plugin layers of the network that TensorRT-RTX parses."""
    command = [sys.executable, "-c", PARSE, str(bundle / GRAPH)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


def compiled_plugins(engine: bytes) -> list[str]:
    """Names of the plugin layers in the engine's text, once a profile; TensorRT adds to a node's name."""
    names = re.findall(rb'custom_layer=\{ name="([^"]+)"', engine)
    return [re.sub(r"_U\d+$| \[profile \d+\].*$", "", name.decode()) for name in names]


def largest_region(engine: bytes) -> int:
    """Bytes of the largest piece of working memory that the engine plans; weights are constants."""
    regions = re.findall(rb"region = \{ name=\S+ size=(\d+) ([^}]*)", engine)
    return max(int(size) for size, attributes in regions if b"constant=true" not in attributes)


def expect_plugins(bundle: Path, report: BuildReport, expected: dict[str, int]) -> None:
    """All nodes of domain edge are plugin layers, in the network and in each profile's program; no others are."""
    nodes = onnx.load(bundle / GRAPH, load_external_data=False).graph.node
    operators = {node.name: node.op_type for node in nodes if node.domain == "edge"}
    assert plugin_layers(bundle) == operators
    assert Counter(operators.values()) == expected
    compiled = Counter(compiled_plugins(report.path.read_bytes()))
    assert compiled == dict.fromkeys(operators, len(report.recipe.profiles))


# Whole graphs


def test_a_dense_model_is_plugins_throughout(dense: Path, with_plugins: BuildReport) -> None:
    each = {"PackedLinear": 4, "PagedAttention": 1, **LAYER}
    once = {"RMSNorm": 1, "RopeTable": 1, "PackedHead": 1}
    expect_plugins(dense, with_plugins, {name: 2 * count for name, count in each.items()} | once)
    assert [profile.name for profile in with_plugins.recipe.profiles] == ["prefill", "decode"]
    assert with_plugins.recipe.plugins == plugin_hash() and not with_plugins.notes
    assert "with plugins" in with_plugins.describe() and "has not been run" in with_plugins.describe()


def test_a_sparse_model_is_plugins_throughout(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, SPARSE, PACKED)
    report = build_engine(bundle, OPTIONS)
    each = {"PackedLinear": 4, "InfLLMv2Attention": 1, **LAYER}
    once = {"RMSNorm": 1, "LongRopeTable": 1, "PackedHead": 1}
    expect_plugins(bundle, report, {name: 2 * count for name, count in each.items()} | once)
    assert largest_region(report.path.read_bytes()) < SCORES


def test_native_int4_has_the_other_plugins(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, DENSE, NATIVE)
    report = build_engine(bundle, OPTIONS)
    each = {"PagedAttention": 1, **LAYER}
    once = {"RMSNorm": 1, "RopeTable": 1}
    expect_plugins(bundle, report, {name: 2 * count for name, count in each.items()} | once)
    assert largest_region(report.path.read_bytes()) < SCORES


def test_the_05b_shape_with_24_layers_is_plugins_throughout(tmp_path: Path) -> None:
    bundle = export_bundle(patterned_checkpoint(MINICPM4_05B), tmp_path / "bundle", ExportOptions("rtx", PACKED))
    report = build_engine(bundle)
    each = {"PackedLinear": 4, "PagedAttention": 1, **LAYER}
    once = {"RMSNorm": 1, "RopeTable": 1, "PackedHead": 1}
    expect_plugins(bundle, report, {name: 24 * count for name, count in each.items()} | once)
    # The gate and up projections of a prompt's chunk; scores of one head at 32768 tokens would be 34 MB.
    assert largest_region(report.path.read_bytes()) <= 520 * 2 * 4096 * 2 * 2


def patterned_checkpoint(config: ModelConfig) -> Checkpoint:
    """Weights that need no drawing: 61 rows in turns, from another one on in each tensor."""
    rows = np.random.default_rng(0).normal(size=(61, 16384)).astype(np.float16) * np.float16(0.02)

    def tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
        def read(part: slice) -> np.ndarray:
            numbers = np.arange(*part.indices(shape[0]))
            return rows[0, numbers] if len(shape) == 1 else rows[(numbers + crc32(name.encode())) % 61, : shape[1]]

        return LazyTensor(name, shape, np.dtype(np.float16), "F16", read)

    tensors = {name: tensor(name, shape) for name, shape in expected_shapes(config)}
    return Checkpoint(Path("patterned"), "safetensors", config, tensors, text=None, generation={})


# What is in an engine


def test_no_scores_and_no_second_cache_are_planned(dense: Path, with_plugins: BuildReport) -> None:
    """Functions of the same file plan the scores of a whole chunk, so the probe can see them."""
    for profile in with_plugins.recipe.profiles:
        pool = profile.shapes["kv_pool.0"][2]
        assert 2 * int(np.prod(pool, dtype=np.int64)) > SCORES
        assert int(np.prod(pool, dtype=np.int64)) <= 2**31 - 1 < int(np.prod((pool[0] + 1, *pool[1:]), dtype=np.int64))
    assert largest_region(with_plugins.path.read_bytes()) < SCORES

    functions = build_engine(dense, replace(OPTIONS, plugins=False))
    engine = functions.path.read_bytes()
    assert compiled_plugins(engine) == [] and functions.recipe.plugins == ""
    assert largest_region(engine) >= SCORES
    assert functions.path != with_plugins.path and "with functions" in functions.describe()


def test_plugin_builds_are_deterministic(dense: Path, with_plugins: BuildReport) -> None:
    """But for the numbers that TensorRT-RTX gives to symbolic sizes: some bytes in ten thousand."""
    first = with_plugins.path.read_bytes()
    with_plugins.path.with_suffix(".json").unlink()
    again = build_engine(dense, OPTIONS)
    assert not again.cached and again.path == with_plugins.path
    second = again.path.read_bytes()
    assert compiled_plugins(second) == compiled_plugins(first) and len(second) == len(first)
    assert np.mean(np.frombuffer(second, np.uint8) != np.frombuffer(first, np.uint8)) < 0.001


def test_a_profile_for_verification_is_added(dense: Path) -> None:
    report = build_engine(dense, replace(OPTIONS, verify=8))
    shapes = {profile.name: profile.shapes for profile in report.recipe.profiles}
    assert list(shapes) == ["prefill", "decode", "verify"]
    assert shapes["verify"]["input_ids"] == shapes["verify"]["logits_rows"] == ((1,), (8,), (32,))
    assert shapes["verify"]["slots"] == ((1,), (8,), (32,)) and shapes["verify"]["tree_start"] == ((1,), (1,), (4,))
    assert shapes["verify"]["tree_mask"] == ((1, 2), (8, 2), (32, 2))
    assert shapes["prefill"]["input_ids"][2] == (516,) and shapes["prefill"]["query_start"][2] == (5,)
    assert len(compiled_plugins(report.path.read_bytes())) == 3 * len(plugin_layers(dense))


def test_the_device_finds_the_engine(dense: Path, with_plugins: BuildReport) -> None:
    bundle = open_bundle(dense)
    chosen = choose_engine(bundle, tensorrt=load_flavour("rtx").name, architecture="sm_89")
    assert chosen.recipe.plugins == plugin_hash()
    with pytest.raises(EdgeError, match=r"no engine for TensorRT-RTX .* on sm_87 .* for sm86, sm89, sm120"):
        choose_engine(bundle, tensorrt=load_flavour("rtx").name, architecture="sm_87")


# Refusals


def test_a_gpu_without_kernels_in_the_bundle_is_refused(dense: Path) -> None:
    with pytest.raises(EdgeError, match=r"no kernels for sm75, only kernels-sm_120.cubin, .* --functions"):
        build_engine(dense, replace(OPTIONS, compute_capabilities=("sm86", "sm75")))
    with pytest.raises(UsageError, match=r"'sm87'; choose from .*sm89"):
        build_engine(dense, replace(OPTIONS, compute_capabilities=("sm87",)))


def test_what_a_plugin_says_reaches_the_user(tmp_path: Path) -> None:
    """A graph of an older export lacks an attribute that the plugin needs."""
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "checkpoint", DENSE))

    def forget(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "PagedAttention":
                kept = [attribute for attribute in node.attribute if attribute.name != "scale"]
                del node.attribute[:]
                node.attribute.extend(kept)

    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportOptions("rtx", PACKED))
    change_graph(bundle, forget)
    with pytest.raises(EdgeError, match=r"cannot read .*PagedAttention lacks the attribute scale"):
        build_engine(bundle, OPTIONS)
    assert not (bundle / "engines").exists()


def change_graph(bundle: Path, change: Any) -> None:
    """Edit the graph and seal the bundle again."""
    from edge.bundle import MANIFEST, FileEntry, hash_file

    manifest, graph = open_bundle(bundle).manifest, bundle / GRAPH
    model = onnx.load(graph, load_external_data=False)
    change(model)
    graph.write_bytes(model.SerializeToString())
    entry = FileEntry(hash_file(graph), graph.stat().st_size)
    (bundle / MANIFEST).write_text(replace(manifest, files={**manifest.files, GRAPH: entry}).to_json())
