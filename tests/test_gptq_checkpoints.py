"""Int4 checkpoints in GPTQ's and Marlin's order: what was stored comes out to the bit, what is amiss is named."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from build_engine import marlin
from build_engine.checkpoint import Checkpoint, LazyTensor, expected_shapes, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.gptq_checkpoint import GptqFormat, open_gptq_tensors
from build_engine.graph import build_graph
from build_engine.safetensors_file import read_safetensors
from edge.bundle import GRAPH, open_bundle
from edge.config import ModelConfig
from edge.errors import EdgeError
from plugins.block_linear.pack import unpack_codes
from plugins.tile_linear.pack import unpack_tiles
from tests import reference
from tests.command import edge
from tests.gptq_samples import (
    Int4Layer,
    edit_tensors,
    gptq_tensors,
    marlin_tensors,
    quantization_config,
    random_layer,
    write_gptq_folder,
)
from tests.synthetic import hf_config, random_weights, tiny_config, write_hf_checkpoint

# k and v of 32 rows each, half of what Marlin permutes together.
CONFIG = tiny_config(hidden_size=128, intermediate_size=256, num_attention_heads=8)
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def require_layers(checkpoint: Checkpoint, layers: dict[str, Int4Layer], group: int, stored_as: str) -> None:
    """Every int4 matrix has the layer's values, codes and scales, whole and in part; the others are as they were."""
    weights = random_weights(checkpoint.config)
    assert set(checkpoint.tensors) == {name for name, _ in expected_shapes(checkpoint.config)}
    for name, tensor in checkpoint.tensors.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert tensor.codes is None
            assert np.array_equal(tensor.read(slice(None)), weights[name].astype(np.float16))
            continue
        assert (tensor.shape, tensor.dtype, tensor.stored_as) == (layer.codes.shape, np.float32, stored_as)
        assert tensor.codes is not None
        assert (tensor.codes.bits, tensor.codes.zero) == (4, 8)
        assert tensor.codes.group == (tensor.shape[1] if group == -1 else group)
        for rows in (slice(None), slice(3, 21), slice(30, None), slice(5, 5)):
            values, (codes, scales) = tensor.read(rows), tensor.codes.read(rows)
            assert (values.dtype, codes.dtype, scales.dtype) == (np.float32, np.uint8, np.float32)
            assert np.array_equal(values.view(np.uint32), layer.values()[rows].view(np.uint32))
            assert np.array_equal(codes, layer.codes[rows]) and np.array_equal(scales, layer.scales[rows])


@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq_folder_gives_its_codes_and_values(tmp_path: Path, group: int, checkpoint_format: str) -> None:
    layers = write_gptq_folder(tmp_path, CONFIG, group, checkpoint_format=checkpoint_format, shards=2)
    require_layers(open_checkpoint(tmp_path), layers, group, "GPTQ int4")


@pytest.mark.parametrize("group", [-1, 32, 128])
def test_marlin_folder_gives_its_codes_and_values(tmp_path: Path, group: int) -> None:
    """With groups of 128, layers of 128 inputs have one scale a row, whose order is another."""
    layers = write_gptq_folder(tmp_path, CONFIG, group, marlin=True)
    assert "model.layers.0.self_attn.qkv_proj.qweight" in load_file(tmp_path / "model_gptq.safetensors")
    require_layers(open_checkpoint(tmp_path), layers, group, "Marlin int4")


