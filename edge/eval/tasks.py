"""Haystacks of an exact token length with needles and questions about them: RULER's tasks, made offline.

Nothing here knows a model: a tokenizer enters as `Encode`. The same seed and settings always give the same text.
"""

from __future__ import annotations

import random
import re
import string
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count as count_from

from edge.errors import UsageError
from edge.eval.languages import LANGUAGES, Language, Wording

Encode = Callable[[str, str], list[int]]  # (message, beginning of the reply) -> ids of the whole prompt

TASKS = ("niah_single", "niah_multikey", "niah_multivalue", "variable_tracking")
PERPLEXITY = "perplexity"  # the task without a haystack
VALUES = 4  # places of one key in niah_multivalue, as in RULER
CHAIN = 5  # variables of one value in variable_tracking: one assignment and four hops, as in RULER
DISTRACTOR_SHARE = 0.25  # of the tokens of a niah_multikey haystack
NAME_LENGTH = 5  # letters of a variable
LONGEST_PIECE = 300  # characters of a user's text between two places for a needle


@dataclass(frozen=True)
class Needle:
    """A sentence to hide at `depth` (fraction of the haystack), and what of it an answer must hold."""

    text: str
    references: tuple[str, ...]
    depth: float


@dataclass(frozen=True)
class Question:
    """What is asked (a key, or the value whose variables are wanted), and the needles that answer it."""

    key: str
    needles: tuple[Needle, ...]

    @property
    def references(self) -> tuple[str, ...]:
        """Every string that the answer must hold."""
        return tuple(reference for needle in self.needles for reference in needle.references)

    @property
    def depths(self) -> tuple[float, ...]:
        """The depth of each reference."""
        return tuple(needle.depth for needle in self.needles for _ in needle.references)


@dataclass(frozen=True)
class Haystack:
    """A text, and the questions asked about it one by one.

    The longest question's prompt and `reply_tokens` are together `length` tokens, the others' a few less.
    """

    task: str
    length: int
    context: str
    questions: tuple[Question, ...]
    wording: Wording
    reply_tokens: int

    def prompt(self, question: Question) -> tuple[str, str]:
        """The message (context first, so that all questions share its cache) and the beginning of the reply."""
        return _fill(self.wording, question, self.context)


@dataclass(frozen=True)
class HaystackPlan:
    """How the haystacks of a task are made: lengths in tokens, `samples` questions a length, of which each haystack
    serves at most `questions_per_haystack`, and needles in `depths` equal parts of the haystack.
    """

    lengths: tuple[int, ...]
    depths: int = 5
    samples: int = 20
    questions_per_haystack: int = 8
    seed: int = 0


def recognise_language(knows: Callable[[str], bool]) -> Language:
    """The language whose marker words a vocabulary has, else English."""
    marked = (language for language in LANGUAGES.values() if language.markers and all(map(knows, language.markers)))
    return next(marked, LANGUAGES["english"])


def split_sentences(text: str) -> tuple[str, ...]:
    """A text cut where a needle may go: after sentences, at line ends, and in pieces without either."""
    pieces = re.findall(rf"[^.!?。！？\n]{{1,{LONGEST_PIECE}}}[.!?。！？]*[\"'”’)]*", text)
    return tuple(piece for piece in (" ".join(piece.split()) for piece in pieces) if piece)


