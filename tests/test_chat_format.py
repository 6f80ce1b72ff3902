"""Replies taken apart into content, reasoning and calls: examples, what must hold for any text, and round trips."""

from __future__ import annotations

import ast
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge.chat_format.call_syntax import MalformedCallError, read_literal, write_calls
from edge.chat_format.messages import template_messages
from edge.chat_format.reply import Content, ReplyParser, opened_reasoning, parse_reply, to_message
from edge.chat_format.tools import ToolCall, parse_tools
from edge.errors import UsageError
from edge.stream import TokenDecoder
from edge.text import TextSettings, Tokenizer
from tests.chat_samples import NOW, TOOLS, WEATHER, calls, json_values, merged, noise, readable, texts
from tests.test_text import byte_level_model

BLOCK = "<|tool_call_start|>\n```python\n{}\n```\n<|tool_call_end|>\n"
FORMAT = {
    # From the training data of MiniCPM4-MCP (OpenBMB/MiniCPM, demo/minicpm4/MCP/README_en.md).
    "the published example": (
        "<|thought_start|>\nI will call it.\n<|thought_end|>\n<|tool_call_start|>\n```python\n"
        'get_currency_exchange_rate(from_currency="USD",to_currency="EUR",amount=500)\n```\n<|tool_call_end|>\n',
        [
            ("reasoning", "I will call it."),
            ("get_currency_exchange_rate", {"from_currency": "USD", "to_currency": "EUR", "amount": 500}),
        ],
    ),
    "calls, then words": (
        BLOCK.format('searchPOI(city="杭州",keywords="电影院")') + "I'll help you.",
        [("searchPOI", {"city": "杭州", "keywords": "电影院"}), ("content", "I'll help you.")],
    ),
    "words, then calls": (
        "Let me see.\n" + BLOCK.format("f()\ng(a=1)"),
        [("content", "Let me see."), ("f", {}), ("g", {"a": 1})],
    ),
    "thinking of MiniCPM4.1": (
        "<think>\nHm, 2 < 3.\n</think>\n\nYes: <think> is a tag.",
        [("reasoning", "Hm, 2 < 3."), ("content", "Yes: <think> is a tag.")],
    ),
    "both kinds of reasoning": (
        "<think>a</think><|thought_start|>b<|thought_end|>c",
        [("reasoning", "ab"), ("content", "c")],
    ),
    "reasoning without an end": ("<think>\nfor ever ", [("reasoning", "for ever ")]),
    "no marker at all": (" 1 < 2 | 3 > <", [("content", " 1 < 2 | 3 > <")]),
    "values of Python": (
        BLOCK.format(r"""f(a='it\'s', b=(1, -2.5), c={"k": [True, None]}, d="A\n", e='''a''b''', g="")"""),
        [("f", {"a": "it's", "b": [1, -2.5], "c": {"k": [True, None]}, "d": "A\n", "e": "a''b", "g": ""})],
    ),
    "values of JSON": (
        BLOCK.format(r"""f(a=true, b=null, c={"k": false}, d="\ud83e\udd16 \/", e='\ud83e\udd16')"""),
        [("f", {"a": True, "b": None, "c": {"k": False}, "d": "🤖 /", "e": "🤖"})],
    ),
    "names that Python has not": (
        BLOCK.format('read-file(from="a", class=1)\nfs.list/all()'),
        [("read-file", {"from": "a", "class": 1}), ("fs.list/all", {})],
    ),
    "positions": (BLOCK.format("get_weather('Paris', 2)"), [("get_weather", {"city": "Paris", "days": 2})]),
    "a marker and brackets inside a string": (
        BLOCK.format('f(a="<|tool_call_end|> ) ] \\" ```")'),
        [("f", {"a": '<|tool_call_end|> ) ] " ```'})],
    ),
    "a line broken inside a string": (BLOCK.format('f(a="one\ntwo")'), [("f", {"a": "one\ntwo"})]),
    "no fence, one line": (
        "<|tool_call_start|>f(a=1); g()<|tool_call_end|>!",
        [("f", {"a": 1}), ("g", {}), ("content", "!")],
    ),
    "a comment": (BLOCK.format("# first\nf()"), [("f", {})]),
    "cut after a call": ("<|tool_call_start|>\n```python\nf()\n```\n<|tool", [("f", {})]),
    "two blocks": (BLOCK.format("f()") * 2, [("f", {}), ("f", {})]),
    "an empty block": (BLOCK.format("") + "Nothing to do.", [("content", "Nothing to do.")]),
}