def test_values_are_the_spec_s_formula(tmp_path: Path) -> None:
    """w[n, k] = scales[g_idx[k], n] (q - zero), element by element from the file (spec 3.1)."""
    write_gptq_folder(tmp_path, CONFIG, 32)
    file = load_file(tmp_path / "model.safetensors")
    words, scales, zeros, g_idx = (file[f"{Q}.{kind}"] for kind in ("qweight", "scales", "qzeros", "g_idx"))
    read = open_checkpoint(tmp_path).tensors[f"{Q}.weight"].read(slice(None))
    for n, k in np.ndindex(read.shape):
        code = int(words[k // 8, n]) >> 4 * (k % 8) & 15
        zero = (int(zeros[g_idx[k], n // 8]) >> 4 * (n % 8) & 15) + 1
        assert read[n, k] == np.float32(scales[g_idx[k], n]) * (code - zero)


def test_marlin_orders_are_the_golden_ones() -> None:
    """Spec 3.3."""
    codes = marlin.CODE_ORDER.tolist()
    assert codes[:16] == [0, 128, 8, 136, 16, 144, 24, 152, 256, 384, 264, 392, 272, 400, 280, 408]
    assert codes[32:40] == [32, 160, 40, 168, 48, 176, 56, 184] and codes[-1] == 1023
    assert sorted(codes) == list(range(1024))
    assert marlin.GROUPED_SCALE_ORDER.tolist()[:10] == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9]
    assert sorted(marlin.GROUPED_SCALE_ORDER) == list(range(64))
    assert marlin.SINGLE_SCALE_ORDER.tolist()[:19] == [
        0,
        1,
        8,
        9,
        16,
        17,
        24,
        25,
        2,
        3,
        10,
        11,
        18,
        19,
        26,
        27,
        4,
        5,
        12,
    ]
    assert sorted(marlin.SINGLE_SCALE_ORDER) == list(range(32))


def open_head(tensors: dict[str, np.ndarray], group: int, shape: tuple[int, int]) -> LazyTensor:
    """lm_head of `shape` out of its int4 tensors, without a file."""
    found = {name: LazyTensor(name, a.shape, a.dtype, "", a.__getitem__) for name, a in tensors.items()}
    config = tiny_config(vocab_size=shape[0], hidden_size=shape[1], tie_word_embeddings=False)
    gptq = GptqFormat(group, stored_zero=7, desc_act=False, lm_head=True)
    return open_gptq_tensors(found, gptq, dict(expected_shapes(config)), Path("folder"))["lm_head.weight"]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), group=st.sampled_from([-1, 32, 64, 128]), seed=st.integers(0, 9999))
def test_packing_for_gptq_and_for_marlin_loses_nothing(data: st.DataObject, group: int, seed: int) -> None:
    n = 64 * data.draw(st.integers(1, 4))
    k = data.draw(st.integers(1, 9)) * (16 if group == -1 else group)
    layer = random_layer(np.random.default_rng(seed), n, k, group)
    first = data.draw(st.integers(0, n))
    rows = slice(first, data.draw(st.integers(first, n)))
    for pack in (gptq_tensors, marlin_tensors):
        tensor = open_head(pack({"lm_head": layer}), group, (n, k))
        assert tensor.codes is not None
        codes, scales = tensor.codes.read(rows)
        assert np.array_equal(codes, layer.codes[rows]) and np.array_equal(scales, layer.scales[rows])
        assert np.array_equal(tensor.read(rows), layer.values()[rows])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scales_of_other_types(tmp_path: Path, dtype: str) -> None:
    layers = write_gptq_folder(tmp_path, CONFIG, 64)
    scales = layers[Q].scales.astype(np.dtype(dtype) if dtype == "float32" else "bfloat16")
    edit_tensors(tmp_path, lambda t: t.update({f"{Q}.scales": scales.T}))
    tensor = open_checkpoint(tmp_path).tensors[f"{Q}.weight"]
    assert tensor.codes is not None
    assert np.array_equal(tensor.codes.read(slice(None))[1], scales.astype(np.float32))
    assert np.array_equal(tensor.read(slice(None)), Int4Layer(layers[Q].codes, scales).values())


# ---- what may be absent, and what a quantization_config may leave open


def drop(*kinds: str) -> Any:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith(kinds)]:
            del tensors[name]

    return edit


def test_group_index_and_zero_points_may_be_absent(tmp_path: Path) -> None:
    layers = write_gptq_folder(tmp_path, CONFIG, 64)
    edit_tensors(tmp_path, drop(".g_idx", ".qzeros"))
    require_layers(open_checkpoint(tmp_path), layers, 64, "GPTQ int4")


def test_only_the_group_size_must_be_said(tmp_path: Path) -> None:
    """It is all that CPM.cu asks for (spec 3.2)."""
    kept = {key: ... for key in quantization_config(64) if key not in ("group_size", "lm_head")}
    layers = write_gptq_folder(tmp_path, CONFIG, 64, marlin=True, **kept)
    require_layers(open_checkpoint(tmp_path), layers, 64, "Marlin int4")


def test_desc_act_with_inputs_in_order_is_read(tmp_path: Path) -> None:
    """Static groups leave g_idx in order; without the tensor nothing says so."""
    layers = write_gptq_folder(tmp_path, CONFIG, 64, desc_act=True)
    require_layers(open_checkpoint(tmp_path), layers, 64, "GPTQ int4")
    edit_tensors(tmp_path, drop(".g_idx"))
    with pytest.raises(EdgeError, match=r"desc_act is true, but tensor .*_proj\.g_idx.* is missing"):
        open_checkpoint(tmp_path)


def test_a_layer_may_be_left_unquantised(tmp_path: Path) -> None:
    layers = write_gptq_folder(tmp_path, CONFIG, 64)
    plain = layers.pop(DOWN).values()

    def edit(tensors: dict[str, np.ndarray]) -> None:
        for kind in ("qweight", "scales", "qzeros", "g_idx"):
            del tensors[f"{DOWN}.{kind}"]
        tensors[f"{DOWN}.weight"] = plain

    edit_tensors(tmp_path, edit)
    tensor = open_checkpoint(tmp_path).tensors[f"{DOWN}.weight"]
    assert tensor.codes is None and np.array_equal(tensor.read(slice(None)), plain)


def test_the_head_is_int4_only_where_the_config_says_so(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=False)
    layers = write_gptq_folder(tmp_path, config, 32, lm_head=True)
    assert "lm_head" in layers
    require_layers(open_checkpoint(tmp_path), layers, 32, "GPTQ int4")
    set_quantization(tmp_path, quantization_config(32))
    with pytest.raises(EdgeError, match=r"lm_head\.qweight is int4, but .* does not say lm_head: true"):
        open_checkpoint(tmp_path)


def test_the_marlin_file_is_the_one_that_counts(tmp_path: Path) -> None:
    """As in CPM.cu, where other files lie beside it (spec 3.2)."""
    layers = write_gptq_folder(tmp_path, CONFIG, 32, marlin=True)
    (tmp_path / "model_gptq.safetensors").rename(tmp_path / "model_gptq_marlin.safetensors")
    for other in ("model_gptq.safetensors", "model.safetensors"):
        save_file({"fc.weight": np.zeros(1, np.float16)}, tmp_path / other)
    require_layers(open_checkpoint(tmp_path), layers, 32, "Marlin int4")


# ---- refusals


def set_quantization(folder: Path, said: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq")
    write_gptq_folder(folder, CONFIG, 32)
    return folder


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"quant_method": "awq"}, "quantised with awq, which is not supported"),
        ({"quant_method": "compressed-tensors"}, "quantised with compressed-tensors"),
        ({"quant_method": "bitsandbytes"}, "quantised with bitsandbytes"),
        ({"quant_method": "fp8"}, "quantised with fp8"),
        ({"quant_method": 4}, "quant_method is 4 but must be a string"),
        ({"bits": 8}, "bits is 8, but of GPTQ weights only 4 "),
        ({"sym": False}, "sym is false, but asymmetric int4 is not supported"),
        ({"group_size": ...}, "group_size is missing"),
        ({"group_size": 256}, "group_size is 256, but of GPTQ weights only -1, 32, 64, 128 "),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is marlin, but of GPTQ weights only gptq, gptq_v2 "),
        ({"desc_act": "no"}, "desc_act is 'no' but must be true or false"),
        ({"group_size": 64}, r"\.scales has shape \[8, 128\], as group_size 32 would have, but .*64 needs \[4, 128\]"),
        ({"group_size": -1}, r"\.scales has shape \[8, 128\], as group_size 32 would have, but .*-1 needs \[1, 128\]"),
        ({"checkpoint_format": "gptq_v2"}, r"qzeros holds 7 for row 0, group 0, but .* mean 8 everywhere"),
    ],
)
def test_a_config_that_lies_or_asks_too_much(sound_folder: Path, changes: dict[str, Any], complaint: str) -> None:
    require_complaint(sound_folder, quantization_config(32, **changes), complaint)


