"""Haystacks of the evaluation: as long as asked, answerable from their text alone, needles where they belong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import UsageError
from edge.eval.languages import ENGLISH, RECALL, Language
from edge.eval.run import is_one_token, prompt_encoder
from edge.eval.tasks import (
    TASKS,
    Encode,
    Haystack,
    HaystackPlan,
    make_haystacks,
    recognise_language,
    split_sentences,
)
from edge.text import TextSettings, Tokenizer
from tests.eval_samples import answer_from_text, recall_text

ENGLISH_TASKS = [(task, ENGLISH) for task in TASKS]
RECALL_TASKS = [(task, RECALL) for task in RECALL.wordings]


@pytest.fixture(scope="session")
def encoders(tiny_bundle: Path) -> dict[str, Encode]:
    """English in a chat of a byte-level tokenizer that knows few words, and recall in one of whole words."""
    settings = TextSettings(add_bos=True, bos_token="<s>", eos_token="<|im_end|>", chat_template=None)
    return {
        "english": prompt_encoder(Tokenizer.load(tiny_bundle, settings), chat=True),
        "recall": prompt_encoder(recall_text(), chat=False),
    }


@pytest.fixture(scope="session")
def make(encoders: dict[str, Encode]) -> Callable[..., list[Haystack]]:
    def make(task: str, language: Language, length: int, *, sentences: tuple[str, ...] = (), **plan: int):
        chosen = HaystackPlan((length,), **plan)
        return list(make_haystacks(task, language, encoders[language.name], chosen, sentences))

    return make


def token_lengths(haystack: Haystack, encode: Encode) -> list[int]:
    """Prompt and reply of each question."""
    return [len(encode(*haystack.prompt(q))) + haystack.reply_tokens for q in haystack.questions]


@pytest.mark.parametrize(("task", "language"), ENGLISH_TASKS + RECALL_TASKS)
@settings(max_examples=8, deadline=None)
@given(extra=st.integers(0, 700), seed=st.integers(0, 10**6), questions=st.integers(1, 3))
def test_the_longest_prompt_and_its_reply_are_exactly_as_long_as_asked(
    task: str,
    language: Language,
    extra: int,
    seed: int,
    questions: int,
    make: Callable[..., list[Haystack]],
    encoders: dict[str, Encode],
) -> None:
    length = extra + (2600 if language is ENGLISH else 60)
    (haystack,) = make(task, language, length, samples=questions, questions_per_haystack=questions, seed=seed)
    lengths = token_lengths(haystack, encoders[language.name])
    assert max(lengths) == length
    assert min(lengths) > length - 40


@pytest.mark.parametrize(("task", "language"), ENGLISH_TASKS + RECALL_TASKS)
def test_a_reader_of_the_text_alone_can_answer(
    task: str, language: Language, make: Callable[..., list[Haystack]]
) -> None:
    for haystack in make(task, language, 6000, samples=10, questions_per_haystack=5):
        for question in haystack.questions:
            assert answer_from_text(haystack.prompt(question)[0]) == Counter(question.references)
            assert len(question.references) == {"niah_multivalue": 4, "variable_tracking": 5}.get(task, 1) * (
                1 if language is ENGLISH else 2
            )


@pytest.mark.parametrize(("task", "language"), ENGLISH_TASKS + RECALL_TASKS)
def test_needles_lie_at_their_depth(task: str, language: Language, make: Callable[..., list[Haystack]]) -> None:
    for haystack in make(task, language, 9000, samples=10, questions_per_haystack=5, depths=5):
        for needle in (needle for question in haystack.questions for needle in question.needles):
            assert haystack.context.count(needle.text) == 1
            place = haystack.context.index(needle.text) + len(needle.text) / 2
            assert place / len(haystack.context) == pytest.approx(needle.depth, abs=0.05)


def test_questions_are_spread_evenly_over_depths_and_haystacks(make: Callable[..., list[Haystack]]) -> None:
    haystacks = make("niah_single", ENGLISH, 6000, samples=15, questions_per_haystack=6, depths=5)
    assert [len(haystack.questions) for haystack in haystacks] == [5, 5, 5]
    depths = [depth for haystack in haystacks for question in haystack.questions for depth in question.depths]
    assert Counter(int(5 * depth) for depth in depths) == dict.fromkeys(range(5), 3)


def test_multi_key_haystacks_are_full_of_needles_that_nobody_asks_for(make: Callable[..., list[Haystack]]) -> None:
    pattern = re.compile(r"One of the special magic numbers for (\S+) is: (\d+)\.")
    (single,) = make("niah_single", ENGLISH, 9000, samples=2)
    (many,) = make("niah_multikey", ENGLISH, 9000, samples=2)
    assert len(pattern.findall(single.context)) == 2
    pairs = pattern.findall(many.context)
    share = sum(len(match[0]) for match in pattern.finditer(many.context)) / len(many.context)
    assert 0.2 < share < 0.3
    assert len({key for key, _ in pairs}) == len(pairs) > 20
    (words,) = make("niah_multikey", RECALL, 2000, samples=2)
    assert words.context.count("mark") == 32  # every key there is


def test_the_seed_decides_the_text(make: Callable[..., list[Haystack]], encoders: dict[str, Encode]) -> None:
    for task in TASKS:
        (first,) = make(task, ENGLISH, 3000, samples=1)
        (again,) = make(task, ENGLISH, 3000, samples=1)
        (other,) = make(task, ENGLISH, 3000, samples=1, seed=1)
        assert first == again
        assert first.context != other.context
        both = HaystackPlan((2500, 3000), samples=1)
        assert list(make_haystacks(task, ENGLISH, encoders["english"], both))[1] == first


def test_a_text_of_the_user_is_the_filler_in_its_order(make: Callable[..., list[Haystack]]) -> None:
    text = "It was late. The rain fell on “the roof.” Who came?\nA line without an end\n\nThe last one!"
    sentences = split_sentences(text)
    assert sentences == (
        "It was late.",
        "The rain fell on “the roof.”",
        "Who came?",
        "A line without an end",
        "The last one!",
    )
    (haystack,) = make("niah_single", ENGLISH, 2000, samples=1, sentences=sentences)
    rest = haystack.context.replace(haystack.questions[0].needles[0].text + " ", "")
    assert " ".join(sentences * 2) in rest  # it begins anywhere and starts over


def test_long_stretches_without_a_full_stop_are_cut() -> None:
    pieces = split_sentences("word " * 1000)
    assert max(map(len, pieces)) <= 300
    assert "".join(pieces).replace(" ", "") == "word" * 1000
    assert split_sentences("天很蓝。你好吗？") == ("天很蓝。", "你好吗？")
    assert split_sentences(" \n\t ") == ()


@pytest.mark.parametrize(
    ("task", "language", "length", "plan", "said"),
    [
        ("niah_single", ENGLISH, 100, {}, "100 tokens are too short for niah_single"),
        ("variable_tracking", RECALL, 1000, {}, "variable_tracking is not available in the language recall"),
        ("niah_single", RECALL, 1000, {"samples": 40, "questions_per_haystack": 40}, "has 32 keys and 40 questions"),
    ],
)
def test_what_cannot_be_made_is_refused(
    task: str, language: Language, length: int, plan: dict[str, int], said: str, make: Callable[..., list[Haystack]]
) -> None:
    with pytest.raises(UsageError, match=said):
        make(task, language, length, **plan)


def test_the_shortest_length_that_the_refusal_names_is_enough(make: Callable[..., list[Haystack]]) -> None:
    with pytest.raises(UsageError) as refusal:
        make("niah_multivalue", ENGLISH, 300, samples=2)
    least = int(re.search(r"take (\d+);", str(refusal.value)).group(1))  # type: ignore[union-attr]
    assert make("niah_multivalue", ENGLISH, least, samples=2)
    with pytest.raises(UsageError):
        make("niah_multivalue", ENGLISH, least - 1, samples=2)


def test_the_vocabulary_tells_the_language(tiny_bundle: Path) -> None:
    settings = TextSettings(add_bos=True, bos_token="<s>", eos_token="<|im_end|>", chat_template=None)
    assert recognise_language(partial(is_one_token, recall_text())) is RECALL
    assert recognise_language(partial(is_one_token, Tokenizer.load(tiny_bundle, settings))) is ENGLISH
    assert recognise_language(lambda word: word != "mark") is ENGLISH
    assert not is_one_token(recall_text(), "k32")


def test_padding_never_overshoots_and_stops_where_nothing_fits(
    make: Callable[..., list[Haystack]], encoders: dict[str, Encode]
) -> None:
    bare = replace(ENGLISH, padding=())
    (haystack,) = make("niah_single", bare, 3000, samples=1)
    assert 2900 < token_lengths(haystack, encoders["english"])[0] <= 3000
