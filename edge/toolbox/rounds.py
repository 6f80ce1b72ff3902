"""A turn in which the model may use tools: it calls, reads the results, and calls again or answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge.chat_format.tools import ToolCall
from edge.text import MOST_CHARACTERS, Tokenizer

Message = dict[str, Any]
Speak = Callable[[list[Message]], Message | None]  # the conversation so far -> the model's message, None if it has none
Execute = Callable[[ToolCall], str]

INTERRUPTED = "Error: the user stopped this call."
ROUNDS_USED_UP = "Error: not called, because the limit of rounds is reached."


def take_rounds(messages: list[Message], speak: Speak, execute: Execute, rounds: int) -> bool:
    """Let the model speak until it calls no tool, at most `rounds` times with tools; `messages` grows in place.

    Every call gets a message with its result, so that the conversation can go on whatever happens. False if the model
    said nothing. KeyboardInterrupt ends the turn; calls that were not made say so.
    """
    for left in range(rounds, -1, -1):
        message = speak(messages)
        if message is None:
            return False
        messages.append(message)
        calls = message.get("tool_calls") or []
        answered = 0
        try:
            for call in calls:
                text = execute(tool_call(call)) if left else ROUNDS_USED_UP
                messages.append(_result(call, text))
                answered += 1
        except KeyboardInterrupt:
            messages += [_result(call, INTERRUPTED) for call in calls[answered:]]
            raise
        if not calls:
            break
    return True


def tool_call(call: Mapping[str, Any]) -> ToolCall:
    """From a message's `tool_calls`."""
    return ToolCall(call["function"]["name"], call["function"]["arguments"])


def _result(call: Mapping[str, Any], text: str) -> Message:
    return {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": text}


def shortened(text: str, tokenizer: Tokenizer, most_tokens: int) -> str:
    """A result as the model may read it: no special tokens in it, and no more than `most_tokens` of others."""
    head = text[: most_tokens * MOST_CHARACTERS]
    clean = tokenizer.without_special_tokens(head)
    ids = tokenizer.encode(clean, add_bos=False)
    if len(ids) <= most_tokens and len(head) == len(text):
        return clean
    return f"{tokenizer.decode(ids[:most_tokens])}\n[cut: the whole result has {len(text)} characters]"
