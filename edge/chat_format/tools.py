"""Tools a model may call and calls it makes, in the shapes of the OpenAI protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge.errors import UsageError


@dataclass(frozen=True)
class Tool:
    """A function the model may call; `parameters` is the JSON schema of an object, {} if it takes none."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """In the schema's order, which is that of positional arguments."""
        return tuple(self.parameters.get("properties", {}))

    def to_openai(self) -> dict[str, Any]:
        """An element of a request's `tools`."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolCall:
    """One call of a reply; `arguments` is the text of a JSON object, as the OpenAI protocol wants it."""

    name: str
    arguments: str

    @staticmethod
    def of(name: str, arguments: Mapping[str, Any]) -> ToolCall:
        """From JSON values; ValueError if they are none (NaN, infinity)."""
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))

    def to_openai(self, call_id: str) -> dict[str, Any]:
        """An element of a message's `tool_calls`."""
        return {"id": call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def parse_tools(values: object) -> tuple[Tool, ...]:
    """A request's `tools`, checked; UsageError names what is wrong. A bare function counts as one of type function."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UsageError(f"tools is of type {type(values).__name__}: it must be a list of functions")
    tools = tuple(_parse_tool(f"tools[{i}]", value) for i, value in enumerate(values))
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two tools have the name {name!r}: rename one of them")
    return tools


def _parse_tool(where: str, value: object) -> Tool:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} is of type {type(value).__name__}: it must be an object of type 'function'")
    if value.get("type", "function") != "function":
        raise UsageError(f"{where}.type is {value['type']!r}: only functions can be called")
    function = value.get("function", value)
    if not isinstance(function, Mapping) or not _is_name(function.get("name")):
        raise UsageError(f"{where} needs a name of letters, digits and _ - . / that begins with a letter or _")
    description, parameters = function.get("description"), function.get("parameters")
    if not isinstance(description, str | None):
        raise UsageError(f"{where}.description is of type {type(description).__name__}: it must be a string")
    if not isinstance(parameters, Mapping | None) or not _describes_object(parameters or {}):
        raise UsageError(f"{where}.parameters must be the JSON schema of an object")
    return Tool(function["name"], description or "", parameters or {})


def _describes_object(schema: Mapping[str, Any]) -> bool:
    required = schema.get("required", [])
    names_only = isinstance(required, list) and all(isinstance(name, str) for name in required)
    return names_only and isinstance(schema.get("properties", {}), Mapping)


def _is_name(value: object) -> bool:
    if not isinstance(value, str) or not value.isascii() or not value:
        return False
    return (value[0].isalpha() or value[0] == "_") and all(c.isalnum() or c in "_-./" for c in value)
