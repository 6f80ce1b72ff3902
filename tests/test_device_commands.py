"""The commands a user types on a device, on the emulated driver: what they print, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.selftest_model import CONFIG
from edge.bundle import open_bundle
from edge.cli.app import run_command
from edge.executors import tensorrt_open
from edge.selftest.model import GoldenResult, golden
from edge.tensorrt import Flavour
from tests.device_engine import device_bundle, kernels_of, publish_engine
from tests.emulated import emulated_gpu
from tests.engine_stand_in import NAME, Api
from tests.synthetic import tiny_config, write_hf_checkpoint


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's runtime, which does not load an engine here."""
    monkeypatch.setattr(tensorrt_open, "load_flavour", lambda target: Flavour(NAME, Api()))


@pytest.fixture
def orin() -> Generator[None, None, None]:
    with emulated_gpu("sm_87", kernels_of(CONFIG)):
        yield


def edge(*words: str) -> int:
    return run_command(list(words), debug=False)


@pytest.fixture(scope="module")
def selftest_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the command, for a Jetson."""
    out = tmp_path_factory.mktemp("selftest") / "st"
    assert edge("export", "selftest", "--target", "jetson", "--out", str(out)) == 0
    publish_engine(open_bundle(out), "sm_87")
    return out


def test_selftest_checks_kernels_and_golden_tokens(
    orin: None, selftest_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edge("selftest", str(selftest_bundle), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["execution"] == "emulated here"
    assert report["golden"]["passed"] and report["golden"]["tokens"] == list(golden().tokens)
    assert all(vector["passed"] for model in report["models"] for vector in model["vectors"])


def test_wrong_tokens_are_one_sentence_and_exit_code_1(
    orin: None, selftest_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = golden().tokens
    wrong = GoldenResult((*truth[:5], truth[5] + 1, *truth[6:]), truth)
    monkeypatch.setattr("edge.selftest.model.run_golden", lambda engine: wrong)
    monkeypatch.setattr("edge.selftest.kernels.vectors_for", lambda model: [])
    assert edge("selftest", str(selftest_bundle)) == 1
    said = capsys.readouterr()
    assert f"golden token 6 of 32 is {truth[5] + 1} and must be {truth[5]}" in said.err
    assert "golden token 6 of 32" in " ".join(said.out.split())


def test_an_engine_that_was_never_built_is_asked_for(
    orin: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "st"
    assert edge("export", "selftest", "--target", "jetson", "--out", str(out)) == 0
    assert edge("selftest", str(out)) == 1
    assert "edge build" in capsys.readouterr().err


def test_run_and_logits_work_as_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(hidden_size=128, intermediate_size=256, head_dim=64, max_position_embeddings=512)
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "hf", config, tokenizer=True))
    bundle = device_bundle(checkpoint, tmp_path / "bundle")
    publish_engine(bundle, "sm_86")
    with emulated_gpu("sm_86", kernels_of(config)):
        words = ("--prompt", "the river", "--raw", "--context", "256", "--max-tokens", "20", "--json")
        assert edge("run", str(bundle.path), *words) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["bundle"]["executor"].startswith(NAME) and answer["bundle"]["target"] == "rtx"
        assert edge("run", str(bundle.path), *words, "--temperature", "0.8", "--seed", "3") == 0
        sampled = json.loads(capsys.readouterr().out)
        assert edge("run", str(bundle.path), *words, "--temperature", "0.8", "--seed", "3") == 0
        assert json.loads(capsys.readouterr().out)["text"] == sampled["text"]
        assert edge("run", str(bundle.path), "--prompt", "x", "--context", "100000") == 1
        assert "exceeds the 512 tokens that rtx-" in capsys.readouterr().err
