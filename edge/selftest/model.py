"""The second half of the self-test: a small model through the whole executor must give the tokens that it gave in CI.

The model is build_engine/selftest_model.py's, made by `edge export selftest`. Its prompt is prefilled in chunks, then
decoded in bursts, with LongRoPE's long list and chosen blocks: what no kernel shows alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edge.bundle import Bundle
from edge.engine import Engine
from edge.sampler import SamplingParams

MODEL_NAME = "selftest"  # of the bundle
CONTEXT = 512  # tokens, more than the prompt and the tokens after it
_GOLDEN = Path(__file__).with_name("golden.json")


@dataclass(frozen=True)
class Golden:
    """Token ids: a prompt, and what exact arithmetic continues it with."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class GoldenResult:
    """The tokens that came, and those that should have."""

    tokens: tuple[int, ...]
    expected: tuple[int, ...]

    @property
    def passed(self) -> bool:
        """Are they the same?"""
        return self.tokens == self.expected

    def describe(self) -> str:
        """One sentence."""
        if self.passed:
            return f"all {len(self.expected)} golden tokens came"
        pairs = enumerate(zip(self.tokens, self.expected, strict=False))
        first = next((i for i, (got, wanted) in pairs if got != wanted), len(self.tokens))
        got = self.tokens[first] if first < len(self.tokens) else "none"
        return (
            f"golden token {first + 1} of {len(self.expected)} is {got} and must be {self.expected[first]}; do not use "
            "this device with this build, and report it with the output of edge doctor --json"
        )


def golden() -> Golden:
    """The prompt and tokens of golden.json."""
    values = json.loads(_GOLDEN.read_text(encoding="utf-8"))
    return Golden(tuple(values["prompt"]), tuple(values["tokens"]))


def is_selftest_model(bundle: Bundle) -> bool:
    """Whether a bundle is the one that golden.json is about."""
    return bundle.manifest.name == MODEL_NAME


def run_golden(engine: Engine) -> GoldenResult:
    """Let an engine with the self-test model continue the prompt."""
    truth = golden()
    params = SamplingParams(max_tokens=len(truth.tokens), ignore_eos=True)
    return GoldenResult(tuple(event.token_id for event in engine.generate(truth.prompt, params)), truth.tokens)
