"""Codes that a checkpoint has, ternary or int4, reach every executor's operators with nothing lost."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from build_engine.checkpoint import Checkpoint, Codes, expected_shapes, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat, choose_format, make_target, plugin_kernels
from build_engine.graph import build_graph
from build_engine.lowering import lower
from build_engine.selftest_model import CONFIG, selftest_checkpoint
from build_engine.tensorrt import BuildOptions, build_engine
from build_engine.ternary import recover
from build_engine.weights_file import WeightsFile
from edge.bundle import GRAPH, WEIGHTS, Bundle, open_bundle
from edge.config import ModelConfig
from edge.engine import open_engine
from edge.errors import EdgeError, UsageError
from edge.memory.fit import make_plan
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.selftest.vectors import kernels_of, vectors_for
from plugins.block_linear import pack as block_pack
from plugins.block_linear.meaning import weights as block_weights
from plugins.linear.pack import unpack_codes, unpack_scales
from plugins.tile_linear.pack import unpack_tiles
from tests.command import edge
from tests.device_engine import open_on_device
from tests.emulated import emulated_gpu
from tests.gptq_samples import write_gptq_folder
from tests.synthetic import random_weights, tiny_config, write_hf_checkpoint
from tests.ternary_samples import (
    WIDE,
    Sample,
    checkpoint_of,
    ternary_weights,
    with_ternary_projections,
    write_ternary_checkpoint,
    write_ternary_gguf,
)

SIZES = {"head_dim": 64, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}
MODEL = tiny_config(**SIZES, num_hidden_layers=1)
PARTS = {
    "qkv": ("self_attn", "qkv"),
    "o": ("self_attn", "o"),
    "down": ("mlp", ("down",)),
    "gate_up": ("mlp", ("gate", "up")),
}


def of_node(config: ModelConfig, node: str) -> list[str]:
    """Names of the matrices that a node of layer 0 has stacked."""
    block, parts = PARTS[node]
    return [f"model.layers.0.{block}.{part}_proj.weight" for part in parts]


def dense(sample: Sample, zero: int = 1) -> np.ndarray:
    group = sample.codes.shape[1] // sample.scales.shape[1]
    return (sample.codes.astype(np.float64) - zero) * np.repeat(sample.scales, group, 1)


def export(checkpoint: Checkpoint, out: Path, target: str, **choices: object) -> Bundle:
    """The bundle that `edge export` would make."""
    kind = str(choices.pop("kind", "ternary"))
    weights = choose_format(checkpoint, target, kind, **choices)  # type: ignore[arg-type]
    return open_bundle(export_bundle(checkpoint, out, ExportOptions(target, weights)))


def lowered(checkpoint: Checkpoint, folder: Path, target: str, kind: str, linear: str | None) -> Path:
    """A folder with the graph and weights of a bundle, without the kernels, which take long to compile."""
    weights = choose_format(checkpoint, target, kind, linear=linear)
    chosen = make_target(target, weights)
    folder.mkdir()
    with WeightsFile(folder / WEIGHTS) as file:
        model = lower(build_graph(checkpoint.config, chosen.types), checkpoint, chosen, weights, file)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    return folder


def stored_weights(folder: Path, node: str) -> np.ndarray:
    """[N, K] float64 that a projection's operator stands for, from its codes and scales in the file alone."""
    model = onnx.load(folder / GRAPH)
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    name = f"layers.0.{node}"
    scales = numpy_helper.to_array(arrays[f"{name}.scales"]).astype(np.float64)
    operator = next(n for n in model.graph.node if n.name in (name, f"{name}.dense"))
    if operator.op_type == "DequantizeLinear" or any(n.name == f"{name}.dense" for n in model.graph.node):
        codes = numpy_helper.to_array(arrays[f"{name}.int4"]).astype(np.float64)
        assert (scales > 0).all()  # TensorRT's condition
        return codes * np.repeat(scales, codes.shape[1] // scales.shape[1], 1)
    a = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in operator.attribute}
    if operator.op_type == "BlockLinear":
        n, k, bits = a["n"], a["k"], a["bits"]
        codes = block_pack.unpack_codes(numpy_helper.to_array(arrays[f"{name}.int{bits}"]), bits, n, k)
        return block_weights(codes, unpack_tiles(scales, n), bits, a["block"])
    codes = unpack_codes(numpy_helper.to_array(arrays[f"{name}.int{a['bits']}"]), a["bits"], a["n"])
    scales = unpack_scales(numpy_helper.to_array(arrays[f"{name}.scales"]), a["n"]).astype(np.float64)
    scales = scales.reshape(a["n"], -1)
    return (codes - (1.0 if a["bits"] == 2 else 8.0)) * np.repeat(scales, a["k"] // scales.shape[1], 1)


def int4_checkpoint(config: ModelConfig, groups: dict[str, int]) -> tuple[Checkpoint, dict[str, Sample]]:
    """Projections with codes 0..15 in groups (a row by default), as a GPTQ reader gives them."""
    rng = np.random.default_rng(2)
    checkpoint = checkpoint_of(config, random_weights(config))
    tensors, samples = dict(checkpoint.tensors), {}
    for name, tensor in checkpoint.tensors.items():
        if name.endswith("_proj.weight"):
            n, k = tensor.shape
            group = next((size for part, size in groups.items() if part in name), k)
            scales = (rng.integers(1, 99, (n, k // group)) / 1024).astype(np.float16).astype(np.float32)
            sample = Sample(np.zeros(0), rng.integers(0, 16, (n, k), dtype=np.uint8), scales)
            values = dense(sample, 8).astype(np.float32)
            codes = Codes(4, group, 8, lambda rows, s=sample: (s.codes[rows], s.scales[rows]))
            tensors[name] = replace(tensor, read=values.__getitem__, codes=codes)
            samples[name] = sample
    return replace(checkpoint, tensors=tensors), samples


# Nothing is lost

TARGETS = {"cpu": ("onnxruntime", None), "packed": ("rtx", "packed"), "native": ("rtx", "native")}
# Inputs that share a scale in parts of the model, rows where nothing is said, and what the bundle makes of them.
GROUPS = {
    "rows": ({}, 0),
    "groups of 32": ({"_proj": 32}, 32),
    "halves and rows": ({"o_proj": 128, "down_proj": 128}, 128),  # o has 256 inputs
    "one part in 64": ({"k_proj": 64}, 64),
}


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("groups", list(GROUPS))
def test_ternary_weights_are_stored_to_the_last_bit(tmp_path: Path, target: str, groups: str) -> None:
    by_name, stored = GROUPS[groups]
    weights, samples = ternary_weights(MODEL, by_name)
    name, linear = TARGETS[target]
    checkpoint = recover(checkpoint_of(MODEL, weights)).checkpoint
    assert choose_format(checkpoint, name, "ternary", linear=linear).group_size == stored
    bundle = lowered(checkpoint, tmp_path / "out", name, "ternary", linear)
    for node in PARTS:
        expected = np.concatenate([dense(samples[part]) for part in of_node(MODEL, node)])
        np.testing.assert_array_equal(stored_weights(bundle, node), expected)


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("groups", ["rows", "groups of 32", "halves and rows"])
def test_int4_codes_are_taken_over(tmp_path: Path, target: str, groups: str) -> None:
    by_name, stored = GROUPS[groups]
    checkpoint, samples = int4_checkpoint(MODEL, by_name)
    name, linear = TARGETS[target]
    chosen = choose_format(checkpoint, name, "w4a16", linear=linear)
    assert (chosen.group_size, chosen.symmetric) == (stored, True)
    bundle = lowered(checkpoint, tmp_path / "out", name, "w4a16", linear)
    for node in PARTS:
        expected = np.concatenate([dense(samples[part], 8) for part in of_node(MODEL, node)])
        np.testing.assert_array_equal(stored_weights(bundle, node), expected)


@pytest.mark.parametrize("target", list(TARGETS))
def test_a_gptq_checkpoint_keeps_its_codes(tmp_path: Path, target: str) -> None:
    layers = write_gptq_folder(tmp_path / "gptq", MODEL, 64)
    name, linear = TARGETS[target]
    bundle = lowered(open_checkpoint(tmp_path / "gptq"), tmp_path / "out", name, "w4a16", linear)
    for node in PARTS:
        expected = np.concatenate([layers[part.removesuffix(".weight")].values() for part in of_node(MODEL, node)])
        np.testing.assert_array_equal(stored_weights(bundle, node), expected)


def test_ternary_codes_fit_int4(tmp_path: Path) -> None:
    weights, samples = ternary_weights(MODEL, {"_proj": 64})
    checkpoint = recover(checkpoint_of(MODEL, weights)).checkpoint
    bundle = lowered(checkpoint, tmp_path / "out", "onnxruntime", "w4a16", None)
    np.testing.assert_array_equal(stored_weights(bundle, "o"), dense(samples[of_node(MODEL, "o")[0]]))


def test_rows_of_any_length_are_padded(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=100, intermediate_size=72, num_hidden_layers=1)
    weights, samples = ternary_weights(config)
    checkpoint = recover(checkpoint_of(config, weights)).checkpoint
    bundle = lowered(checkpoint, tmp_path / "out", "onnxruntime", "ternary", None)
    for node in PARTS:
        expected = np.concatenate([dense(samples[part]) for part in of_node(config, node)])
        np.testing.assert_array_equal(stored_weights(bundle, node), expected)


def test_scales_that_float16_does_not_hold_are_rounded_for_tensorrt_alone(tmp_path: Path) -> None:
    """As exact weights are there; a row's scale stays float32 in packed weights."""
    weights, samples = ternary_weights(MODEL, dtype="float32")
    checkpoint = recover(checkpoint_of(MODEL, weights)).checkpoint
    exact = dense(samples[of_node(MODEL, "o")[0]])
    for target, (name, linear) in TARGETS.items():
        stored = stored_weights(lowered(checkpoint, tmp_path / target, name, "ternary", linear), "o")
        expected = exact.astype(np.float16).astype(np.float64) if target == "native" else exact
        np.testing.assert_array_equal(stored, expected)


# What they compute


def logits(bundle: Bundle, ids: list[int]) -> np.ndarray:
    engine = open_engine(bundle.path, EngineOptions(context=64))
    return engine.logits(ids, len(ids))


def test_the_cpu_computes_what_the_exact_weights_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(MODEL, num_hidden_layers=2)
    checkpoint = recover(checkpoint_of(config, ternary_weights(config, {"down_proj": 64})[0])).checkpoint
    ternary = export(checkpoint, tmp_path / "ternary", "onnxruntime", head="exact")
    options = ExportOptions(weights=WeightFormat("exact"), kv="bfloat16")
    exact = open_bundle(export_bundle(checkpoint, tmp_path / "exact", options))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 40).tolist()
    truth, rounded = logits(exact, ids), logits(ternary, ids)
    assert truth.std() > 1
    assert 1e-4 < np.abs(rounded - truth).max() < 0.15  # int8 activations
    # Without kernels the functions run, whose activations are floats: only the order of sums differs, and now and then
    # a rounding of the bfloat16 cache.
    monkeypatch.setattr("plugins.ort.library.find_library", lambda: None)
    assert np.abs(logits(ternary, ids) - truth).max() < 0.02


def test_the_emulated_device_decodes_the_tokens_of_exact_weights(tmp_path: Path) -> None:
    """The self-test's model with ternary projections: its int8 head is exact, and so are all scales in float16."""
    checkpoint = recover(with_ternary_projections(selftest_checkpoint())).checkpoint
    weights = choose_format(checkpoint, "rtx", "ternary")
    assert weights == WeightFormat("ternary", 0, True, "int8", "packed")
    bundle = open_bundle(export_bundle(checkpoint, tmp_path / "rtx", ExportOptions("rtx", weights)))
    exact = export_bundle(checkpoint, tmp_path / "cpu", ExportOptions(weights=WeightFormat("exact")))
    cpu = open_engine(exact, EngineOptions(context=512, chunk=64))
    greedy = SamplingParams(max_tokens=16, ignore_eos=True)
    ids = np.random.default_rng(32).integers(3, CONFIG.vocab_size, 150).tolist()
    expected = [event.token_id for event in cpu.generate(ids, greedy)]
    after = cpu.logits([*ids, *expected[:-1]], len(expected))
    best = np.sort(after, axis=1)[:, -2:]
    assert (best[:, 1] - best[:, 0]).min() > 0.04 and len(set(expected)) > 8  # no near ties, no loop
    with emulated_gpu("sm_86", plugin_kernels(CONFIG, weights)):
        engine = open_on_device(bundle)
        assert [event.token_id for event in engine.generate(ids, greedy)] == expected
        assert "CUDA graph" in engine.describe()["decode"]


@pytest.mark.parametrize(("linear", "plugins"), [("packed", True), ("native", True), ("native", False)])
def test_tensorrt_builds_them(tmp_path: Path, linear: str, plugins: bool) -> None:
    weights, _ = ternary_weights(MODEL)
    bundle = export(recover(checkpoint_of(MODEL, weights)).checkpoint, tmp_path / "out", "rtx", linear=linear)
    report = build_engine(bundle.path, BuildOptions(max_context=256, chunk=32, batch=2, plugins=plugins))
    assert report.path.stat().st_size > 0 and not report.notes
    operators = Counter(node.op_type for node in onnx.load(bundle.file(GRAPH), load_external_data=False).graph.node)
    assert operators["PackedLinear" if linear == "packed" else "DequantizeLinear"] == 4


# Kernels


@pytest.mark.parametrize(("groups", "head"), [("rows", "int8"), ("groups of 32", "exact"), ("one part in 64", "int4")])
def test_a_bundle_is_tested_with_its_own_kernels(tmp_path: Path, groups: str, head: str) -> None:
    weights, _ = ternary_weights(MODEL, GROUPS[groups][0])
    checkpoint = recover(checkpoint_of(MODEL, weights)).checkpoint
    bundle = export(checkpoint, tmp_path / "out", "jetson", head=head)
    model = kernels_of(bundle.manifest)
    assert model.weights == (2, GROUPS[groups][1])
    launched = {launch.kernel for vector in vectors_for(model) for launch in vector.launches}
    assert launched == set(plugin_kernels(MODEL, choose_format(checkpoint, "jetson", "ternary", head=head)))


# Choices and reports


def test_the_checkpoint_decides_the_format() -> None:
    def choice(checkpoint: Checkpoint, *choices: object, **named: object) -> WeightFormat:
        return choose_format(checkpoint, *choices, **named)  # type: ignore[arg-type]

    ternary = recover(checkpoint_of(MODEL, ternary_weights(MODEL)[0])).checkpoint
    assert choice(ternary, "onnxruntime", "ternary") == WeightFormat("ternary", 0, True, "int8")
    assert choice(ternary, "jetson", "ternary", linear="native") == WeightFormat("ternary", 0, True, "exact")
    int4, _ = int4_checkpoint(MODEL, {"_proj": 128})
    assert choice(int4, "onnxruntime", "w4a16") == WeightFormat("w4a16", 128, True, "int8")
    assert choice(int4, "onnxruntime", "w4a16", symmetric=False).group_size == 32  # asked for: quantised again
    # No packed kernel has 160 inputs.
    other = replace(MODEL, intermediate_size=160)
    unpackable = recover(checkpoint_of(other, ternary_weights(other)[0])).checkpoint
    assert choice(unpackable, "rtx", "ternary") == WeightFormat("ternary", 0, True, "exact")


def test_a_small_head_is_not_quantised() -> None:
    """At 16 bits it would be less than a tenth of all bytes; a ternary model's is more for the same sizes."""
    config = replace(MODEL, num_hidden_layers=8)
    checkpoint = checkpoint_of(config, random_weights(config))
    assert choose_format(checkpoint, "onnxruntime", "w4a16").head == "exact"
    ternary = recover(checkpoint_of(config, ternary_weights(config)[0])).checkpoint
    assert choose_format(ternary, "onnxruntime", "ternary").head == "int8"
    assert choose_format(checkpoint, "onnxruntime", "w4a16", head="int8").head == "int8"


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"group_size": 64}, "which weights share a scale; leave out --group-size"),
        ({"symmetric": False}, "leave out --asymmetric"),
        ({"kind": "fp16", "head": "int8"}, "fp16 stores the head as it does all weights; leave out --head int8"),
        ({"kind": "int3"}, "unknown weight format 'int3'; choose exact, fp16, w4a16 or ternary"),
    ],
)
def test_choices_that_would_be_ignored_are_refused(choices: dict[str, object], words: str) -> None:
    checkpoint = recover(checkpoint_of(MODEL, ternary_weights(MODEL)[0])).checkpoint
    with pytest.raises(UsageError, match=words):
        choose_format(checkpoint, "onnxruntime", **({"kind": "ternary"} | choices))  # type: ignore[arg-type]


