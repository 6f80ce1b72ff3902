"""Questions about long documents: cutting, the stages with a scripted reader, and kept replies."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge.errors import EdgeError, UsageError
from edge.mapreduce.documents import Chunk, Document, split_document
from edge.mapreduce.run import Reader, Result, answer_question
from edge.mapreduce.state import Replies
from edge.mapreduce.structured import (
    NO_INFORMATION,
    Finding,
    collapse_prompt,
    map_prompt,
    parse_confidence,
    parse_finding,
    reduce_prompt,
)
from tests.test_text import tokenizer_of


def word_starts(text: str) -> list[int]:
    return [match.start() for match in re.finditer(r"\S+\s*", text)]


def words(text: str) -> int:
    return len(word_starts(text))


# Text


@settings(max_examples=200, deadline=None)
@given(st.text("ab. \n。!", max_size=200), st.integers(1, 30), st.integers(1, 30))
@example("aaaaaa。a a", 1, 1)  # a cut inside a token
@example("aaaaa", 1, 1)  # a token that does not fit
def test_chunks_cover_a_text_and_keep_to_the_limit(text: str, most: int, fitting: int) -> None:
    """Limits in words, and another one, in characters, that only shows when a chunk is looked at by itself."""
    chunks = list(split_document(Document("d", text), most, word_starts, lambda part: len(part) <= 4 * fitting))
    places = [chunk.start for chunk in chunks]
    assert places == sorted(places) and all(a.end <= b.start for a, b in pairwise(chunks))
    kept = {i for chunk in chunks for i in range(chunk.start, chunk.end)}
    assert all(text[i].isspace() for i in range(len(text)) if i not in kept)
    for chunk in chunks:
        assert words(chunk.text) <= most and len(chunk.text) <= 4 * fitting and chunk.text.strip()


def pieces(text: str, most: int) -> list[str]:
    return [chunk.text for chunk in split_document(Document("d", text), most, word_starts, lambda part: True)]


def test_cuts_come_after_paragraphs_sentences_and_words() -> None:
    assert pieces("a b c d e f g h\n\ni j. k", 9) == ["a b c d e f g h\n\n", "i j. k"]
    assert pieces("a b c d e f g. h i j k", 8) == ["a b c d e f g. ", "h i j k"]
    assert pieces("a b c d e", 2) == ["a b ", "c d ", "e"]
    assert pieces("天地玄黄。宇宙洪荒", 1) == ["天地玄黄。宇宙洪荒"]  # one "word"
    assert pieces(" \n ", 3) == [] == pieces("", 3)


def test_long_words_and_real_tokens() -> None:
    """Tokens longer than any on average, and bytes of characters that are several tokens each."""
    assert pieces("x" * 100 + " " + "y" * 20, 2) == ["x" * 32] * 3 + ["x" * 4 + " " + "y" * 20]
    tokenizer = tokenizer_of("byte_level")
    text = "Café 日本語 🤖🤖 and so on. " * 40
    chunks = [c.text for c in split_document(Document("d", text), 11, tokenizer.token_starts, lambda part: True)]
    assert "".join(chunks) == text and all(len(tokenizer.encode(c, add_bos=False)) <= 12 for c in chunks)


def test_lines_of_a_chunk() -> None:
    document = Document("d", "one\n\ntwo\nthree\n\nfour")
    assert Chunk(document, 3, 15).lines == (3, 4) and Chunk(document, 0, 3).lines == (1, 1)
    assert Chunk(document, 16, 20).lines == (6, 6)


# Structured parts

PLAIN = "Extracted Information:\nHe is 12.\nRationale: said so\nAnswer: 12\nConfidence Score: 4"
REPLIES = {
    PLAIN: ("He is 12.", "said so", "12", 4.0),
    "**Extracted Information:** He is 12.\n\n**Rationale**: said so\n## Answer: 12\n- Confidence: 4.0/5": (
        "He is 12.",
        "said so",
        "12",
        4.0,
    ),
    "1. Extracted information：\nHe is 12.\n2. rationale:said so\n3. ANSWER:12\n4. Confidence score: 8 out of 10": (
        "He is 12.",
        "said so",
        "12",
        4.0,
    ),
    "Answer: 12\nConfidence Score: 80%\nAnswer: or 13": ("", "", "12\nor 13", 4.0),
    "Confidence Score: high\nAnswer: 12": ("", "", "12", None),
    "He is 12. The answer: maybe": ("", "", "He is 12. The answer: maybe", None),
    "": ("", "", "", None),
    "Confidence Score: 17": ("", "", "", 5.0),
}


@pytest.mark.parametrize("reply", REPLIES)
def test_replies_are_read_leniently(reply: str) -> None:
    information, rationale, answer, confidence = REPLIES[reply]
    assert parse_finding(reply, (3,)) == Finding(information, rationale, answer, confidence, (3,))


def test_what_says_nothing() -> None:
    for answer in ("[NO INFORMATION]", "No information.", "**[No Information]**"):
        assert parse_finding(f"Extracted Information: x\nAnswer: {answer}").is_empty
    assert parse_finding("").is_empty and not parse_finding("Extracted Information: x").is_empty
    assert not parse_finding("Answer: The report holds no information on valves before 1990.").is_empty
    assert parse_confidence("0/0") == 0.0 and parse_confidence("3,5 of 5") == 3.5


@given(st.text(max_size=40), st.text(max_size=40))
def test_prompts_hold_texts_as_they_are(question: str, text: str) -> None:
    assert question in map_prompt(question, "d", text) and f"---\n{text}\n---" in map_prompt(question, "d", text)
    found = Finding("{i}", text, question, 2.5)
    assert text in collapse_prompt(question, [found]) and "Confidence Score: 2.5" in reduce_prompt(question, [found])


# Stages


def scripted(replies: Callable[[str], str], context: int, reply: int = 8) -> tuple[Reader, list[str]]:
    asked: list[str] = []

    def ask(message: str, opening: str) -> str:
        assert words(message) + reply <= context, "a prompt is longer than the context"
        assert f"Write exactly this:\n{opening}" in message
        asked.append(message)
        return replies(message)

    return Reader(ask, words, word_starts, context, reply), asked


def finding(answer: str, score: float) -> str:
    return f"Extracted Information: {answer}\nRationale: r\nAnswer: {answer}\nConfidence Score: {score}"


QUESTION = "How old?"
MAP_WORDS = words(map_prompt(QUESTION, "d", ""))


def run(document: str | list[Document], reader: Reader, **options: Any) -> tuple[Result, list[tuple[int, int]]]:
    steps: list[tuple[int, int]] = []
    documents = [Document("d", document)] if isinstance(document, str) else document
    result = answer_question(documents, QUESTION, reader, lambda done, total: steps.append((done, total)), **options)
    return result, steps


def test_map_and_reduce_with_exact_prompts() -> None:
    said = {"a" * 5: finding("12", 4), "b" * 5: finding(NO_INFORMATION, 0), "c" * 5: finding("13", 2)}

    def replies(message: str) -> str:
        return next(
            (reply for text, reply in said.items() if text in message), "Rationale: x\nAnswer: 12\nConfidence: 5"
        )

    reader, asked = scripted(replies, 400)
    documents = [Document(name, text) for name, text in zip("xyz", said, strict=True)]
    result, steps = run(documents, reader)
    found = [parse_finding(finding("12", 4)), parse_finding(finding("13", 2))]
    maps = [map_prompt(QUESTION, document.name, document.text) for document in documents]
    assert asked == [*maps, reduce_prompt(QUESTION, found)]
    assert result.finding == Finding("", "x", "12", 5.0, (0, 2)) and result.collapsed == ()
    assert [(chunk.document.name, said.answer) for chunk, said in result.sources] == [("x", "12"), ("z", "13")]
    assert steps == [(0, 4), (1, 4), (1, 4), (2, 4), (2, 4), (3, 4), (3, 4), (4, 4)]


def test_findings_are_collapsed_until_they_fit() -> None:
    """Forty chunks, whose findings do not fit into one prompt: rounds of groups, each smaller than the last."""

    def replies(message: str) -> str:
        numbers = sorted(set(map(int, re.findall(r"\bn(\d+)\b", message))))
        return finding(" ".join(f"n{n}" for n in numbers[:3]), 3)

    reader, asked = scripted(replies, MAP_WORDS + 100, reply=20)
    text = " ".join(f"n{i}" + " x" * 39 for i in range(40))
    result, steps = run(text, reader, chunk_tokens=40)
    assert len(result.chunks) == 40 and len(result.collapsed) >= 2
    assert result.collapsed == tuple(sorted(result.collapsed, reverse=True)) and result.collapsed[0] < 40
    assert len(asked) == 40 + sum(result.collapsed) + 1 and asked[-1].endswith("Answer:\nConfidence Score:")
    assert "Put these findings together" in asked[40] and "Put these" not in asked[-1]
    assert result.finding.chunks == tuple(range(40)) and result.finding.answer == "n0 n1 n2"
    assert steps[-1] == (len(asked), len(asked)) and all(done <= total for done, total in steps)
    assert steps[80] == (40, 40 + result.collapsed[0] + 1)


def test_what_says_nothing_in_the_end_is_left_out() -> None:
    """Half of the collapsed findings turn out to be empty: the answer is not based on them."""
    rounds = iter(range(100))

    def replies(message: str) -> str:
        if "Put these findings together" in message:
            return finding("n" if next(rounds) % 2 else NO_INFORMATION, 3)
        return finding("n", 3)

    reader, asked = scripted(replies, MAP_WORDS + 100, reply=20)
    result, _ = run(" ".join(["x"] * 800), reader, chunk_tokens=40)
    assert NO_INFORMATION not in asked[-1] and 0 < len(result.sources) < 20 == len(result.chunks)


@pytest.mark.parametrize("last, answer", [("Rationale: he was 12 then", "he was 12 then"), ("", NO_INFORMATION)])
def test_a_last_reply_without_an_answer(last: str, answer: str) -> None:
    reader, _ = scripted(lambda message: last if "final answer" in message else finding("12", 4), 400)
    assert run("a b c", reader)[0].finding.answer == answer


def test_nothing_found_needs_no_reduce() -> None:
    reader, asked = scripted(lambda message: f"Answer: {NO_INFORMATION}", 400)
    result, _ = run("a b c", reader)
    assert len(asked) == 1 and result.finding.answer == NO_INFORMATION and result.finding.confidence == 0.0
    assert result.sources == []


def test_contexts_that_are_too_small() -> None:
    reader, _ = scripted(lambda message: finding("12", 4), MAP_WORDS + 8 + 31)
    with pytest.raises(UsageError, match=f"leaves 31 for text, beside a prompt of {MAP_WORDS} and a reply of 8"):
        run("a b c", reader)
    least = words(collapse_prompt(QUESTION, [Finding("", "", "", None)] * 2)) + 3 * 20
    with pytest.raises(UsageError, match=f"findings together takes up to {least} tokens"):
        run("a b c", scripted(lambda message: finding("12", 4), least - 1, reply=20)[0], chunk_tokens=2)
    run("a b c", scripted(lambda message: finding("12", 4), least, reply=20)[0], chunk_tokens=2)
    with pytest.raises(UsageError, match="hold no text"):
        run(" \n", scripted(lambda message: "", 4000)[0])
    reader, _ = scripted(lambda message: finding("x " * 150, 4), 400)  # longer than the reply that it was allowed
    with pytest.raises(EdgeError, match="two findings do not fit"):
        run("a b c d", reader, chunk_tokens=2)


# Kept replies


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    """Stopped at every possible place and begun again, each reply is asked for once and the result is the same."""

    def reader_of(kept: Replies, stop_after: int) -> tuple[Reader, list[str]]:
        made: list[str] = []

        def ask(message: str, opening: str) -> str:
            reply = kept.get(message)
            if reply is None:
                if len(made) == stop_after:
                    raise KeyboardInterrupt
                made.append(message)
                reply = finding(f"n{len(message)}", 3)
                kept.keep(message, reply)
            return reply

        return Reader(ask, words, word_starts, MAP_WORDS + 70, 8), made

    text = " ".join(f"w{i}" for i in range(200))
    whole, made = reader_of(Replies(tmp_path / "whole", "k"), 999)
    expected, _ = run(text, whole, chunk_tokens=20)
    assert expected.collapsed and len(made) > 12
    for stop in range(len(made)):
        path = tmp_path / str(stop)
        first, before = reader_of(Replies(path, "k"), stop)
        with pytest.raises(KeyboardInterrupt):
            run(text, first, chunk_tokens=20)
        kept = Replies(path, "k")
        again, after = reader_of(kept, 999)
        result, _ = run(text, again, chunk_tokens=20)
        assert before + after == made and result == expected and kept.resumed == stop


def test_a_state_file_is_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    kept = Replies(path, "k")
    kept.keep("a", "é")
    kept.keep("b", "")
    assert Replies(path, "k").get("a") == "é" and Replies(path, "k").get("c") is None
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    with pytest.raises(UsageError, match="another question, bundle, document or option"):
        Replies(path, "other")
    data = path.read_bytes()
    for damaged in (data[:-5], data.replace("é".encode(), b"e"), b"[]", b"", b"\xff", b'{"checksum": 1}', data + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(EdgeError, match="is damaged; delete it"):
            Replies(path, "k")
    kept.remove()
    kept.remove()
    assert not path.exists()
