"""Where a model's chat format meets the protocol: a prompt from messages, and deltas from what the model writes.

A reply's text goes through a reader, piece by piece, which tells content from reasoning and calls of tools.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edge.chooser import Constraint
from edge.errors import UsageError
from edge.server.protocol import ChatBody
from edge.text import Tokenizer


@dataclass(frozen=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text that the model thinks."""

    text: str


@dataclass(frozen=True)
class Call:
    """A tool is to be called; `arguments` is JSON."""

    name: str
    arguments: str


Part = Content | Reasoning | Call


class ReplyReader(Protocol):
    """Reads one reply."""

    def push(self, text: str) -> list[Part]:
        """What is certain with this piece of text."""
        ...

    def finish(self) -> list[Part]:
        """What was held back."""
        ...


class PlainReader:
    """All of it is content."""

    def push(self, text: str) -> list[Part]:
        """See ReplyReader."""
        return [Content(text)] if text else []

    def finish(self) -> list[Part]:
        """See ReplyReader."""
        return []


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, what reads each reply, and what the replies must keep to."""

    ids: list[int]
    reader: Callable[[], ReplyReader] = PlainReader
    constraint: Callable[[], Constraint] | None = None


def prompt_of(tokenizer: Tokenizer, body: ChatBody) -> Prompt:
    """A chat's prompt by the model's template; UsageError if the messages cannot be rendered."""
    if body.tools and body.tool_choice != "none":
        raise UsageError("this model's chat format has no tools; leave out tools, or set tool_choice to none")
    messages = [_with_text(message) for message in body.messages]
    return Prompt(tokenizer.encode_chat(messages, enable_thinking=body.thinking))


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one string; OpenAI's may be a list of parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise UsageError("a message has content that is no text; this model reads nothing else")
    return {**message, "content": "".join(map(str, texts))}


class Deltas:
    """Turns a reply's text into deltas of a chat's choice."""

    def __init__(self, reader: ReplyReader, make_id: Callable[[], str]) -> None:
        self._reader, self._make_id = reader, make_id
        self.calls = 0

    def push(self, text: str, *, is_last: bool = False) -> list[dict[str, Any]]:
        """The deltas of a piece, in order."""
        parts: Sequence[Part] = self._reader.push(text)
        if is_last:
            parts = [*parts, *self._reader.finish()]
        return [self._delta(part) for part in parts]

    def _delta(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Content):
            return {"content": part.text}
        if isinstance(part, Reasoning):
            return {"reasoning_content": part.text}
        function = {"name": part.name, "arguments": part.arguments}
        self.calls += 1
        index = self.calls - 1
        return {"tool_calls": [{"index": index, "id": self._make_id(), "type": "function", "function": function}]}


def message_of(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole message that deltas add up to."""
    content = [delta["content"] for delta in deltas if "content" in delta]
    reasoning = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
    calls = [dict(call) for delta in deltas for call in delta.get("tool_calls", ())]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content) if content or not calls else None}
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        for call in calls:
            del call["index"]
        message["tool_calls"] = calls
    return message
