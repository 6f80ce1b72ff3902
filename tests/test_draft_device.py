"""A draft exported for TensorRT: its float16 graph computes what its weights stand for, and its kernels are there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.draft_export import choose_draft
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.quantize import quantize_symmetric
from edge.bundle import DRAFT_GRAPH, GRAPH, open_bundle
from plugins.build.embed import module_file
from plugins.build.sass import read_cubin
from plugins.launch import Launch
from plugins.linear.launch import LinearShape, head, linear
from plugins.linear.meaning import weights as meaning
from tests.draft_reference import DraftReference
from tests.draft_samples import draft_config, draft_weights, write_draft
from tests.synthetic import random_weights, tiny_config, write_hf_checkpoint
from tests.test_draft import batch

SIZES = {"head_dim": 64, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}
BASE = tiny_config(**SIZES, vocab_size=330, tie_word_embeddings=False)
IDS = np.arange(3, 203, 2, dtype=np.int32)
PACKED = WeightFormat("w4a16", 64, symmetric=True, head="int8", linear="packed")
NATIVE = WeightFormat("w4a16", 64, symmetric=True, head="exact", linear="native")
KINDS = {"fp16": WeightFormat("fp16"), "packed": PACKED, "native": NATIVE}


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """What the codes of a matrix in groups of 64 stand for."""
    rows = quantize_symmetric(values, 64, bits)
    return meaning(rows.codes.reshape(len(values), -1), rows.scales.astype(np.float16), bits).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_float16_graph_computes_what_its_weights_stand_for(kind: str, tmp_path: Path) -> None:
    weights = KINDS[kind]
    write_hf_checkpoint(tmp_path / "base", BASE, dtype="float16")
    config = draft_config(BASE, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2)
    stored = write_draft(tmp_path / "draft", config, draft_weights(config), dtype=np.float16)
    base = open_checkpoint(tmp_path / "base")
    draft = choose_draft(tmp_path / "draft", base, weights, "jetson", IDS)
    bundle = open_bundle(export_bundle(base, tmp_path / "bundle", ExportOptions("jetson", weights, draft=draft)))
    section = bundle.manifest.draft
    assert section is not None and section.types["kv"] == "float16" and section.weights["linear"] == weights.linear

    of_base = {name: array.astype(np.float16).astype(np.float32) for name, array in random_weights(BASE).items()}
    rows = of_base["lm_head.weight"][IDS]
    if kind != "fp16":
        stored = {name: array if array.ndim == 1 else rounded(array, 4) for name, array in stored.items()}
    reference = DraftReference(
        BASE,
        stored,
        of_base["model.embed_tokens.weight"],
        rounded(rows, 8) if kind == "packed" else rows,
        4,
        2,
        config["rms_norm_eps"],
        section.model.logit_scale,
    )
    session = ort.InferenceSession(bundle.file(DRAFT_GRAPH), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["logits", "hidden_out", "kv_pool_out.0"]
    rng = np.random.default_rng(3)
    tokens, hidden = rng.integers(0, 330, 70), rng.standard_normal((70, 128)).astype(np.float32)
    step = batch(tokens, hidden, range(70), np.array([1, 0]), [0, 69])
    names = {value.name for value in session.get_inputs()}
    feeds = {name: array for name, array in step.inputs().items() if name in names}
    logits, y, _ = session.run(None, feeds | {"kv_pool.0": np.zeros((2, 2, 2, 64, 64), np.float16)})
    assert logits.dtype == y.dtype == np.float32
    for i in range(70):
        expected = reference.row(int(tokens[i]), hidden[i], i, i, range(i))
        if i in (0, 69):
            for ours, theirs in zip((logits[int(i > 0)], y[int(i > 0)]), expected, strict=True):
                assert np.abs(ours - theirs).max() < 0.01 * np.abs(theirs).max()


def test_a_bundle_has_the_kernels_of_its_drafts_nodes(tmp_path: Path) -> None:
    """fc has twice the inputs of any other, and the head fewer rows."""
    write_hf_checkpoint(tmp_path / "base", BASE, dtype="float16")
    config = draft_config(BASE, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2)
    write_draft(tmp_path / "draft", config, draft_weights(config))
    base = open_checkpoint(tmp_path / "base")
    draft = choose_draft(tmp_path / "draft", base, PACKED, "jetson", IDS, head="int4")
    bundle = open_bundle(export_bundle(base, tmp_path / "bundle", ExportOptions("jetson", PACKED, draft=draft)))
    symbols = read_cubin(bundle.file(module_file("sm_87")).read_bytes()).keys()
    for graph in (GRAPH, DRAFT_GRAPH):
        launches: list[Launch] = []
        for node in onnx.load(bundle.file(graph), load_external_data=False).graph.node:
            a = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            for tokens in (1, 8, 16, 64, 256):
                if node.op_type == "PackedLinear":
                    shape = LinearShape(tokens, a["n"], a["k"], a["bits"], a["group"], "half")
                    launches += [linear(shape, multiprocessors) for multiprocessors in (1, 16, 128)]
                elif node.op_type == "PackedHead":
                    launches += head(LinearShape(tokens, a["n"], a["k"], a["bits"], a["group"], "half"))
        wanted = {launch.kernel.symbol for launch in launches}
        assert wanted and wanted <= symbols, wanted - symbols
