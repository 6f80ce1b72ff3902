"""Graphs whose int4 projections are packed for the TensorRT plugins: their numbers, files, kernels and refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from build_engine import lowering, weight_rows
from build_engine.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat, choose_format, make_target
from build_engine.graph import build_graph
from build_engine.quantize import quantize_symmetric
from build_engine.weights_file import WeightsFile
from edge.bundle import GRAPH, open_bundle
from edge.config import LongRope, ModelConfig, SparseConfig
from edge.errors import EdgeError, UsageError
from plugins.build.embed import TARGETS, module_file
from plugins.build.sass import read_cubin
from plugins.launch import Launch
from plugins.linear.launch import LinearShape, head, linear
from plugins.linear.meaning import weights as meaning
from plugins.linear.pack import unpack_codes, unpack_scales
from tests.command import edge
from tests.graph_steps import ragged_steps, run_steps
from tests.synthetic import tiny_config, write_hf_checkpoint

SIZES = {"head_dim": 64, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}
# 330 is no whole number of row tiles.
DENSE = tiny_config(**SIZES, vocab_size=330, tie_word_embeddings=False)
SPARSE = tiny_config(
    **SIZES,
    long_rope=LongRope((1.0,) * 32, tuple(1.0 + i / 4 for i in range(32)), original_max_position_embeddings=64),
    sparse=SparseConfig(topk=2, window_size=64, dense_len=128),
)
INT8 = WeightFormat("w4a16", 64, symmetric=True, head="int8", linear="packed")
INT4 = WeightFormat("w4a16", 128, symmetric=True, head="int4", linear="packed")
EXACT_HEAD = WeightFormat("w4a16", 32, symmetric=True, head="exact", linear="packed")


def checkpoint_of(folder: Path, config: ModelConfig) -> Checkpoint:
    return open_checkpoint(write_hf_checkpoint(folder / "checkpoint", config))


def quantized(checkpoint: Checkpoint, name: str, group: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """codes [N, K] uint8 and scales [N, K / group] float16 of a checkpoint's matrix."""
    rows = quantize_symmetric(checkpoint.tensors[name].read(slice(None)).astype(np.float32), group, bits)
    return rows.codes.reshape(len(rows.codes), -1), rows.scales.astype(np.float16)


def rounded(checkpoint: Checkpoint, weights: WeightFormat) -> Checkpoint:
    """The checkpoint whose projections and head are the values that codes and scales stand for; its head is untied."""
    tied = checkpoint.config.tie_word_embeddings
    values = {name: tensor.read(slice(None)) for name, tensor in checkpoint.tensors.items()}
    for name in checkpoint.tensors:
        if "_proj" in name:
            values[name] = meaning(*quantized(checkpoint, name, weights.group_size, 4), 4).astype(np.float32)
    source = "model.embed_tokens.weight" if tied else "lm_head.weight"
    values["lm_head.weight"] = values[source]
    if weights.head != "exact":
        bits = 8 if weights.head == "int8" else 4
        values["lm_head.weight"] = meaning(*quantized(checkpoint, source, weights.group_size, bits), bits)
    tensors = {
        name: LazyTensor(name, value.shape, np.dtype(np.float32), "F32", value.astype(np.float32).__getitem__)
        for name, value in values.items()
    }
    return replace(checkpoint, config=replace(checkpoint.config, tie_word_embeddings=False), tensors=tensors)


# The numbers


@pytest.mark.parametrize(
    ("config", "weights", "prompts"),
    [(DENSE, INT8, (100, 30)), (DENSE, INT4, (70,)), (DENSE, EXACT_HEAD, (70,)), (SPARSE, INT8, (200, 30))],
    ids=["dense int8 head", "dense int4 head", "dense exact head", "sparse"],
)
def test_the_packed_graph_computes_what_its_weights_stand_for(
    tmp_path: Path, config: ModelConfig, weights: WeightFormat, prompts: tuple[int, ...]
) -> None:
    checkpoint = checkpoint_of(tmp_path, config)
    packed = export_bundle(checkpoint, tmp_path / "packed", ExportOptions("jetson", weights))
    exact = ExportOptions(weights=WeightFormat("exact"))
    reference = export_bundle(rounded(checkpoint, weights), tmp_path / "cpu", exact)
    steps, num_pages = ragged_steps(config.vocab_size, prompts)
    results = zip(run_steps(packed, steps, num_pages), run_steps(reference, steps, num_pages), strict=True)
    for half, single in results:
        assert single["logits"].std() > 1
        assert half["logits"].dtype == np.float32
        assert np.abs(half["logits"] - single["logits"]).max() < 5e-3  # roundings of float16 activations
        assert ("token" in half) == (weights.head != "exact")
        if "token" in half:
            assert half["token"].dtype == np.int32
            np.testing.assert_array_equal(half["token"], half["logits"].argmax(axis=1))


