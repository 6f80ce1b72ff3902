"""tool_choice as grammars: llguidance must let through what was chosen, and nothing else."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from edge.chat_format.choice_grammar import chosen_tools, tool_choice_grammar
from edge.chat_format.reply import parse_reply
from edge.chat_format.tools import ToolCall, parse_tools
from edge.errors import UsageError
from tests.chat_samples import NOW, TOOLS, WEATHER, readable

NAMED = {"type": "function", "function": {"name": "clock.read-now"}}
WEATHER_CALL, NOW_CALL = 'get_weather(city="Paris",days=2)\n', "clock.read-now()\n"


def block(calls: str) -> str:
    return f"<|tool_call_start|>\n```python\n{calls}```\n<|tool_call_end|>"


@pytest.fixture(scope="module")
def byte_tokens() -> LLTokenizer:
    return LLTokenizer("byte")


def accepts(grammar: str | None, text: str, tokens: LLTokenizer) -> bool:
    assert grammar is not None and LLMatcher.validate_grammar(grammar, tokens) == ""
    matcher, data = LLMatcher(tokens, grammar, log_level=0), list(text.encode())
    return bool(matcher.validate_tokens(data) == len(data) and matcher.consume_tokens(data) and matcher.is_accepting())


CASES = {
    # reply: whether it is one under none, auto, required, and a named choice of clock.read-now
    "Just words.": (True, True, False, False),
    block(NOW_CALL): (False, True, True, True),
    block(NOW_CALL) + "\n": (False, True, True, True),
    block(WEATHER_CALL): (False, True, True, False),
    block(WEATHER_CALL + NOW_CALL): (False, True, True, False),
    "Let me see. " + block(NOW_CALL): (False, True, False, False),
    block(NOW_CALL) + "\nIt is noon.": (False, True, False, False),
    block(NOW_CALL) + "\n" + block(WEATHER_CALL): (False, True, False, False),
    "<|thought_start|>\nI call < it |.\n<|thought_end|>\n" + block(NOW_CALL): (False, True, True, True),
    "<think>\nhm\n</think>\n\n" + block(NOW_CALL): (False, True, True, True),
    block("") + "x": (False, False, False, False),
    block("unknown()\n"): (False, False, False, False),
    block("get_weather()\n"): (False, False, False, False),  # city is required
    block("get_weather(city=1)\n"): (False, False, False, False),
    block('get_weather(city="x",unit="kelvin")\n'): (False, False, False, False),
    block('get_weather(city="x",unit="celsius")\n'): (False, True, True, False),
    block('get_weather(days=2,city="x")\n'): (False, False, False, False),  # the schema's order
    "<|tool_call_start|>": (False, False, False, False),
}


@pytest.mark.parametrize("reply", CASES)
def test_what_a_choice_lets_through(reply: str, byte_tokens: LLTokenizer) -> None:
    choices: list[Any] = ["none", "auto", "required", NAMED]
    results = tuple(accepts(tool_choice_grammar(TOOLS, choice), reply, byte_tokens) for choice in choices)
    assert results == CASES[reply]


def test_one_call_and_opened_reasoning(byte_tokens: LLTokenizer) -> None:
    one = tool_choice_grammar(TOOLS, "required", parallel=False)
    assert accepts(one, block(NOW_CALL), byte_tokens) and not accepts(one, block(NOW_CALL * 2), byte_tokens)
    opened = tool_choice_grammar(TOOLS, "required", prompt="assistant\n<think>\n")
    assert accepts(opened, "hm\n</think>\n" + block(NOW_CALL), byte_tokens)
    assert not accepts(opened, block(NOW_CALL), byte_tokens)


RICH = {
    "name": "plan",
    "parameters": {
        "type": "object",
        "properties": {
            "note": {"type": "string", "maxLength": 4},
            "stops": {"type": "array", "items": {"$ref": "#/$defs/stop"}, "maxItems": 2},
            "mode": {"enum": ["fast", 'odd "one"', None]},
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "from": {"type": "boolean"},
        },
        "required": ["stops", "from"],
        "$defs": {"stop": {"type": "object", "properties": {"km": {"type": "integer"}}, "required": ["km"]}},
    },
}


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_drawn_under_the_grammar_is_read_as_calls(seed: int, byte_tokens: LLTokenizer) -> None:
    """A model that knows nothing draws bytes; what comes out are calls that keep to the schema."""
    tools = parse_tools([RICH, WEATHER])
    grammar = tool_choice_grammar(tools, "required")
    assert grammar is not None and LLMatcher.validate_grammar(grammar, byte_tokens) == ""
    matcher, rng, drawn = LLMatcher(byte_tokens, grammar, log_level=0), random.Random(seed), bytearray(b"<|tool")
    assert matcher.consume_tokens(list(drawn))  # reasoning would go on for ever
    while not (matcher.is_accepting() and drawn.endswith(b"end|>")):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [byte for byte in range(256) if mask >> byte & 1]
        ends = [byte for byte in allowed if byte in b'"`>)}]\n']  # what soon comes to an end
        byte = rng.choice(ends if ends and rng.random() < 0.6 else allowed)
        assert matcher.consume_token(byte) and len(drawn) < 5000
        drawn.append(byte)
    events = parse_reply(drawn.decode(), tools)
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert calls and all(kind in ("plan", "get_weather") for kind, _ in readable(events))
    for call in calls:
        values = json.loads(call.arguments)
        if call.name == "plan":
            assert {"stops", "from"} <= set(values) <= {"note", "stops", "mode", "share", "from"}
            assert isinstance(values["from"], bool) and all(isinstance(stop["km"], int) for stop in values["stops"])
            assert values.get("mode", None) in ("fast", 'odd "one"', None) and 0 <= values.get("share", 0) <= 1
        else:
            assert isinstance(values["city"], str)


WRONG = [
    ("sometimes", TOOLS, "tool_choice is 'sometimes'"),
    ({"type": "function"}, TOOLS, "tool_choice is {'type'"),
    ({"type": "function", "function": [None]}, TOOLS, "tool_choice is {'type'"),
    ({"type": "function", "function": {"name": "f"}}, TOOLS, "no tool: there are get_weather, clock.read-now"),
    ("required", (), "there are no tools"),
]


@pytest.mark.parametrize("choice, tools, words", WRONG)
def test_wrong_choices(choice: Any, tools: Any, words: str) -> None:
    with pytest.raises(UsageError) as error:
        tool_choice_grammar(tools, choice)
    assert words in str(error.value)


def test_without_tools_anything_goes() -> None:
    assert tool_choice_grammar((), "auto") is None is tool_choice_grammar((), None)
    assert chosen_tools(parse_tools([NOW]), NAMED)[0].name == "clock.read-now"
