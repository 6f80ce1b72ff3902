"""Calls as MiniCPM4 writes them, in Python's syntax: read character by character, and written.

    <|tool_call_start|>
    ```python
    get_weather(city="Paris",days=2)
    ```
    <|tool_call_end|>

Arguments are literals, of Python or of JSON; nothing is ever evaluated. Names are read as they are, so they may hold
hyphens (MCP servers use them) or be Python's keywords, which its own parser would refuse.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge.chat_format.tools import ToolCall

CALLS_START, CALLS_END = "<|tool_call_start|>", "<|tool_call_end|>"
_FENCE_OPEN, _FENCE_CLOSE = "```python\n", "```\n"
_KEYWORD = re.compile(r"\s*([^\s=,()\[\]{}\"']+)\s*=(?!=)(.*)", re.DOTALL)
_WORDS = {"true": True, "false": False, "null": None}
_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "\"'"


class MalformedCallError(ValueError):
    """The text is no call."""


def write_calls(calls: Sequence[ToolCall]) -> str:
    """The block that makes these calls, as the model was trained to write it."""
    lines = "".join(f"{write_call(call.name, json.loads(call.arguments))}\n" for call in calls)
    return f"{CALLS_START}\n{_FENCE_OPEN}{lines}{_FENCE_CLOSE}{CALLS_END}\n"


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """One call in a line; values are JSON."""
    return f"{name}({','.join(f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in arguments.items())})"


def read_literal(source: str) -> Any:
    """The value of a JSON or Python literal; MalformedCallError if it is none, or one that JSON cannot hold."""
    try:
        value = _parse_literal(source)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # neither infinity nor half a character
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MalformedCallError(f"{source!r} is no literal") from error
    return value


def _parse_literal(source: str) -> Any:
    try:
        return json.loads(source, parse_constant=_no_constant)
    except ValueError:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python complains of escapes that it does not know, such as \d
        return _value(ast.parse(f"(\n{source}\n)", mode="eval").body)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str(text)):
            # Two halves of a character, each escaped as JSON does it; a half alone is no text.
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        case ast.Constant(value=bool() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.UnaryOp(op=ast.UAdd(), operand=ast.Constant(value=int() | float() as value)):
            return +value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
    raise MalformedCallError(f"{type(node).__name__} is no literal")


def _key(node: ast.expr | None) -> str:
    key = None if node is None else _value(node)
    if not isinstance(key, str):
        raise MalformedCallError("a key is no string")
    return key


class _Arguments:
    """What stands between the parentheses of a call, split at its commas."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self._part: list[str] = []
        self._depth = 0
        self._quote = ""  # the character that ends the string we are in
        self._triple = False
        self._run = 0  # quotes in a row: those that began the string, or may end a triple one
        self._fresh = False  # nothing but the opening quote of the string has come
        self._escaped = False

    def push(self, character: str) -> bool:
        """Whether this closed the call."""
        if self._quote and self._in_string(character):
            return False
        if character in _QUOTES:
            self._quote, self._fresh, self._triple, self._run = character, True, False, 1
        elif character in _OPENING:
            self._depth += 1
        elif character in _CLOSING and self._depth:
            self._depth -= 1
        elif character == ")":
            self._end_part()
            return True
        elif character == "," and self._depth == 0:
            self._end_part()
            return False
        self._part.append(character)
        return False

    def _end_part(self) -> None:
        self.parts.append("".join(self._part))
        self._part = []

    def _in_string(self, character: str) -> bool:
        """Take a character of a string; False if it comes after one that has just turned out to be empty."""
        if self._fresh and self._run == 2:
            if character != self._quote:
                self._quote, self._fresh = "", False
                return False
            self._triple, self._fresh, self._run = True, False, 0
            self._part.append(character)
            return True
        if not self._triple and character in "\r\n" and not self._escaped:
            # Models break lines inside plain strings; Python would not.
            self._part.append("\\n" if character == "\n" else "\\r")
            self._fresh = False
            return True
        self._part.append(character)
        if self._escaped:
            self._escaped, self._run = False, 0
        elif character == "\\":
            self._escaped, self._fresh, self._run = True, False, 0
        elif character != self._quote:
            self._fresh, self._run = False, 0
        elif self._fresh:
            self._run = 2
        elif not self._triple:
            self._quote = ""
        else:
            self._run += 1
            if self._run == 3:
                self._quote = ""
        return True

    def values(self, positional: Sequence[str]) -> dict[str, Any]:
        """Arguments by name; those without one are named by `positional`."""
        parts = self.parts[:-1] if not self.parts[-1].strip() else self.parts
        values: dict[str, Any] = {}
        for i, part in enumerate(parts):
            if keyword := _KEYWORD.fullmatch(part):
                name, source = keyword[1], keyword[2]
            elif i < len(positional) and i == len(values):
                name, source = positional[i], part
            else:
                raise MalformedCallError(f"{part!r} is no argument")
            if name in values:
                raise MalformedCallError(f"{name} is given twice")
            values[name] = read_literal(source.strip())
        return values


_State = Callable[[str], "ToolCall | None"]


class CallBlock:
    """The text after CALLS_START, one character at a time.

    `parameters` names each function's parameters, for calls with positional arguments.
    """

    def __init__(self, parameters: Mapping[str, Sequence[str]]) -> None:
        self.done = False
        self._calls = 0
        self._unread = [CALLS_START]
        self._parameters = parameters
        self._state: _State = self._before_fence
        self._word = ""
        self._arguments = _Arguments()

    def push(self, character: str) -> ToolCall | None:
        """A call, once its last parenthesis is there; MalformedCallError if this can be no block of calls."""
        self._unread.append(character)
        call = self._state(character)
        if call is not None:
            self._unread.clear()
            self._calls += 1
        return call

    @property
    def unread(self) -> str:
        """The text, from the marker on, of which no call has been made: content if this is malformed or ends early."""
        return "".join(self._unread)

    @property
    def lacks_only_its_end(self) -> bool:
        """Calls were made, and after them came nothing but layout."""
        return self._calls > 0 and self._state in (self._between, self._end)

    def _before_fence(self, character: str) -> None:
        if character == "`":
            self._state = self._fence
        elif not character.isspace():
            self._between(character)

    def _fence(self, character: str) -> None:
        """```python, to the end of the line."""
        if character.isspace():
            self._state = self._between
        elif character != "`" and not character.isalnum():
            raise MalformedCallError(f"{character!r} in the fence's line")

    def _between(self, character: str) -> None:
        self._state = self._between
        if character == "#":
            self._state = self._comment
        elif character == CALLS_END[0]:
            self._word, self._state = character, self._end
        elif character.isalpha() or character == "_":
            self._word, self._state = character, self._name
        elif not character.isspace() and character not in "`;,":
            raise MalformedCallError(f"{character!r} between calls")

    def _comment(self, character: str) -> None:
        if character == "\n":
            self._state = self._between

    def _name(self, character: str) -> None:
        if character == "(":
            self._arguments, self._state = _Arguments(), self._in_arguments
        elif character.isalnum() or character in "_-./":
            self._word += character
        else:
            raise MalformedCallError(f"{character!r} in a name")

    def _in_arguments(self, character: str) -> ToolCall | None:
        if not self._arguments.push(character):
            return None
        self._state = self._between
        values = self._arguments.values(self._parameters.get(self._word, ()))
        return ToolCall.of(self._word, values)

    def _end(self, character: str) -> None:
        self._word += character
        if not CALLS_END.startswith(self._word):
            raise MalformedCallError(f"{self._word!r} between calls")
        self.done = self._word == CALLS_END
