"""Tools and strategies of replies for the tests of the chat format."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from edge.chat_format.reply import Content, Event, Reasoning
from edge.chat_format.tools import Tool, ToolCall, parse_tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name, 杭州 or Paris"},
                "days": {"type": "integer", "default": 3},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            },
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "clock.read-now", "description": "The time."}}
TOOLS: tuple[Tool, ...] = parse_tools([WEATHER, NOW])

# Characters that mean something to some layer: quotes, brackets, escapes, marks of a fence, starts of markers.
_CHARACTERS = st.sampled_from(list("ab \n\t\"'\\()[]{},=`#<>|/é杭\u2028🤖:.;0-_"))
texts = st.text(_CHARACTERS, max_size=12)
names = st.from_regex(r"\A[a-zA-Z_][a-zA-Z0-9_.\-]{0,6}\Z") | st.sampled_from(["from", "class", "None", "get_weather"])
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
calls = st.builds(ToolCall.of, names, st.dictionaries(names, json_values, max_size=3))
MARKERS = (
    "<think>",
    "</think>",
    "<|thought_start|>",
    "<|thought_end|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
)
# Texts that look like a reply of the format, and mostly are none.
noise = st.lists(
    st.sampled_from([*MARKERS, "```", "```python\n", "f(a=1)", "get_weather(", "city='x'", ")", "\n", " ", "so "])
    | st.sampled_from(MARKERS).flatmap(lambda marker: st.integers(1, len(marker)).map(lambda n: marker[:n]))
    | texts,
    max_size=10,
).map("".join)


def merged(events: list[Event]) -> list[Event]:
    """Pieces of the same kind that follow each other become one: what does not depend on how a text was cut."""
    whole: list[Event] = []
    for event in events:
        last = whole[-1] if whole else None
        if not isinstance(event, ToolCall) and type(last) is type(event):
            whole[-1] = type(event)(last.text + event.text)  # type: ignore[union-attr]
        else:
            whole.append(event)
    return whole


def readable(events: list[Event]) -> list[tuple[str, Any]]:
    """Events as plain values, arguments as objects."""
    values: list[tuple[str, Any]] = []
    for event in merged(events):
        match event:
            case Content(text):
                values.append(("content", text))
            case Reasoning(text):
                values.append(("reasoning", text))
            case ToolCall(name, arguments):
                values.append((name, json.loads(arguments)))
    return values