@pytest.mark.parametrize("text, expected", FORMAT.values(), ids=FORMAT)
def test_the_format(text: str, expected: list[tuple[str, Any]]) -> None:
    assert readable(parse_reply(text, TOOLS)) == expected


MALFORMED = [
    "f(a=b)",  # a name is no literal
    "f(a=__import__('os'))",
    "f(a=1+1)",
    "f(a=f'{1}')",
    "f(a=b'x')",
    "f(**{'a': 1})",
    "f(1)",  # nobody said what its parameters are
    "f(a=1, a=2)",
    "f(a=1e999)",
    "f(a=NaN)",
    "f(a={1: 2})",
    "f(a='\\ud83e')",
    "f(a=1]",
    "f(a=[1)",
    "f(a=" + "[" * 5000 + ")",
    "f(a=1",
    "I will call f(a=1)",
    '{"name": "f"}',
]


@pytest.mark.parametrize("call", MALFORMED, ids=lambda call: call[:24])
def test_what_is_no_call_stays_content(call: str) -> None:
    """All of it, and the calls before it are made."""
    text = f"Well. {BLOCK.format(call)}So."
    assert readable(parse_reply(text, TOOLS)) == [("content", text)]
    after = "<|tool_call_start|>\n```python\ng()\n" + call
    events = readable(parse_reply(after, TOOLS))
    assert events == [("g", {}), ("content", call)]


def test_without_tools_calls_are_text() -> None:
    text = "<think>x</think>" + BLOCK.format("f()")
    assert readable(parse_reply(text)) == [("reasoning", "x"), ("content", BLOCK.format("f()"))]


def test_a_prompt_may_have_opened_the_reasoning() -> None:
    prompt = "<|im_start|>assistant\n<think>\n"
    assert opened_reasoning(prompt) == "<think>" and opened_reasoning(prompt + "\n</think>\n\n") is None
    assert readable(parse_reply("\nso\n</think>\nyes", prompt=prompt)) == [("reasoning", "so"), ("content", "yes")]
    assert readable(parse_reply("yes", prompt=prompt + "</think>")) == [("content", "yes")]


def stream(text: str, cuts: list[int], tools: tuple[Any, ...] = TOOLS) -> list[Any]:
    parser, events = ReplyParser(tools), []
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    for start, end in pairwise(places):
        events += parser.push(text[start:end])
    return events + parser.finish()


@settings(max_examples=400, deadline=None)
@given(noise, st.lists(st.integers(0, 80), max_size=12))
@example("<|tool_call_start|>f(a=b)<|tool_call_start|>f(a=1)<|tool_call_end|>", [30])
def test_any_cut_gives_the_same_events(text: str, cuts: list[int]) -> None:
    whole = merged(parse_reply(text, TOOLS))
    assert merged(stream(text, cuts)) == whole
    assert merged(stream(text, list(range(len(text))))) == whole


@settings(max_examples=300, deadline=None)
@given(noise)
def test_an_answer_without_a_readable_block_comes_back_whole(text: str) -> None:
    """Unless it begins with reasoning, nothing of it is dropped or moved."""
    starts = ("<think>", "<|thought_start|>")
    events = parse_reply(text, TOOLS)
    if text.lstrip().startswith(starts) or any(isinstance(event, ToolCall) for event in events):
        return
    if "<|tool_call_end|>" not in text:  # an empty block is dropped
        assert "".join(event.text for event in events if isinstance(event, Content)) == text


