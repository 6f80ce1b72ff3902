"""`edge bench` on the emulated driver: batches, ledger, roofline, gate and engine hashes, as on a device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import edge.bench
from build_engine.checkpoint import open_checkpoint
from edge.bench.bandwidth import copy_bandwidth, device_limits
from edge.bundle import hash_file
from edge.cli.app import run_command
from edge.cuda import CudaError, open_device
from edge.engine_file import read_engine
from edge.executors import tensorrt_open
from edge.tensorrt import Flavour
from tests.device_engine import device_bundle, kernels_of, publish_engine
from tests.emulated import emulated_gpu
from tests.engine_stand_in import NAME, Api
from tests.synthetic import tiny_config, write_hf_checkpoint

CONFIG = tiny_config(hidden_size=128, intermediate_size=256, head_dim=64, max_position_embeddings=512)


def test_a_device_is_reported_like_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_open, "load_flavour", lambda target: Flavour(NAME, Api()))
    bundle = device_bundle(open_checkpoint(write_hf_checkpoint(tmp_path / "hf", CONFIG)), tmp_path / "bundle")
    file = publish_engine(bundle, "sm_86")
    words = ("--contexts", "40,900", "--batch", "1,3,9", "--new-tokens", "4", "--repeat", "1", "--json")
    with emulated_gpu("sm_86", kernels_of(CONFIG)):
        assert run_command(["bench", str(bundle.path), *words], debug=False) == 0
        said = capsys.readouterr()
        report = json.loads(said.out)
    schema = json.loads(Path(edge.bench.__file__).with_name("report.schema.json").read_text())
    Draft202012Validator(schema).validate(report)
    assert [case["case"]["batch"] for case in report["cases"]] == [1, 3]
    reasons = {(s["case"]["prompt_tokens"], s["case"]["batch"]): (s["needs"], s["has"]) for s in report["skipped"]}
    assert reasons[40, 9] == ("9 sequences at once", "4")
    assert reasons[900, 1] == ("a context of 904 tokens", "512 (the engine's context)")
    assert "Emulated GPU" in report["execution"]

    lines = {line["name"]: line for line in report["ledger"]}
    assert lines["kv cache"]["measured"] == lines["kv cache"]["planned"] > 0
    limits = report["roofline"]["limits"]
    assert limits["gb_s"] == 360 and "emulated" in limits["bandwidth_source"] and limits["tflops"] > 20
    one, three = report["roofline"]["rows"]
    assert three["step"]["kv"] == 3 * one["step"]["kv"] and three["step"]["weights"] == one["step"]["weights"]
    assert 0 < one["decode_share"] < 1 and 0 < one["prefill_share"] < 1

    assert [check["outcome"] for check in report["gate"]["checks"]] == ["not possible", "passed", "not possible"]
    recipe = read_engine(file)
    assert recipe is not None
    assert report["identity"]["engine"]["key"] == recipe.recipe.key
    assert report["identity"]["engine"]["sha256"] == hash_file(file)


def test_an_unknown_device_is_measured_by_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.bench.bandwidth.MOST_BYTES", 4 << 20)
    with emulated_gpu("sm_86", memory=64 << 20):
        device = open_device()
        limits = device_limits(replace(device, name="NVIDIA GeForce RTX 4070"), "")
        assert limits.gb_s > 0 and limits.tflops is None
        assert "copy of 1 MiB on the device" in limits.bandwidth_source
        with pytest.raises(CudaError, match="80 MiB cannot be had"):
            copy_bandwidth(40 << 20)