# The files


def initializer(bundle: Path, name: str) -> np.ndarray:
    model = onnx.load(bundle / GRAPH)
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


@pytest.mark.parametrize("weights", [INT8, INT4], ids=["int8 head", "int4 head"])
def test_nothing_is_lost_in_packing(tmp_path: Path, weights: WeightFormat) -> None:
    checkpoint = checkpoint_of(tmp_path, DENSE)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportOptions("jetson", weights))
    layer, head_bits = "model.layers.1.", 8 if weights.head == "int8" else 4
    stacked = {
        ("layers.1.qkv", 4): [f"{layer}self_attn.{p}_proj.weight" for p in "qkv"],
        ("layers.1.down", 4): [f"{layer}mlp.down_proj.weight"],
        ("logits", head_bits): ["lm_head.weight"],
    }
    for (node, bits), sources in stacked.items():
        parts = [quantized(checkpoint, source, weights.group_size, bits) for source in sources]
        codes, scales = (np.concatenate(part) for part in zip(*parts, strict=True))
        words = initializer(bundle, f"{node}.int{bits}")
        assert words.dtype == np.int32
        np.testing.assert_array_equal(unpack_codes(words, bits, len(codes)), codes)
        np.testing.assert_array_equal(unpack_scales(initializer(bundle, f"{node}.scales"), len(codes)), scales)


def test_rows_read_in_any_chunks_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, target = checkpoint_of(tmp_path, DENSE), make_target("rtx", INT8)
    graph, files = build_graph(DENSE, target.types), []
    for rows in (1000, 37, 3):
        monkeypatch.setattr(weight_rows, "CHUNK_BYTES", 4 * DENSE.hidden_size * rows)
        with WeightsFile(tmp_path / "weights") as file:
            lowering.lower(graph, checkpoint, target, INT8, file)
        files.append((tmp_path / "weights").read_bytes())
    assert files[0] == files[1] == files[2]


# Kernels


@pytest.mark.parametrize("weights", [INT8, INT4, EXACT_HEAD], ids=["int8 head", "int4 head", "exact head"])
def test_a_bundle_has_the_kernels_of_its_nodes(tmp_path: Path, weights: WeightFormat) -> None:
    """Whatever the number of tokens and multiprocessors, and none for a head that needs none."""
    checkpoint = checkpoint_of(tmp_path, DENSE)
    bundle = open_bundle(export_bundle(checkpoint, tmp_path / "bundle", ExportOptions("jetson", weights)))
    modules = [name for name in bundle.manifest.files if name.endswith(".cubin")]
    assert modules == [module_file("sm_87")]
    symbols = read_cubin(bundle.file(modules[0]).read_bytes()).keys()
    model = onnx.load(bundle.file(GRAPH), load_external_data=False)
    launches: list[Launch] = []
    for node in model.graph.node:
        a = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for tokens in (1, 8, 9, 16, 64, 512):
            if node.op_type == "PackedLinear":
                shape = LinearShape(tokens, a["n"], a["k"], a["bits"], a["group"], "half")
                launches += [linear(shape, multiprocessors) for multiprocessors in (1, 16, 128)]
            elif node.op_type == "PackedHead":
                launches += head(LinearShape(tokens, a["n"], a["k"], a["bits"], a["group"], "half"))
    assert len({launch.kernel.symbol for launch in launches}) > 3
    assert {launch.kernel.symbol for launch in launches} <= symbols
    assert ("argmax_256" in symbols) == (weights.head != "exact")


def test_native_weights_need_no_kernels_of_ours(tmp_path: Path) -> None:
    native = replace(EXACT_HEAD, linear="native")
    bundle = export_bundle(checkpoint_of(tmp_path, DENSE), tmp_path / "bundle", ExportOptions("tensorrt", native))
    assert TARGETS["tensorrt"] == TARGETS["rtx"]
    for architecture in TARGETS["tensorrt"]:
        assert not [name for name in read_cubin((bundle / module_file(architecture)).read_bytes()) if "gem" in name]