def test_dense_weights_are_not_exported_as_ternary(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(MODEL, random_weights(MODEL))
    with pytest.raises(EdgeError, match=r"q_proj\.weight is not ternary"):
        choose_format(checkpoint, "onnxruntime", "ternary")
    with pytest.raises(EdgeError, match=r"q_proj\.weight has no ternary codes"):
        export_bundle(checkpoint, tmp_path / "out", ExportOptions(weights=WeightFormat("ternary", 0, True)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan")])
def test_a_scale_that_is_no_positive_number_is_named(tmp_path: Path, scale: float) -> None:
    checkpoint, samples = int4_checkpoint(MODEL, {"_proj": 64})
    samples["model.layers.0.mlp.up_proj.weight"].scales[5, 1] = scale
    with pytest.raises(EdgeError, match=rf"up_proj\.weight has the scale {scale} at row 5, group 1"):
        export(checkpoint, tmp_path / "out", "onnxruntime", kind="w4a16")


def test_float16_weights(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(MODEL, random_weights(MODEL))
    bundle = export(checkpoint, tmp_path / "out", "onnxruntime", kind="fp16")
    exact = open_bundle(export_bundle(checkpoint, tmp_path / "exact", ExportOptions(weights=WeightFormat("exact"))))
    half, single = ({t.name: t for t in onnx.load(b.file(GRAPH)).graph.initializer} for b in (bundle, exact))
    for name in ("layers.0.qkv.tiles", "layers.0.down.tiles", "logits.tiles", "model.embed_tokens.weight"):
        stored, truth = numpy_helper.to_array(half[name]), numpy_helper.to_array(single[name])
        np.testing.assert_array_equal(stored, truth.astype(np.float16))
        assert stored.dtype == np.float16
    ids = list(range(20))
    assert np.abs(logits(bundle, ids) - logits(exact, ids)).max() < 0.05
    assert bundle.manifest.weights["description"] == "fp16"
    values = sum(math.prod(shape) for _, shape in expected_shapes(MODEL) if len(shape) == 2)
    head = -MODEL.vocab_size % 16 * MODEL.hidden_size + MODEL.tie_word_embeddings * MODEL.vocab_size * MODEL.hidden_size
    assert make_plan(bundle, EngineOptions(context=64)).bytes("weights, mapped") == 2 * (values + head)

    checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].read(slice(None))[0, 0] = 1e5
    with pytest.raises(EdgeError, match=r"down_proj\.weight: the value 100000 exceeds float16's 65504; .*exact"):
        export(checkpoint, tmp_path / "large", "onnxruntime", kind="fp16")


def test_the_bundle_says_what_a_weight_takes(tmp_path: Path) -> None:
    weights, _ = ternary_weights(MODEL)
    checkpoint = recover(checkpoint_of(MODEL, weights)).checkpoint
    # CPU: a float32 scale for each 128. Packed: one for each row, of 128 or 256 inputs. Native: int4 and float16.
    expected = {
        "cpu": "ternary, scale a row, int8 head, 2.25 bits a weight (ideal 2)",
        "packed": "packed ternary, scale a row, int8 head, 2.21 bits a weight (ideal 2)",
        "native": "ternary, scale a row, exact head, 4.12 bits a weight (ideal 2)",
    }
    for target, (name, linear) in TARGETS.items():
        bundle = export(checkpoint, tmp_path / target, name, linear=linear)
        assert bundle.manifest.weights["description"] == expected[target]


def test_the_command_finds_and_reports_ternary_weights(tmp_path: Path) -> None:
    source = write_ternary_checkpoint(tmp_path / "hf", MODEL, {"down_proj": 128})
    run = edge("export", source, "--out", tmp_path / "out", "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["weights"]["kind"] == "ternary" and found["ternary"]["disagreement"] is None
    down = found["ternary"]["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert (down["group"], down["empty_groups"], down["error"]) == (128, 0, 0)
    assert len(found["ternary"]["tensors"]) == 7 and 0.2 < down["zeros"] < 0.4
    run = edge("export", source, "--out", tmp_path / "again")
    assert b"ternary in 7 matrices: a scale for each row in 6, a scale for each 128 inputs in 1, " in run.stderr
    run = edge("export", source, "--out", tmp_path / "exact", "--weights", "exact", "--json")
    assert json.loads(run.stdout)["weights"]["kind"] == "exact"


def test_the_command_requantises_only_when_asked(tmp_path: Path) -> None:
    source = write_hf_checkpoint(tmp_path / "hf", MODEL)
    refused = edge("export", source, "--out", tmp_path / "out", "--weights", "ternary")
    assert refused.returncode == 1 and b"q_proj.weight is not ternary" in refused.stderr
    mixed = edge("export", source, "--out", tmp_path / "out", "--weights", "w4a16", "--requantize", "bf16")
    assert mixed.returncode == 2 and b"choose --weights ternary" in mixed.stderr
    assert not (tmp_path / "out").exists()
    run = edge("export", source, "--out", tmp_path / "out", "--requantize", "bf16", "--group-size", "64")
    assert run.returncode == 0 and b"% of the codes hang on the arithmetic" in run.stderr
    weights = open_bundle(tmp_path / "out").manifest.weights
    assert (weights["kind"], weights["group_size"]) == ("ternary", 64)
    dense_run = edge("export", source, "--out", tmp_path / "dense", "--json")
    assert json.loads(dense_run.stdout)["weights"]["kind"] == "w4a16"


def test_a_gguf_of_ternary_blocks_needs_no_recovery(tmp_path: Path) -> None:
    path, samples = write_ternary_gguf(tmp_path / "model.gguf", "TQ2_0", {"down_proj": 256})
    bundle = lowered(open_checkpoint(path), tmp_path / "out", "onnxruntime", "ternary", None)
    for node in PARTS:
        expected = np.concatenate([dense(samples[part]) for part in of_node(WIDE, node)])
        np.testing.assert_array_equal(stored_weights(bundle, node), expected)


def test_logits_of_a_ternary_checkpoint_are_those_of_its_own_bundle(tmp_path: Path) -> None:
    """`edge logits CHECKPOINT` takes the format that `edge export` would."""
    source = write_ternary_checkpoint(tmp_path / "hf", MODEL)
    np.save(tmp_path / "ids.npy", np.arange(20))
    words = ("--ids-file", tmp_path / "ids.npy", "--last", 20, "--out", tmp_path / "logits.npy")
    run = edge("logits", source, *words)
    assert run.returncode == 0, run.stderr
    of_checkpoint = np.load(tmp_path / "logits.npy")
    assert edge("export", source, "--out", tmp_path / "bundle").returncode == 0
    assert edge("logits", tmp_path / "bundle", *words).returncode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), of_checkpoint)


@pytest.mark.parametrize("tied", [False, True])
def test_an_int8_embedding_is_its_table_rounded_by_rows(tmp_path: Path, tied: bool) -> None:
    config = replace(MODEL, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "hf", config, dtype="float32"))
    weights = choose_format(checkpoint, "onnxruntime", "w4a16", head="int8", embedding="int8")
    bundle = open_bundle(export_bundle(checkpoint, tmp_path / "int8", ExportOptions(weights=weights)))
    assert weights.describe().endswith("int8 embedding") and bundle.manifest.weights["embedding"] == "int8"

    table = checkpoint.tensors["model.embed_tokens.weight"]
    values = table.read(slice(None))
    scale = np.abs(values).max(1, keepdims=True) / np.float32(127)
    rounded = np.rint(values / scale) * scale
    assert 0 < np.abs(rounded - values).max() <= scale.max() / 2 * 1.001
    ids = list(range(20))
    same = replace(weights, embedding="exact")
    own = open_bundle(export_bundle(checkpoint, tmp_path / "own", ExportOptions(weights=same)))
    for expected, actual in ((rounded, embedded(bundle, ids)), (values.astype(np.float16), embedded(own, ids))):
        np.testing.assert_allclose(actual, expected[ids] * np.float32(config.scale_emb), rtol=1e-6)
    assert bundle.file(WEIGHTS).stat().st_size < own.file(WEIGHTS).stat().st_size


def embedded(bundle: Bundle, ids: list[int]) -> np.ndarray:
    """What the graph makes of ids before its first layer."""
    model = onnx.load(bundle.file(GRAPH))
    names = [node.name for node in model.graph.node]
    nodes = model.graph.node[: names.index("embed") + 1]
    tables = [t for t in model.graph.initializer if any(t.name in node.input for node in nodes)]
    inputs = [value for value in model.graph.input if value.name == "input_ids"]
    output = onnx.helper.make_tensor_value_info("embed", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "embedding", inputs, [output], tables)
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": np.array(ids, np.int32)})[0]


def test_an_int8_embedding_is_refused_where_it_saves_nothing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "hf", replace(MODEL, tie_word_embeddings=True)))
    with pytest.raises(UsageError, match="is this model's head, too"):
        choose_format(checkpoint, "onnxruntime", "exact", embedding="int8")
    weights = choose_format(checkpoint, "rtx", "w4a16", head="int8", embedding="int8")
    with pytest.raises(UsageError, match="no int8 table"):
        make_target("rtx", weights)
    with pytest.raises(UsageError, match="unknown embedding"):
        replace(weights, embedding="int4")