def make_haystacks(
    task: str, language: Language, encode: Encode, plan: HaystackPlan, sentences: Sequence[str] = ()
) -> Iterator[Haystack]:
    """The haystacks of one task, length by length. `sentences`: a user's text as filler, instead of invented ones.

    UsageError if the language has no such task or too few keys, or a length is too short for the questions.
    """
    if task not in language.wordings:
        names = ", ".join(language.wordings)
        raise UsageError(f"{task} is not available in the language {language.name}; choose from {names}")
    number = -(-plan.samples // plan.questions_per_haystack)
    starts = [i * plan.samples // number for i in range(number + 1)]
    for length in plan.lengths:
        for index in range(number):
            rng = random.Random(f"{plan.seed} {task} {index}")  # the same questions at every length
            buckets = [i % plan.depths for i in range(starts[index], starts[index + 1])]
            questions = _questions(task, language, buckets, plan.depths, rng)
            yield _make_haystack(task, language, encode, length, questions, sentences, rng)


def _make_haystack(
    task: str,
    language: Language,
    encode: Encode,
    length: int,
    questions: tuple[Question, ...],
    sentences: Sequence[str],
    rng: random.Random,
) -> Haystack:
    wording = language.wordings[task]

    def tokens(text: str) -> int:
        return len(encode(text, "")) - len(encode("", ""))

    reply = language.spare_reply + max(tokens(language.between.join(q.references)) for q in questions)
    room = length - reply
    needles = [needle for question in questions for needle in question.needles]
    if task == "niah_multikey":
        number = int(DISTRACTOR_SHARE * room) // tokens(needles[0].text)
        needles += _distractors(language, wording, {q.key for q in questions}, number, rng)
    longest = max(questions, key=lambda q: len(encode(*_fill(wording, q, ""))))
    filler, drawn = _filler(language, sentences, rng), list[str]()

    def count(number: int, closing: str = "") -> int:
        drawn.extend(next(filler) for _ in range(number - len(drawn)))
        return len(encode(*_fill(wording, longest, _lay_out(drawn[:number], needles) + closing)))

    if (least := count(0)) > room:
        raise UsageError(
            f"{length} tokens are too short for {task}: the needles of {len(questions)} questions, the longest "
            f"question and a reply take {least + reply}; raise --lengths or lower --questions-per-haystack"
        )
    number = _largest(count, room)
    closing = _pad(partial(count, number), language.padding, room)
    return Haystack(task, length, _lay_out(drawn[:number], needles) + closing, questions, wording, reply)


def _questions(
    task: str, language: Language, buckets: Sequence[int], depths: int, rng: random.Random
) -> tuple[Question, ...]:
    """One question a bucket; where it has several needles, these are spread over the whole haystack."""
    if task == "variable_tracking":
        return _chains(language, len(buckets), rng)
    if len(buckets) > len(language.keys):
        raise UsageError(
            f"the language {language.name} has {len(language.keys)} keys and {len(buckets)} questions need one each; "
            "lower --questions-per-haystack"
        )
    questions = []
    for key, bucket in zip(rng.sample(language.keys, len(buckets)), buckets, strict=True):
        places = _spread(VALUES, rng) if task == "niah_multivalue" else [(bucket + rng.random()) / depths]
        each = language.values_per_needle
        values = _values(language, len(places), rng)
        needles = (
            _pair(language.wordings[task], key, values[i * each : (i + 1) * each], depth)
            for i, depth in enumerate(places)
        )
        questions.append(Question(key, tuple(needles)))
    return tuple(questions)


def _chains(language: Language, number: int, rng: random.Random) -> tuple[Question, ...]:
    """Each a value that goes from variable to variable, in the order of the text."""
    wording = language.wordings["variable_tracking"]
    names = [_name(i) for i in rng.sample(range(len(string.ascii_uppercase) ** NAME_LENGTH), number * CHAIN)]
    questions = []
    for index, value in enumerate(rng.sample(language.values, number)):
        chain = names[index * CHAIN : (index + 1) * CHAIN]
        sources = [str(value), *(f"VAR {name}" for name in chain)]
        needles = (
            Needle(wording.needle.format(key=name, value=source), (name,), depth)
            for name, source, depth in zip(chain, sources, _spread(CHAIN, rng), strict=False)
        )
        questions.append(Question(str(value), tuple(needles)))
    return tuple(questions)


def _distractors(
    language: Language, wording: Wording, asked: set[str], number: int, rng: random.Random
) -> list[Needle]:
    """Needles of keys that nobody asks for, as many as there are keys left."""
    keys = [key for key in language.keys if key not in asked]
    return [
        _pair(wording, key, _values(language, 1, rng), rng.random()) for key in rng.sample(keys, min(number, len(keys)))
    ]


def _values(language: Language, needles: int, rng: random.Random) -> list[str]:
    """Different values for so many needles."""
    return [str(value) for value in rng.sample(language.values, language.values_per_needle * needles)]


def _pair(wording: Wording, key: str, values: Sequence[str], depth: float) -> Needle:
    return Needle(wording.needle.format(key=key, value=" ".join(values)), tuple(values), depth)


def _spread(number: int, rng: random.Random) -> list[float]:
    """Ascending depths, one at random in each of `number` equal parts of the haystack."""
    return [(part + rng.random()) / number for part in range(number)]


def _name(number: int) -> str:
    """A variable: the number in base 26."""
    letters = ""
    for _ in range(NAME_LENGTH):
        number, digit = divmod(number, len(string.ascii_uppercase))
        letters += string.ascii_uppercase[digit]
    return letters


def _filler(language: Language, sentences: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Without end: a user's sentences in their order from a random one on, or invented ones."""
    if sentences:
        first = rng.randrange(len(sentences))
        for index in count_from(first):
            yield sentences[index % len(sentences)]
    while True:
        yield " ".join(rng.choice(slot) for slot in language.filler)


def _lay_out(filler: Sequence[str], needles: Sequence[Needle]) -> str:
    """Sentences joined by spaces, each needle after its share of the filler."""
    pieces: list[str] = []
    done = 0
    for needle in sorted(needles, key=lambda needle: needle.depth):
        place = round(needle.depth * len(filler))
        pieces += [*filler[done:place], needle.text]
        done = place
    return " ".join([*pieces, *filler[done:]])


def _fill(wording: Wording, question: Question, context: str) -> tuple[str, str]:
    message = wording.message.format(context=context, key=question.key)
    return message, wording.reply_start.format(key=question.key, count=len(question.references))


def _largest(count: Callable[[int], int], limit: int) -> int:
    """The largest n with count(n) <= limit, where count never falls and count(0) is within the limit."""
    high = 1
    while high <= limit and count(high) <= limit:
        high *= 2
    return bisect_right(range(high), limit, key=count) - 1


def _pad(count: Callable[[str], int], padding: Sequence[str], limit: int) -> str:
    """Padding after which `count` is exactly the limit, or the nearest below that these units reach."""
    closing, now = "", count("")
    for unit in padding:
        while now < limit and now < (longer := count(closing + unit)) <= limit:
            closing, now = closing + unit, longer
    return closing
