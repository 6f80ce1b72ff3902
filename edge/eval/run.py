"""Ask an engine the questions of haystacks and score its replies; perplexity of a text beside it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from edge.bench.machine import describe_machine
from edge.engine import Engine, TokenEvent
from edge.errors import UsageError
from edge.eval.languages import LANGUAGES
from edge.eval.report import Answer, EvalReport, EvalSettings, PerplexityResult
from edge.eval.tasks import PERPLEXITY, Encode, Haystack, make_haystacks
from edge.perplexity import perplexity
from edge.sampler import SamplingParams
from edge.text import Tokenizer

Progress = Callable[[int, int, str], None]  # (done, in all, what is being done)
DECODE_COST = 5  # a decoded token takes about as long as so many of a prompt; for the progress bar only


class EvalSession(Protocol):
    """What is asked of a session: greedy replies, and prompts whose common prefix is computed once."""

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[TokenEvent]:
        """Tokens after the prompt."""

    def close(self) -> None:
        """Give the pages back."""


class EvalEngine(Protocol):
    """What is asked of an engine."""

    def open_session(self) -> EvalSession:
        """A new cache."""


def prompt_encoder(tokenizer: Tokenizer, *, chat: bool) -> Encode:
    """(message, beginning of the reply) -> ids, through the chat template or, without it, as one text."""

    def encode(message: str, reply_start: str) -> list[int]:
        if chat:
            # A greedy reply is too short to think in.
            text = tokenizer.render_chat([{"role": "user", "content": message}], enable_thinking=False) + reply_start
        else:
            text = f"{message} {reply_start}" if reply_start else message
        return tokenizer.encode_prompt(text)

    return encode


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Whether a message can be put into a chat."""
    try:
        tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    except UsageError:
        return False
    return True


def is_one_token(tokenizer: Tokenizer, word: str) -> bool:
    """Whether the vocabulary has a word, however its tokens mark the space before it."""
    ids = tokenizer.encode(word, add_bos=False)
    return len(ids) == 1 and tokenizer.decode(ids).strip() == word


def find_references(reply: str, references: Sequence[str]) -> tuple[bool, ...]:
    """Which references the reply holds, in any case: RULER's string_match_all, but for whole words only."""
    return tuple(
        re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", reply, re.IGNORECASE) is not None for reference in references
    )


def run_eval(
    engine: Engine,
    tokenizer: Tokenizer,
    settings: EvalSettings,
    sentences: Sequence[str] = (),
    text: tuple[str, str] | None = None,
    window: int = 2048,
    progress: Progress | None = None,
) -> EvalReport:
    """Run the tasks of `settings`; `sentences` is a user's filler, `text` (name, content) that of perplexity.

    Every haystack is made before the first is asked, so that what cannot be made costs no time.
    """
    language, encode = LANGUAGES[settings.language], prompt_encoder(tokenizer, chat=settings.prompt == "chat")
    tasks = [task for task in settings.tasks if task != PERPLEXITY]
    haystacks = [
        haystack for task in tasks for haystack in make_haystacks(task, language, encode, settings.plan, sentences)
    ]
    answers = ask(engine, haystacks, encode, tokenizer.decode, progress)
    result = None
    if text is not None:
        name, content = text
        result = measure_perplexity(engine, tokenizer.encode(content, add_bos=False), window, name, progress)
    return EvalReport(settings, describe_machine(), engine.describe(), answers, result)


def ask(
    engine: EvalEngine,
    haystacks: Sequence[Haystack],
    encode: Encode,
    decode: Callable[[list[int]], str],
    progress: Progress | None = None,
) -> tuple[Answer, ...]:
    """Every question of every haystack, greedily, a session a haystack: its context is computed once."""
    total, done = sum(map(_cost, haystacks)), 0
    answers: list[Answer] = []
    for number, haystack in enumerate(haystacks):

        def tell(part: int, base: int = done, what: str = f"{haystack.task} {haystack.length}") -> None:
            if progress is not None:
                progress(base + part, total, what)

        answers += _ask_haystack(engine, number, haystack, encode, decode, tell)
        done += _cost(haystack)
    return tuple(answers)


def _ask_haystack(
    engine: EvalEngine,
    number: int,
    haystack: Haystack,
    encode: Encode,
    decode: Callable[[list[int]], str],
    tell: Callable[[int], None],
) -> Iterator[Answer]:
    params = SamplingParams(max_tokens=haystack.reply_tokens)
    session = engine.open_session()
    try:
        for index, question in enumerate(haystack.questions):
            prompt = encode(*haystack.prompt(question))
            start = time.perf_counter()
            first_token_s, reply = 0.0, list[int]()
            for event in session.generate(prompt, params, None if index else lambda computed, _: tell(computed)):
                first_token_s = first_token_s or time.perf_counter() - start
                if event.finish_reason != "stop":
                    reply.append(event.token_id)
            tell(haystack.length + (index + 1) * DECODE_COST * haystack.reply_tokens)
            text, references = decode(reply), question.references
            yield Answer(
                task=haystack.task,
                length=haystack.length,
                haystack=number,
                key=question.key,
                references=references,
                depths=question.depths,
                found=find_references(text, references),
                reply=text,
                prompt_tokens=len(prompt),
                prefill=index == 0,
                first_token_s=round(first_token_s, 6),
            )
    finally:
        session.close()


def _cost(haystack: Haystack) -> int:
    return haystack.length + len(haystack.questions) * DECODE_COST * haystack.reply_tokens


def measure_perplexity(
    engine: Engine, ids: Sequence[int], window: int, file: str, progress: Progress | None = None
) -> PerplexityResult:
    """Perplexity of `ids`, the text of `file`, as `edge.perplexity` defines it, and of each window."""
    starts = range(0, max(len(ids) - 1, 1), window)
    nats, scored, each = 0.0, 0, list[float]()
    began = time.perf_counter()
    for start in starts:
        if progress is not None:
            progress(start, len(ids), file)
        part = ids[start : start + window]
        each.append(perplexity(engine, part, window))
        nats += math.log(each[-1]) * (len(part) - 1)
        scored += len(part) - 1
    seconds = time.perf_counter() - began
    return PerplexityResult(file, len(ids), scored, window, math.exp(nats / scored), tuple(each), round(seconds, 6))