def require_complaint(folder: Path, said: dict[str, Any], complaint: str) -> None:
    """Opening, or else reading, raises this one sentence."""
    set_quantization(folder, said)
    with pytest.raises(EdgeError, match=complaint) as error:
        for tensor in open_checkpoint(folder).tensors.values():
            for rows in (slice(0, 60), slice(60, None)):
                tensor.read(rows)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def put(name: str, change: Any) -> Any:
    """An edit that replaces one tensor by what `change` makes of it."""
    return lambda tensors: tensors.update({name: change(tensors[name])})


def with_entry(at: tuple[int, ...], value: float) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[at] = value
        return array

    return change


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (drop("qweight", "g_idx", "scales", "qzeros"), "has a quantization_config, but no tensor is int4"),
        (drop("layers.0.self_attn.q_proj.scales"), rf"{Q}\.scales is missing"),
        (put(f"{Q}.qweight", lambda a: np.repeat(a, 2, 0)), r"has shape \[32, 128\], that of 8-bit codes, but"),
        (put(f"{Q}.qweight", lambda a: a[:12]), r"has shape \[12, 128\], that of 3-bit codes"),
        (put(f"{Q}.qweight", lambda a: a[:, :96]), r"has shape \[16, 96\], but a layer of 128 outputs and 128 inputs"),
        (put(f"{Q}.qweight", lambda a: a[:10]), r"needs \[16, 128\], or \[8, 256\] in Marlin's order"),
        (put(f"{Q}.qweight", lambda a: a.astype(np.float32)), r"q_proj\.qweight is stored as F32; supported are I32"),
        (put(f"{Q}.scales", lambda a: a.astype(np.int32)), r"scales is stored as I32; supported are BF16, F16, F32"),
        (put(f"{Q}.scales", lambda a: a[:, :64]), r"scales has shape \[4, 64\], but .* needs \[4, 128\]"),
        (put(f"{Q}.scales", lambda a: a.reshape(-1)), r"scales has shape \[512\], but .* needs \[4, 128\]"),
        (put(f"{Q}.qzeros", lambda a: a[:2]), r"qzeros has shape \[2, 16\], as group_size 64 would have"),
        (put(f"{Q}.g_idx", lambda a: a[:64]), r"g_idx has shape \[64\], but 128 inputs need \[128\]"),
        (put(f"{Q}.g_idx", lambda a: a[::-1]), r"g_idx orders the inputs by activation \(desc_act\), which is not"),
        (put(f"{Q}.g_idx", lambda a: a // 2), r"puts input 32 in group 0, but with group_size 32 it is in 1"),
        (put(f"{Q}.g_idx", with_entry((5,), -1)), r"puts input 5 in group -1, but"),
        (lambda t: t.update({f"{Q}.weight": np.zeros((128, 128), np.float16)}), rf"{Q}\.weight is also stored as"),
        (
            lambda t: t.update({"model.norm.qweight": np.zeros((1, 8), np.int32)}),
            r"no linear layer model\.norm",
        ),
        (lambda t: t.update({"lm_head.scales": np.ones((1, 8), np.float16)}), r"lm_head\.scales has no place"),
        (put(f"{DOWN}.scales", with_entry((3, 70), 0)), r"scales holds 0\.0 for row 70, group 3, but scales must be"),
        (put(f"{DOWN}.scales", with_entry((0, 0), -1e-3)), r"scales holds -0\.0.* for row 0, group 0, but"),
        (put(f"{DOWN}.scales", with_entry((7, 127), np.nan)), r"scales holds nan for row 127, group 7, but"),
        (put(f"{DOWN}.scales", with_entry((1, 64), np.inf)), r"scales holds inf for row 64, group 1, but"),
        (put(f"{DOWN}.qzeros", with_entry((2, 9), 0x77767777)), r"qzeros holds 6 for row 76, group 2, but .* mean 7"),
    ],
)
def test_tensors_that_contradict_the_config(tmp_path: Path, edit: Any, complaint: str) -> None:
    write_gptq_folder(tmp_path, CONFIG, 32)
    edit_tensors(tmp_path, edit)
    require_complaint(tmp_path, quantization_config(32), complaint)


