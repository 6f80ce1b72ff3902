"""Messages of the OpenAI protocol made ready for a chat template, whether or not it knows of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edge.chat_format.call_syntax import write_calls
from edge.chat_format.reply import THOUGHT_END, THOUGHT_START
from edge.chat_format.tool_prompt import tools_prompt
from edge.chat_format.tools import Tool, ToolCall
from edge.errors import UsageError

Message = Mapping[str, Any]


def template_messages(messages: Sequence[Message], tools: Sequence[Tool], *, template_has_tools: bool) -> list[Message]:
    """Checked messages, contents as one text; UsageError says what is wrong with one.

    A template that knows of tools gets calls as Hugging Face's conventions have them: arguments as an object, and the
    reasoning of a message that calls tools as its `thought` too, as OpenBMB's template wants it. For one that does not,
    tools are written into the system message, and calls and the reasoning before them into the contents, in MiniCPM4's
    format.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UsageError("a chat needs a list of at least one message, each with a role and a content")
    checked = [_checked(f"messages[{i}]", message) for i, message in enumerate(messages)]
    if template_has_tools:
        return checked
    written: list[Message] = [_written(message) for message in checked]
    if tools:
        system = written.pop(0) if written[0]["role"] == "system" else {"role": "system", "content": ""}
        written.insert(0, {**system, "content": system["content"] + tools_prompt(tools)})
    return written


def _checked(where: str, message: object) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UsageError(f"{where} must be an object whose role is a string, such as 'user'")
    calls = message.get("tool_calls")
    content = _text(message.get("content"))
    if not isinstance(content, str) and not (content is None and calls):
        raise UsageError(
            f"{where}.content is of type {type(content).__name__}: it must be one string of text, or a list of texts"
        )
    changed: dict[str, Any] = {} if content is message.get("content") else {"content": content}
    if calls:
        changed["tool_calls"] = _checked_calls(f"{where}.tool_calls", calls)
        if (thought := message.get("reasoning_content")) and "thought" not in message:
            changed["thought"] = thought
    return {**message, **changed} if changed else message


def _text(content: Any) -> Any:
    """The content, put together if it is a list of texts."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else content  # type: ignore[arg-type]


def _checked_calls(where: str, calls: object) -> list[dict[str, Any]]:
    """The calls with their arguments as objects."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UsageError(f"{where} is of type {type(calls).__name__}: it must be a list of calls")
    checked = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UsageError(f"{where}[{i}] must be a function with a name and arguments")
        arguments = _object(function.get("arguments"))
        if arguments is None:
            raise UsageError(f"{where}[{i}].function.arguments must be the JSON text of an object")
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _object(arguments: object) -> Mapping[str, Any] | None:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    return arguments if isinstance(arguments, Mapping) else None


def _written(message: Message) -> dict[str, Any]:
    """The message with its calls in its content."""
    if not message.get("tool_calls"):
        return dict(message)
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [ToolCall.of(function["name"], function["arguments"]) for function in functions]
    thought = f"{THOUGHT_START}\n{message['thought']}\n{THOUGHT_END}\n" if message.get("thought") else ""
    content = thought + write_calls(calls) + (message.get("content") or "")
    return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