def test_packed_weights_without_kernels_are_refused(tmp_path: Path) -> None:
    for number, (sizes, words) in enumerate([({"head_dim": 16}, "head_dim 16"), ({"intermediate_size": 160}, "160")]):
        folder = tmp_path / str(number)
        checkpoint = checkpoint_of(folder, replace(DENSE, **sizes))
        with pytest.raises(EdgeError, match=f"--linear packed .*{words}.* --linear native"):
            export_bundle(checkpoint, folder / "bundle", ExportOptions("rtx", INT8))
        assert not (folder / "bundle").exists()


# TensorRT

BUILD = """
import sys
from pathlib import Path
from build_engine.tensorrt import BuildOptions, build_profiles
from edge.bundle import GRAPH, open_bundle
from edge.tensorrt import load_flavour
bundle, trt = open_bundle(Path(sys.argv[1])), load_flavour("rtx").api
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(str(bundle.file(GRAPH))), parser.get_error(0).desc()
assert trt.LayerType.PLUGIN_V3 not in {network.get_layer(i).type for i in range(network.num_layers)}
outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
assert (outputs["logits"].dtype, outputs["token"].dtype) == (trt.float32, trt.int32)
config = builder.create_builder_config()
for shapes in build_profiles(bundle.config, BuildOptions(max_context=256, chunk=32, batch=2)):
    profile = builder.create_optimization_profile()
    for name, bounds in shapes.shapes.items():
        profile.set_shape(name, *bounds)
    config.add_optimization_profile(profile)
print(builder.build_serialized_network(network, config).nbytes)
"""


@pytest.mark.parametrize(("config", "weights"), [(DENSE, INT4), (SPARSE, INT8)], ids=["dense", "sparse"])
def test_tensorrt_builds_the_packed_graph_as_functions(
    tmp_path: Path, config: ModelConfig, weights: WeightFormat
) -> None:
    bundle = export_bundle(checkpoint_of(tmp_path, config), tmp_path / "bundle", ExportOptions("rtx", weights))
    command = [sys.executable, "-c", BUILD, str(bundle)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0


# Choices


@pytest.mark.parametrize(
    ("target", "format", "words"),
    [
        ("onnxruntime", {}, "leave it out for --target onnxruntime"),
        ("rtx", {"kind": "exact"}, "stores int4 or ternary weights, not exact ones"),
        ("rtx", {"symmetric": False}, "--linear packed .* --symmetric"),
        ("rtx", {"linear": "loose"}, "unknown --linear 'loose'; choose native or packed"),
        ("jetson", {"linear": "native"}, "no block-wise int8; export for jetson with --linear packed"),
        ("abacus", {}, "unknown target 'abacus'; choose onnxruntime, rtx, tensorrt or jetson"),
    ],
)
def test_what_does_not_go_together_is_refused(target: str, format: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_target(target, replace(INT8, **format))


def test_linear_is_no_choice_on_the_cpu(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, DENSE)
    for linear_format in ("packed", "native"):
        with pytest.raises(UsageError, match="leave it out for --target onnxruntime"):
            choose_format(checkpoint, "onnxruntime", "w4a16", linear=linear_format)
    run = edge("export", checkpoint.path, "--out", tmp_path / "out", "--linear", "packed")
    assert (run.returncode, run.stderr.count(b"\n")) == (2, 1)
    assert b"--linear" in run.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "packed"), [([], True), (["--linear", "native"], False)])
def test_the_bundle_says_how_its_weights_are_stored(tmp_path: Path, options: list[str], packed: bool) -> None:
    checkpoint, out = checkpoint_of(tmp_path, DENSE), tmp_path / "out"
    run = edge("export", checkpoint.path, "--out", out, "--target", "jetson", *options)
    assert run.returncode == 0, run.stderr
    manifest = open_bundle(out).manifest
    assert manifest.target == "jetson"
    assert manifest.weights["linear"] == ("packed" if packed else "native")
    assert manifest.weights["head"] == ("int8" if packed else "exact")
    assert manifest.weights["description"].startswith("packed w4a16 g64" if packed else "w4a16 g64")
