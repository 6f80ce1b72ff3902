"""What messages and tools of a request may be, in JSON schemas: edge/chat_format checks them, with better words."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

_TEXT = {"type": "string"}
_ARGUMENTS = {"contentMediaType": "application/json", "contentSchema": {"type": "object"}}
_CALLS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["function"],
        "properties": {
            "function": {
                "type": "object",
                "required": ["name", "arguments"],
                "properties": {
                    "name": _TEXT,
                    "arguments": {"anyOf": [{"type": "object"}, {**_TEXT, **_ARGUMENTS}]},
                },
            }
        },
    },
}
_CONTENT = {
    "anyOf": [
        _TEXT,
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": _TEXT},
            },
        },
    ]
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {"role": _TEXT},
    "anyOf": [
        {"required": ["content"], "properties": {"content": _CONTENT}},
        {"required": ["tool_calls"], "properties": {"content": {"type": "null"}, "tool_calls": _CALLS}},
    ],
}
_NAME = {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_./-]*$"}
_FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": _NAME,
        "description": {"type": ["string", "null"]},
        "parameters": {
            "type": ["object", "null"],
            "properties": {"properties": {"type": "object"}, "required": {"type": "array", "items": _TEXT}},
        },
    },
}
_TOOL = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
}
_CHOICE = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "required": ["name"], "properties": {"name": _NAME}},
    },
}

Unsupported = Annotated[str, WithJsonSchema({"type": "string", "maxLength": 0})]
MessageValues = Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]
ToolValues = Annotated[dict[str, Any], WithJsonSchema(_TOOL)]
ToolChoice = Annotated[
    str | dict[str, Any], WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _CHOICE]})
]
