"""What `tool_choice` asks for as a grammar that llguidance enforces (its Lark syntax, with %json for values).

Arguments come in the schema's order, the required ones always; values are compact JSON of the parameter's schema, which
`edge.chat_format.reply` reads back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edge.chat_format.call_syntax import CALLS_END, CALLS_START
from edge.chat_format.reply import THINK_END, THINK_START, THOUGHT_END, THOUGHT_START, opened_reasoning
from edge.chat_format.tools import Tool
from edge.errors import UsageError

ToolChoice = str | Mapping[str, Any] | None


def tool_choice_grammar(
    tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool = True, prompt: str = ""
) -> str | None:
    """The grammar of a reply under `tool_choice`; None if it may be anything.

    "none": a reply without calls. "auto": text in which every block of calls is one of these tools'. "required", or
    {"type": "function", "function": {"name": ...}}: a block of calls (of that function), after reasoning or at once.
    `parallel` False allows one call; `prompt` is the text before the reply, which may have opened the reasoning.
    UsageError if the choice is unknown or names no tool.
    """
    called = chosen_tools(tools, choice)
    if choice in (None, "auto") and not tools:
        return None
    text = f"TEXT: {_without(CALLS_START)}"
    if not called:
        return f"start: TEXT\n{text}\n"
    rules = []
    if choice in (None, "auto"):
        # A lexeme with a suffix ends where the suffix first does, so the text before it has no other marker.
        rules += ["start: (text block)* TEXT", f"text[suffix={_quoted(CALLS_START)}]: {_ANYTHING}", text]
    else:
        opened, optional = opened_reasoning(prompt), []
        for name, (marker, end) in {"think": (THINK_START, THINK_END), "thought": (THOUGHT_START, THOUGHT_END)}.items():
            optional.append(f"{name} SPACE" if marker == opened else f"({_quoted(marker)} {name} SPACE)?")
            rules.append(f"{name}[suffix={_quoted(end)}]: {_ANYTHING}")
        rules += [f"start: {' '.join(optional)} {_quoted(CALLS_START)} block", "SPACE: /[ \\n]{0,3}/"]
    many = "+" if parallel else ""
    rules += [
        f'block: "\\n```python\\n" (call {_NEWLINE}){many} "```\\n" {_quoted(CALLS_END)} {_NEWLINE}?',
        f"call: {' | '.join(f'call_{i}' for i in range(len(called)))}",
    ]
    for i, tool in enumerate(called):
        rules += _call_rules(i, tool)
    return "\n".join(rules) + "\n"


def chosen_tools(tools: Sequence[Tool], choice: ToolChoice) -> tuple[Tool, ...]:
    """The tools that a reply may call; UsageError if `choice` is none of the protocol's, or names none of them."""
    if choice is None or choice == "auto":
        return tuple(tools)
    if choice == "none":
        return ()
    if choice == "required":
        if not tools:
            raise UsageError("tool_choice is 'required' and there are no tools: send tools, or choose 'auto'")
        return tuple(tools)
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise UsageError(
            f"tool_choice is {choice!r}: it must be 'none', 'auto', 'required' or "
            '{"type": "function", "function": {"name": ...}}'
        )
    named = tuple(tool for tool in tools if tool.name == name)
    if not named:
        known = ", ".join(tool.name for tool in tools) or "none"
        raise UsageError(f"tool_choice names {name!r}, which is no tool: there are {known}")
    return named


_NEWLINE, _ANYTHING = '"\\n"', "/(?s:.*)/"
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _quoted(text: str) -> str:
    return json.dumps(text)


def _without(marker: str) -> str:
    """Any text in which the marker does not occur."""
    escaped = "".join(f"\\{c}" if c in "|/" else c for c in marker)
    return f"{_ANYTHING} & ~/(?s:.*){escaped}(?s:.*)/"


def _call_rules(i: int, tool: Tool) -> Iterator[str]:
    """call_<i>: the function's name and its arguments.

    first_<i>_<n> stands for the parameters from the n-th on before any argument, rest_<i>_<n> for them after one.
    """
    properties = tool.parameters.get("properties", {})
    required = tool.parameters.get("required") or ()
    yield f'call_{i}: {_quoted(tool.name + "(")} first_{i}_0 ")"'
    for n, (name, schema) in enumerate(properties.items()):
        argument, following = f"argument_{i}_{n}", f"rest_{i}_{n + 1}"
        optional = name not in required
        yield f"first_{i}_{n}: {argument} {following}" + (f" | first_{i}_{n + 1}" if optional else "")
        yield f"rest_{i}_{n}: " + (f'("," {argument})? ' if optional else f'"," {argument} ') + following
        yield f"{argument}: {_quoted(name + '=')} value_{i}_{n}"
        yield f"value_{i}_{n}: %json {json.dumps(_value_schema(schema, tool.parameters))}"
    for state in ("first", "rest"):
        yield f'{state}_{i}_{len(properties)}: ""'


def _value_schema(schema: object, root: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's schema by itself, with the definitions it may refer to."""
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {**(schema if isinstance(schema, Mapping) else {}), **definitions, "x-guidance": _COMPACT}
