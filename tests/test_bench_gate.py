"""The quality gate: it passes what works, fails what is wrong, and says why where it cannot tell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bench import gate
from edge.bench.checks import FAILED, NOT_POSSIBLE, PASSED, Check, Gate
from edge.bench.gate import run_gate
from edge.cli.app import run_command
from edge.engine import Engine, open_engine
from edge.errors import EdgeError
from edge.executor import StepBatch, StepResult
from edge.generation import TokenEvent
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from tests.wrapped_executor import WrappedExecutor

OPTIONS = EngineOptions(context=1024, threads=2, prefix_cache=False)


@pytest.fixture(scope="module")
def recall_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was trained to find needles."""
    checkpoint = open_checkpoint(Path(__file__).parent / "recall" / "model")
    out = tmp_path_factory.mktemp("recall") / "bundle"
    return export_bundle(checkpoint, out, ExportOptions(weights=WeightFormat("exact")))


def outcomes(engine: Engine) -> dict[str, str]:
    return {check.name: check.outcome for check in run_gate(engine).checks}


def test_a_model_that_finds_needles_passes(recall_bundle: Path) -> None:
    found = outcomes(open_engine(recall_bundle, OPTIONS))
    assert found == {"golden tokens": NOT_POSSIBLE, "same tokens twice": PASSED, "needle": PASSED}


class Forgetful(WrappedExecutor):
    """Gives the logits of another token's row in the vocabulary: fast and wrong."""

    def step(self, batch: StepBatch) -> StepResult:
        result = super().step(batch)
        return StepResult(result.logits[:, ::-1].copy(), result.hidden)


def test_wrong_logits_fail_the_needle(recall_bundle: Path) -> None:
    engine = open_engine(recall_bundle, OPTIONS)
    Forgetful(engine)
    result = run_gate(engine)
    assert {c.name: c.outcome for c in result.checks}["needle"] == FAILED
    assert result.failure is not None and "needle: 0 of 4 found in 512 tokens" in result.failure


class Racing(Forgetful):
    """Every other prompt is answered from reversed logits."""

    prompts = 0

    def step(self, batch: StepBatch) -> StepResult:
        if batch.positions[0] == 0:
            self.prompts += 1
        return super().step(batch) if self.prompts % 2 else self.inner.step(batch)


def test_tokens_that_differ_the_second_time_fail(tiny_bundle: Path) -> None:
    engine = open_engine(tiny_bundle, OPTIONS)
    Racing(engine)
    failure = run_gate(engine).failure
    assert failure is not None and "same tokens twice: token 1 after the same 128 is" in failure


def test_an_error_of_the_engine_fails_the_check_that_met_it(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(tiny_bundle, OPTIONS)

    def refuse(prompt: Sequence[int], params: SamplingParams) -> Iterator[TokenEvent]:
        raise EdgeError("no logit was finite")

    monkeypatch.setattr(engine, "generate", refuse)
    checks = {check.name: check for check in run_gate(engine).checks}
    assert checks["same tokens twice"] == Check("same tokens twice", FAILED, "no logit was finite")


def test_a_context_too_short_is_no_failure(recall_bundle: Path) -> None:
    engine = open_engine(recall_bundle, EngineOptions(context=16, threads=1))
    checks = {check.name: check for check in run_gate(engine).checks}
    assert checks["same tokens twice"].outcome == PASSED
    assert checks["needle"].outcome == NOT_POSSIBLE and "too short" in checks["needle"].detail


def test_a_gate_without_a_failed_check_has_none() -> None:
    assert Gate((Check("a", PASSED, ""), Check("b", NOT_POSSIBLE, "because"))).failure is None


@pytest.mark.parametrize(("option", "code"), [("--gate", 1), ("--no-gate", 0)])
def test_a_failed_gate_is_exit_code_1_after_the_report(
    option: str,
    code: int,
    tiny_bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate, "_needle", lambda engine: (FAILED, "0 of 4 found"))
    workload = ("--contexts", "16", "--new-tokens", "2", "--repeat", "1", "--output", str(tmp_path / "r.json"))
    assert run_command(["bench", str(tiny_bundle), *workload, option], debug=False) == code
    said = capfd.readouterr()
    written = json.loads((tmp_path / "r.json").read_text())
    if code:
        assert "the quality gate failed: needle: 0 of 4 found" in said.err
        assert "Quality gate" in said.out and written["gate"]["checks"][2]["outcome"] == FAILED
    else:
        assert written["gate"] is None and "Quality gate" not in said.out
