"""langchain-openai against a server; run by the Python that has it. Facts come as JSON on standard input."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field


class Seen(BaseModel):
    """What was seen."""

    kind: Literal["fox", "dog"]
    count: int = Field(ge=0, le=99)


@tool
def water_level(river: Literal["Elbe", "Oder"]) -> str:
    """How high a river is."""
    return f"{river}: 3 m"


def check_text(chat: ChatOpenAI, messages: list[Any], expected: str) -> None:
    """The same text whole, streamed, and asked for by asyncio; several at once."""
    whole = chat.invoke(messages)
    assert whole.content == expected, (whole.content, expected)
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] == 24
    chunks = list(chat.stream(messages))
    assert "".join(str(chunk.content) for chunk in chunks) == expected and len(chunks) > 5
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [24]
    assert asyncio.run(chat.ainvoke(messages)).content == expected
    assert [reply.content for reply in chat.batch([messages] * 3)] == [expected] * 3
    listed = chat.bind(logprobs=True, top_logprobs=2).invoke(messages).response_metadata["logprobs"]["content"]
    assert len(listed) == 24 and all(len(entry["top_logprobs"]) == 2 for entry in listed)


def check_tools(chat: ChatOpenAI, messages: list[Any]) -> None:
    """A call that must be made, whole and streamed; its result goes back."""
    able = chat.bind_tools([water_level], tool_choice="any", parallel_tool_calls=False)
    reply = able.invoke(messages)
    assert isinstance(reply, AIMessage)
    (call,) = reply.tool_calls
    assert call["name"] == "water_level" and call["args"]["river"] in ("Elbe", "Oder")
    chunks = list(able.stream(messages))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert [(each["name"], each["args"]) for each in total.tool_calls] == [(call["name"], call["args"])]
    result = water_level.invoke(call)
    assert isinstance(result, ToolMessage)
    answer = chat.bind_tools([water_level], tool_choice="none").invoke([*messages, reply, result])
    assert isinstance(answer.content, str) and not answer.tool_calls


def check_structure(chat: ChatOpenAI, messages: list[Any]) -> None:
    """A pydantic model, by response_format and by a tool that must be called."""
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(Seen, method=method).invoke(messages)
        assert isinstance(found, Seen) and found.kind in ("fox", "dog") and 0 <= found.count <= 99


def main() -> None:
    """An assertion fails, or nothing is said."""
    facts = json.load(sys.stdin)
    options: dict[str, Any] = {"base_url": facts["url"], "api_key": facts["key"], "model": facts["model"]}
    options |= {"temperature": 0, "max_tokens": 24, "max_retries": 0, "extra_body": {"ignore_eos": True}}
    chat = ChatOpenAI(**options, stream_usage=True)
    messages = [SystemMessage(facts["messages"][0]["content"]), HumanMessage(facts["messages"][1]["content"])]
    check_text(chat, messages, facts["chat"])
    drawing = {"temperature": 1, "seed": 1, "max_tokens": 200, "logit_bias": facts["bias"], "extra_body": None}
    check_tools(chat.model_copy(update=drawing), messages)
    check_structure(chat.model_copy(update=drawing), messages)
    assert OpenAI(**options).invoke(facts["prompt"]) == facts["completion"]


if __name__ == "__main__":
    main()
