"""The second half of the self-test: a small model through the whole executor must give the tokens that it gave in CI.

The model is build_engine/selftest_model.py's, made by `edge export selftest`. Its prompt is prefilled in chunks, then
decoded in bursts, with LongRoPE's long list and chosen blocks: what no kernel shows alone.

Any other bundle may have golden tokens of its own, golden.json beside its manifest: those that a trusted machine gave
(`edge selftest BUNDLE --record`). They end before the first near tie, which another processor may decide otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from edge.bundle import Bundle
from edge.engine import Engine
from edge.errors import EdgeError
from edge.sampler import SamplingParams
from edge.whole_file import whole_file

MODEL_NAME = "selftest"  # of the bundle
CONTEXT = 512  # tokens, more than the prompt and the tokens after it
GOLDEN = "golden.json"  # in a bundle, and beside this file
_GOLDEN = Path(__file__).with_name(GOLDEN)
_PROMPT, _TOKENS, _FEWEST = 48, 16, 4  # of a record: tokens of the prompt, most and fewest tokens after it
_TIE = 0.1  # natural logarithm of two probabilities' ratio, below which rounding may decide between them


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


def golden_of(bundle: Bundle) -> Golden | None:
    """A bundle's golden tokens; None if it has none. EdgeError if they cannot be read."""
    if is_selftest_model(bundle):
        return golden()
    path = bundle.file(GOLDEN)
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        lists = [values[name] for name in ("prompt", "tokens")]
        if not all(ids and all(type(i) is int and 0 <= i < bundle.config.vocab_size for i in ids) for ids in lists):
            raise ValueError("its lists are not of this model's token ids")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EdgeError(f"{path} is damaged ({error}); record it again with edge selftest --record") from None
    return Golden(*map(tuple, lists))


def record_golden(engine: Engine) -> Golden:
    """Write golden.json into the engine's bundle: of some prompts of random ids the first with enough clear tokens.

    EdgeError if there is none.
    """
    length = min(_PROMPT, engine.max_context // 2)
    params = SamplingParams(max_tokens=min(_TOKENS, engine.max_context - length), ignore_eos=True, logprobs=2)
    for seed in range(8):
        raw = np.random.PCG64(seed).random_raw(length) >> np.uint64(24)
        prompt = tuple(int(i) for i in raw % np.uint64(engine.vocab_size))
        events = [(event.token_id, event.logprobs) for event in engine.generate(prompt, params)]
        clear = takewhile(lambda event: event[1] is not None and _margin(event[1].top) >= _TIE, events)
        tokens = tuple(token for token, _ in clear)
        if len(tokens) >= _FEWEST:
            record = Golden(prompt, tokens)
            with whole_file(engine.bundle.file(GOLDEN)) as file:
                file.write(f"{json.dumps(asdict(record))}\n".encode())
            return record
    raise EdgeError(
        "the model is in doubt about every token, so that no golden ones can be recorded; it seems untrained"
    )


def run_golden(engine: Engine) -> GoldenResult:
    """Let an engine continue the prompt of its bundle's golden tokens."""
    truth = golden_of(engine.bundle)
    assert truth is not None
    params = SamplingParams(max_tokens=len(truth.tokens), ignore_eos=True)
    return GoldenResult(tuple(event.token_id for event in engine.generate(truth.prompt, params)), truth.tokens)


def _margin(top: Sequence[tuple[int, float]]) -> float:
    """How much likelier the first token is than the second, as a logarithm."""
    return top[0][1] - top[1][1]
