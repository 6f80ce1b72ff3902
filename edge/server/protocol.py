"""Bodies of requests, as OpenAI's clients send them. What is not named here is ignored, and the reply says so."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_CHOICES = 16
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Text = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """Of any request."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None

    @property
    def ignored(self) -> list[str]:
        """Fields that mean nothing here."""
        return sorted(self.model_extra or ())


class StreamOptions(BaseModel):
    """include_usage: a last chunk tells what the reply took."""

    include_usage: bool | None = False


class GenerationBody(Body):
    """What both kinds of completions have. None is the default: of the model, or of OpenAI where it has none."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool | None = None
    user: str | None = None

    @property
    def choices(self) -> int:
        """Replies to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Is there a last chunk with it?"""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class JsonSchema(BaseModel):
    """The schema, and what it is called."""

    model_config = ConfigDict(populate_by_name=True)
    name: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What text a reply may be. `grammar` (Lark) and `regex` are our own."""

    type: Literal["text", "json_object", "json_schema", "grammar", "regex"]
    json_schema: JsonSchema | None = None
    grammar: str | None = None
    regex: str | None = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def thinking(self) -> bool | None:
        """None leaves it to the template."""
        value = (self.chat_template_kwargs or {}).get("enable_thinking", self.enable_thinking)
        return None if value is None else bool(value)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[int] | Annotated[list[str] | list[list[int]], Field(min_length=1, max_length=128)]
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt as it is, or messages through the chat template."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
