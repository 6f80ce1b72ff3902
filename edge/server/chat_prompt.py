"""Where a model's chat format meets the protocol: a prompt from messages, and deltas from what the model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edge.chat_format.choice_grammar import chosen_tools, tool_choice_grammar
from edge.chat_format.reply import Content, Event, Reasoning, ReplyParser, parse_reply, to_message
from edge.chat_format.tools import Tool, parse_tools
from edge.server.protocol import ChatBody
from edge.text import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A chat's prompt. tools: those that a reply may call. grammar: of a reply that must call one, in Lark's syntax."""

    text: str
    ids: list[int]
    tools: tuple[Tool, ...] = ()
    grammar: str | None = None

    def parser(self) -> ReplyParser:
        """Of one reply."""
        return ReplyParser(self.tools, prompt=self.text)

    def message(self, text: str, make_id: Callable[[], str]) -> dict[str, Any]:
        """Of a whole reply."""
        return to_message(parse_reply(text, self.tools, prompt=self.text), iter(make_id, ""))


def prompt_of(tokenizer: Tokenizer, body: ChatBody) -> Prompt:
    """By the model's template; UsageError if messages, tools or tool_choice are not what they should be.

    With tool_choice "none" the model does not hear of tools. "auto" leaves to it whether it calls one, and how well.
    """
    tools = () if body.tool_choice == "none" else parse_tools(body.tools or ())
    chosen_tools(tools, body.tool_choice)
    text = tokenizer.render_chat(body.messages, tools=tools, enable_thinking=body.thinking)
    grammar = None
    if body.tool_choice not in (None, "auto", "none"):
        parallel = body.parallel_tool_calls is not False
        grammar = tool_choice_grammar(tools, body.tool_choice, parallel=parallel, prompt=text)
    return Prompt(text, tokenizer.encode_prompt(text), tools, grammar)


class Deltas:
    """Turns a reply's text into deltas of a chat's choice. A call is one delta: it comes when it is whole."""

    def __init__(self, parser: ReplyParser, make_id: Callable[[], str]) -> None:
        self._parser, self._make_id = parser, make_id
        self.calls = 0

    def push(self, text: str, *, is_last: bool = False) -> list[dict[str, Any]]:
        """The deltas of a piece, in order."""
        events: Sequence[Event] = self._parser.push(text)
        if is_last:
            events = [*events, *self._parser.finish()]
        return [self._delta(event) for event in events]

    def _delta(self, event: Event) -> dict[str, Any]:
        if isinstance(event, Content):
            return {"content": event.text}
        if isinstance(event, Reasoning):
            return {"reasoning_content": event.text}
        self.calls += 1
        return {"tool_calls": [{"index": self.calls - 1, **event.to_openai(self._make_id())}]}
