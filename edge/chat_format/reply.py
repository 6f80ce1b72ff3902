"""A reply's text, as it streams, taken apart: what is said, what is only thought, and which tools are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edge.chat_format.call_syntax import CALLS_END, CALLS_START, CallBlock, MalformedCallError
from edge.chat_format.tools import Tool, ToolCall

# MiniCPM4.1 thinks between the first pair; models of the family that have tools explain themselves between the second.
THINK_START, THINK_END = "<think>", "</think>"
THOUGHT_START, THOUGHT_END = "<|thought_start|>", "<|thought_end|>"
MARKERS = (THINK_START, THINK_END, THOUGHT_START, THOUGHT_END, CALLS_START, CALLS_END)
_ENDS = {THINK_START: THINK_END, THOUGHT_START: THOUGHT_END}


@dataclass(frozen=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what comes before the answer and is no part of it."""

    text: str


Event = Content | Reasoning | ToolCall


def opened_reasoning(prompt: str) -> str | None:
    """The marker of reasoning that a prompt ends with, so that the reply begins inside it; None if there is none."""
    return next((marker for marker in _ENDS if prompt.rstrip().endswith(marker)), None)


class ReplyParser:
    """Text in, events out, each as early as it is certain; how the text is cut into pieces makes no difference.

    No part of a marker comes out: what may become one is held back, and so is white space, which beside a marker is
    layout and belongs to nobody. Reasoning stands before everything else; markers of it inside the answer are text.
    Without `tools` there are no calls, and their markers are text too. A call comes out whole, when its last
    parenthesis is there. From where a block of calls cannot be read it is content, with its markers, as it stands.

    `prompt`: the text before the reply, which may have opened the reasoning already.
    """

    def __init__(self, tools: Sequence[Tool] = (), *, prompt: str = "") -> None:
        self._parameters = {tool.name: tool.parameter_names for tool in tools}
        self._held = ""
        self._reasoning_end = _ENDS.get(opened_reasoning(prompt) or "")
        self._block: CallBlock | None = None
        self._layout = ""  # white space before the block, which is none if it turns out to be text
        self._after_marker = self._reasoning_end is not None
        self._begun = False  # the answer, or a call

    def push(self, text: str) -> list[Event]:
        """What this piece of the reply makes certain."""
        events: list[Event] = []
        while text:
            text = self._push_block(text, events) if self._block is not None else self._push_text(text, events)
        return events

    def finish(self) -> list[Event]:
        """What was held back, when no more text comes."""
        events: list[Event] = []
        if self._block is not None:
            block, self._block = self._block, None
            if not block.lacks_only_its_end:
                self._emit(self._layout + block.unread, events)
        held, self._held = self._held, ""
        self._emit(held, events)
        return events

    def _markers(self, text: str) -> list[str]:
        """Those that mean something in this text."""
        if self._reasoning_end is not None:
            return [self._reasoning_end]
        calls = [CALLS_START] if self._parameters else []
        markers, first = [*calls, *_ENDS], text.lstrip()
        if first and not any(marker.startswith(first[: len(marker)]) for marker in markers):
            self._begun = True
        return calls if self._begun else markers

    def _push_text(self, text: str, events: list[Event]) -> str:
        """Take text outside a block of calls -> what comes after the first marker in it."""
        text, self._held = self._held + text, ""
        markers = self._markers(text)
        found = [(place, marker) for marker in markers if (place := text.find(marker)) >= 0]
        if found:
            place, marker = min(found)
            self._meet(marker, text[:place], events)
            return text[place + len(marker) :]
        if markers:
            partial = max((n for m in markers for n in range(1, len(m)) if text.endswith(m[:n])), default=0)
            certain = text[: len(text) - partial].rstrip()
            text, self._held = certain, text[len(certain) :]
        self._emit(text, events)
        return ""

    def _meet(self, marker: str, before: str, events: list[Event]) -> None:
        certain = before.rstrip()
        self._emit(certain, events)
        if marker == CALLS_START:
            self._block, self._layout = CallBlock(self._parameters), before[len(certain) :]
            self._begun = True
        else:
            self._reasoning_end, self._after_marker = _ENDS.get(marker), True

    def _push_block(self, text: str, events: list[Event]) -> str:
        """Take text of a block of calls -> what comes after the block."""
        assert self._block is not None
        for i, character in enumerate(text):
            try:
                call = self._block.push(character)
            except MalformedCallError:
                unread, self._block = self._block.unread, None
                if unread.startswith(CALLS_START):  # not this block again
                    self._emit(self._layout + unread[:1], events)
                    unread = unread[1:]
                return unread + text[i + 1 :]
            if call is not None:
                events.append(call)
                self._after_marker = True
            if self._block.done:
                self._block, self._after_marker = None, True
                return text[i + 1 :]
        return ""

    def _emit(self, text: str, events: list[Event]) -> None:
        if self._after_marker:
            text = text.lstrip()
        if not text:
            return
        self._after_marker = False
        if self._reasoning_end is not None:
            events.append(Reasoning(text))
            return
        self._begun = self._begun or not text.isspace()
        events.append(Content(text))


def parse_reply(text: str, tools: Sequence[Tool] = (), *, prompt: str = "") -> list[Event]:
    """The events of a whole reply."""
    parser = ReplyParser(tools, prompt=prompt)
    return [*parser.push(text), *parser.finish()]


def to_message(events: Iterable[Event], call_ids: Iterable[str]) -> dict[str, Any]:
    """The assistant's message of the OpenAI protocol; as many of `call_ids` are taken as there are calls."""
    texts: dict[type, str] = {Content: "", Reasoning: ""}
    calls: list[ToolCall] = []
    for event in events:
        if isinstance(event, ToolCall):
            calls.append(event)
        else:
            texts[type(event)] += event.text
    message: dict[str, Any] = {"role": "assistant", "content": texts[Content]}
    if texts[Reasoning]:
        message["reasoning_content"] = texts[Reasoning]
    if calls:
        message["content"] = texts[Content] or None
        message["tool_calls"] = [call.to_openai(i) for call, i in zip(calls, call_ids, strict=False)]
    return message