def test_a_bad_scale_is_named_by_its_row_in_marlins_file_too(tmp_path: Path) -> None:
    """The file's column is not the row; the fused layer's row is, whichever rows are read."""
    layers = write_gptq_folder(tmp_path, CONFIG, 32, marlin=True)
    gate = layers["model.layers.1.mlp.gate_proj"]
    layers["model.layers.1.mlp.up_proj"].scales[131, 2] = -gate.scales[0, 0]
    save_plain = {n: a for n, a in load_file(tmp_path / "model_gptq.safetensors").items() if n.endswith(".weight")}
    save_file(save_plain | marlin_tensors(layers), tmp_path / "model_gptq.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.tensors["model.layers.1.mlp.gate_proj.weight"].read(slice(None))
    up = checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    up.read(slice(0, 131))
    with pytest.raises(EdgeError, match=r"gate_up_proj\.scales holds -0\.\d+ for row 387, group 2, but"):
        up.read(slice(100, 140))


def test_groups_must_divide_the_inputs(tmp_path: Path) -> None:
    write_gptq_folder(tmp_path, tiny_config(intermediate_size=96), 32)
    require_complaint(tmp_path, quantization_config(64), r"the 96 inputs of .*down_proj .* multiple of .*group_size 64")


def test_int4_tensors_without_a_quantization_config(tmp_path: Path) -> None:
    write_gptq_folder(tmp_path, CONFIG, 32)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    with pytest.raises(EdgeError, match=r"is GPTQ or AWQ int4, but config\.json has no quantization_config"):
        open_checkpoint(tmp_path)


def test_a_plain_checkpoint_that_claims_to_be_gptq(tmp_path: Path) -> None:
    write_hf_checkpoint(tmp_path, CONFIG)
    require_complaint(tmp_path, quantization_config(32), "has a quantization_config, but no tensor is int4")


# ---- memory


def mapped_bytes(path: Path) -> int:
    """Resident bytes of the process's maps of `path`."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@pytest.mark.parametrize("is_marlin", [False, True], ids=["gptq", "marlin"])
def test_a_read_costs_what_its_rows_do(tmp_path: Path, is_marlin: bool) -> None:
    """Rows are columns of the file, yet no more is copied than they need, and the pages can be let go."""
    n, k = 8192, 1024
    path = tmp_path / "model.safetensors"
    words = np.zeros((k // 16, 2 * n) if is_marlin else (k // 8, n), np.int32)
    save_file({"lm_head.qweight": words, "lm_head.scales": np.ones((k // 128, n), np.float16)}, path)
    config = tiny_config(vocab_size=n, hidden_size=k, tie_word_embeddings=False)
    gptq = GptqFormat(128, stored_zero=7, desc_act=False, lm_head=True)
    tensor = open_gptq_tensors(read_safetensors(path), gptq, dict(expected_shapes(config)), tmp_path)["lm_head.weight"]
    tensor.read(slice(0, 1))
    tracemalloc.start()
    rows = tensor.read(slice(4096, 4096 + 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.nbytes == 1 << 20 and peak < 2 * rows.nbytes
    assert mapped_bytes(path) > 1 << 18
    tensor.release()
    assert mapped_bytes(path) == 0


# ---- through `edge export`


def write_dequantised(folder: Path, config: ModelConfig, layers: dict[str, Int4Layer]) -> Path:
    """The same model without int4: float32 matrices, the other tensors as they are."""
    write_hf_checkpoint(folder, config, dtype="float16")
    matrices = {f"{name}.weight": layer.values() for name, layer in layers.items()}
    edit_tensors(folder, lambda tensors: tensors.update(matrices))
    return folder


@pytest.mark.parametrize("is_marlin", [False, True], ids=["gptq", "marlin"])
def test_exact_weights_are_those_of_the_dequantised_checkpoint(tmp_path: Path, is_marlin: bool) -> None:
    layers = write_gptq_folder(tmp_path / "int4", CONFIG, 64, marlin=is_marlin)
    write_dequantised(tmp_path / "plain", CONFIG, layers)
    exact = ExportOptions(weights=WeightFormat("exact"))
    bundles = {
        name: open_bundle(export_bundle(open_checkpoint(tmp_path / name), tmp_path / f"{name}-bundle", exact))
        for name in ("int4", "plain")
    }
    assert bundles["int4"].manifest.files == bundles["plain"].manifest.files


def test_int4_codes_reach_the_bundle_as_they_are(tmp_path: Path) -> None:
    """Of every projection, all codes and scales; and the logits are those of the values, by an independent model."""
    layers = write_gptq_folder(tmp_path / "int4", CONFIG, 64)
    bundle = tmp_path / "bundle"
    exported = edge("export", tmp_path / "int4", "--out", bundle, "--json")
    assert exported.returncode == 0, exported.stderr.decode()
    graph = onnx.load(bundle / GRAPH).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    projections = {node.name: node for node in graph.node if node.op_type == "BlockLinear"}
    taken_over = set()
    for linear in build_graph(CONFIG).graph.node:
        names = next((a.strings for a in linear.attribute if a.name == "weights"), [])
        modules = [name.decode().removesuffix(".weight") for name in names]
        if linear.op_type != "Linear" or not set(modules) <= set(layers):
            continue
        _, packed, scales = projections[linear.name].input
        expected = np.concatenate([layers[module].codes for module in modules])
        assert np.array_equal(unpack_codes(stored[packed], 4, *expected.shape), expected)
        expected_scales = np.concatenate([layers[module].scales for module in modules])
        assert np.array_equal(unpack_tiles(stored[scales], len(expected)), expected_scales.astype(np.float32))
        taken_over |= set(modules)
    assert taken_over == set(layers)

    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 40)
    np.save(tmp_path / "ids.npy", ids)
    files = ("--ids-file", tmp_path / "ids.npy", "--out", tmp_path / "logits.npy", "--last", len(ids))
    computed = edge("logits", bundle, *files)
    assert computed.returncode == 0, computed.stderr.decode()
    state = reference.read_safetensors(write_dequantised(tmp_path / "plain", CONFIG, layers))
    wanted = reference.reference_logits(reference.granite(CONFIG, state), ids.tolist())
    # Activations of 8 bits and a head of 8: each of them off by up to half a step in 127.
    assert np.std(np.load(tmp_path / "logits.npy") - wanted) < 0.02 * wanted.std()