@settings(max_examples=200, deadline=None)
@given(texts.filter(str.strip), st.lists(calls, max_size=3), texts.filter(str.strip), st.lists(st.integers(0, 400)))
def test_a_message_survives_the_prompt(thought: str, made: list[ToolCall], answer: str, cuts: list[int]) -> None:
    """An assistant's message written for the model, then read as if the model had written it."""
    thought, answer = thought.strip(), answer.strip()
    message = {
        "role": "assistant",
        "content": answer,
        "reasoning_content": thought,
        "tool_calls": [call.to_openai(f"id{i}") for i, call in enumerate(made)],
    }
    if not made:
        del message["tool_calls"], message["reasoning_content"]
    written = template_messages([message], (), template_has_tools=False)[0]["content"]
    back = to_message(stream(written, cuts), (f"id{i}" for i in range(99)))
    assert back == message


def test_no_part_of_a_marker_is_ever_shown() -> None:
    text = "<think>why</think>Sure. " + BLOCK.format("get_weather(city='x')") + "Done."
    parser, shown = ReplyParser(TOOLS), ""
    for character in text:
        for event in parser.push(character):
            shown += "" if isinstance(event, ToolCall) else event.text
    assert shown + "".join(event.text for event in parser.finish()) == "whySure.Done."


def test_markers_that_a_tokenizer_has_as_special_tokens_are_seen() -> None:
    model = byte_level_model()
    model.add_special_tokens(["<think>", "</think>"])
    tokenizer = Tokenizer(model, TextSettings(False, None, None, None), TokenDecoder.of(model))
    ids = tokenizer.encode("<think>hm</think>yes<|im_end|>", add_bos=False)
    assert model.token_to_id("<think>") in ids and tokenizer.decode(ids) == "<think>hm</think>yes"
    assert readable(parse_reply(tokenizer.decode(ids))) == [("reasoning", "hm"), ("content", "yes")]


def test_pieces_come_as_early_as_they_are_certain() -> None:
    parser = ReplyParser(TOOLS)
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push(" <|tool") == [] and parser.push("s") == [Content(" <|tools")]
    assert parser.push(BLOCK[:20] + "f(a=1") == []
    assert parser.push(")") == [ToolCall("f", '{"a": 1}')]
    plain = ReplyParser()
    assert plain.push(" <") == [] and plain.push("b> ") == [Content(" <b> ")]


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_literals_mean_what_they_mean_in_json_and_in_python(value: Any) -> None:
    assert read_literal(json.dumps(value)) == read_literal(json.dumps(value, ensure_ascii=False)) == value
    assert read_literal(repr(value)) == ast.literal_eval(repr(value)) == value


@given(st.text("()[]{}'\"0a1,:=-+.\\ \n", max_size=10))
def test_a_literal_is_what_python_takes_for_one(source: str) -> None:
    """Where Python's literal_eval and JSON both refuse, so do we; what we take, one of them takes."""
    try:
        value = read_literal(source)
    except MalformedCallError:
        return
    try:
        expected = json.loads(source)
    except ValueError:
        expected = ast.literal_eval(f"(\n{source}\n)")
    assert json.dumps(value) == json.dumps(expected)


def test_calls_are_written_as_openbmb_does() -> None:
    made = [ToolCall.of("f", {"a": 'it"s', "b": [True, None]}), ToolCall.of("g", {})]
    lines = 'f(a="it\\"s",b=[true, null])\ng()\n'
    assert write_calls(made) == f"<|tool_call_start|>\n```python\n{lines}```\n<|tool_call_end|>\n"


WRONG_TOOLS = [
    ("no list", "tools is of type str"),
    ([1], "tools[0] is of type int"),
    ([{"type": "web_search"}], "tools[0].type is 'web_search'"),
    ([{"type": "function"}], "tools[0] needs a name"),
    ([{"name": "two words"}], "tools[0] needs a name"),
    ([{"name": "f", "description": 1}], "tools[0].description"),
    ([{"name": "f", "parameters": {"properties": []}}], "tools[0].parameters"),
    ([{"name": "f", "parameters": {"required": 1}}], "tools[0].parameters"),
    ([{"name": "f", "parameters": {"required": [{}]}}], "tools[0].parameters"),
    ([WEATHER, NOW, WEATHER], "two tools have the name 'get_weather'"),
]


@pytest.mark.parametrize("values, words", WRONG_TOOLS)
def test_wrong_tools(values: object, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_tools(values)
    assert words in str(error.value)
