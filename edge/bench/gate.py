"""The quality gate of a report: some seconds that tell a working engine from one that is fast and wrong."""

from __future__ import annotations

from functools import partial

import numpy as np

from edge.bench.checks import FAILED, NOT_POSSIBLE, PASSED, Check, Gate
from edge.engine import Engine
from edge.errors import EdgeError
from edge.eval.run import ask, has_chat_template, is_one_token, prompt_encoder
from edge.eval.tasks import HaystackPlan, make_haystacks, recognise_language
from edge.sampler import SamplingParams
from edge.selftest.model import golden, is_selftest_model, run_golden
from edge.text import TextSettings, Tokenizer

PROMPT_TOKENS, NEW_TOKENS = 128, 16  # of the prompt that is answered twice
HAYSTACK_TOKENS, QUESTIONS = 512, 4  # of the needle task
NEEDED = 1  # needles to find: small models miss some, and nobody guesses seven digits


def run_gate(engine: Engine) -> Gate:
    """All checks; an error of the engine fails the check that met it."""
    checks = []
    for name, check in (("golden tokens", _golden), ("same tokens twice", _repeated), ("needle", _needle)):
        try:
            outcome, detail = check(engine)
        except EdgeError as error:
            outcome, detail = FAILED, str(error)
        checks.append(Check(name, outcome, detail))
    return Gate(tuple(checks))


def _golden(engine: Engine) -> tuple[str, str]:
    """The self-test's model must give the tokens that exact arithmetic gives."""
    if not is_selftest_model(engine.bundle):
        return NOT_POSSIBLE, "only the model of `edge export selftest` has recorded tokens"
    truth = golden()
    if (wanted := len(truth.prompt) + len(truth.tokens)) > engine.max_context:
        return NOT_POSSIBLE, f"it needs a context of {wanted} tokens and there are {engine.max_context}"
    result = run_golden(engine)
    return (PASSED if result.passed else FAILED), result.describe()


def _repeated(engine: Engine) -> tuple[str, str]:
    """A prompt that is computed twice must have the same greedy tokens: races and uninitialised memory show here."""
    new = min(NEW_TOKENS, engine.max_context - 1)
    length = min(PROMPT_TOKENS, engine.max_context - new)
    prompt = np.random.default_rng(0).integers(engine.vocab_size, size=length).tolist()
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    first, second = ([event.token_id for event in engine.generate(prompt, params)] for _ in range(2))
    if first == second:
        return PASSED, f"{new} greedy tokens after {length} came twice"
    place = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    return FAILED, f"token {place + 1} after the same {length} is {first[place]}, and {second[place]} the second time"


def _needle(engine: Engine) -> tuple[str, str]:
    """RULER's single needle in a short haystack, by the bundle's own tokenizer and template."""
    text = engine.bundle.manifest.text
    if text is None:
        return NOT_POSSIBLE, "the bundle has no tokenizer"
    tokenizer = Tokenizer.load(engine.bundle.path, TextSettings.from_dict(text))
    language = recognise_language(partial(is_one_token, tokenizer))
    encode = prompt_encoder(tokenizer, chat=language.chat and has_chat_template(tokenizer))
    length = min(HAYSTACK_TOKENS, engine.max_context)
    plan = HaystackPlan((length,), depths=QUESTIONS, samples=QUESTIONS, questions_per_haystack=QUESTIONS)
    try:
        haystacks = list(make_haystacks("niah_single", language, encode, plan))
    except EdgeError as error:
        return NOT_POSSIBLE, str(error)
    answers = ask(engine, haystacks, encode, tokenizer.decode)
    found = sum(answer.score for answer in answers)
    detail = f"{found:g} of {len(answers)} found in {length} tokens, where {NEEDED} tells a working model"
    return (PASSED if found >= NEEDED else FAILED), detail
