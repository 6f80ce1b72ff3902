"""A real model on real text: SmolLM2-135M-Instruct (Q4_1 GGUF), exact and in the default 4-bit format."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from build_engine.checkpoint import Checkpoint
from edge.engine import Engine, open_engine
from edge.perplexity import perplexity
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.text import TextSettings, Tokenizer
from tests.reference import greedy_tokens, llama_from_gguf, reference_logits
from tests.text import english_text

WINDOW = 2048
EVALUATED_TOKENS = 8192


def run_edge(*arguments: str) -> str:
    """Standard output of the real command."""
    command = [sys.executable, "-m", "edge", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@dataclass(frozen=True)
class Model:
    """A bundle, opened."""

    bundle: Path
    engine: Engine
    tokenizer: Tokenizer

    def answer(self, question: str) -> str:
        """The greedy reply of `edge run`."""
        options = ["--prompt", question, "--temperature", "0", "--max-tokens", "48", "--context", "256"]
        return run_edge("run", str(self.bundle), *options)


def export(gguf: Path, out: Path, *options: str) -> Model:
    run_edge("export", str(gguf), "--out", str(out), *options)
    engine = open_engine(out, EngineOptions(context=WINDOW))
    assert engine.bundle.manifest.text is not None
    return Model(out, engine, Tokenizer.load(out, TextSettings.from_dict(engine.bundle.manifest.text)))


@pytest.fixture(scope="module")
def exact(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return export(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "exact", "--weights", "exact")


@pytest.fixture(scope="module")
def quantized(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return export(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "w4a16")


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path, smollm2: Checkpoint) -> PreTrainedModel:
    return llama_from_gguf(smollm2_gguf, smollm2.config)


@pytest.fixture(scope="module")
def prose(exact: Model) -> list[int]:
    try:
        text = english_text()
    except FileNotFoundError as error:
        pytest.fail(str(error), pytrace=False)
    return exact.tokenizer.encode(text[: 8 * EVALUATED_TOKENS], add_bos=False)[:EVALUATED_TOKENS]


PROMPTS: dict[str, Callable[[Tokenizer, list[int]], list[int]]] = {
    "prose": lambda tokenizer, prose: prose[:150],
    "prose, from the middle": lambda tokenizer, prose: prose[5000:5065],
    "chat": lambda tokenizer, prose: tokenizer.encode_chat(
        [{"role": "user", "content": "Explain in three sentences why the sky is blue."}]
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_exact_mode_says_what_transformers_says(
    name: str, exact: Model, reference: PreTrainedModel, prose: list[int]
) -> None:
    prompt = PROMPTS[name](exact.tokenizer, prose)
    difference = np.abs(exact.engine.logits(prompt, len(prompt)) - reference_logits(reference, prompt)).max()
    assert difference < 1e-3, f"max |difference| of the prompt's logits is {difference:.2e}"
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    assert [event.token_id for event in exact.engine.generate(prompt, params)] == greedy_tokens(reference, prompt, 64)


def test_exact_mode_knows_the_capital_of_france(exact: Model) -> None:
    assert "Paris" in exact.answer("What is the capital of France?")


def test_four_bits_know_the_capital_of_france(quantized: Model) -> None:
    assert "Paris" in quantized.answer("Tell me the capital of France.")


def test_four_bits_cost_less_than_three_percent_of_perplexity(exact: Model, quantized: Model, prose: list[int]) -> None:
    assert len(prose) == EVALUATED_TOKENS
    assert quantized.engine.bundle.manifest.weights["kind"] == "w4a16"
    reference, measured = (perplexity(model.engine, prose, WINDOW) for model in (exact, quantized))
    assert 5 < reference < 12, f"the exact model's perplexity is {reference:.3f}: it does not read English"
    assert abs(measured / reference - 1) < 0.03, f"perplexity {measured:.3f} in 4 bits, {reference:.3f} exact"
