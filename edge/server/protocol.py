"""Bodies of requests, as OpenAI's clients send them. What is not named here is ignored, and the reply says so."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from edge.sampler import MOST_LOGPROBS
from edge.server.request_schemas import MessageValues, ToolChoice, ToolValues, Unsupported

MOST_CHOICES = 16
MOST_PROMPTS = 128


def _whole(value: Any) -> Any:
    """JSON knows one kind of numbers: 3.0 is whole."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1), Whole]
Listed = Annotated[int, Field(ge=0, le=MOST_LOGPROBS), Whole]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES), Whole]
TokenId = Annotated[int, Field(ge=0), Whole]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Share = Annotated[Number, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Biases = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Annotated[Number, Field(ge=-100, le=100)]],
    Field(json_schema_extra={"additionalProperties": False}),
]


class Strict(BaseModel):
    """Values have the types that the document names: no number in quotes, no word for true."""

    model_config = ConfigDict(strict=True)


class Body(Strict):
    """Of any request."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None

    @property
    def ignored(self) -> list[str]:
        """Fields that mean nothing here."""
        return sorted(self.model_extra or ())


class StreamOptions(Strict):
    """include_usage: a last chunk tells what the reply took."""

    include_usage: bool | None = False


class GenerationBody(Body):
    """What both kinds of completions have. None is the default: of the model, or of OpenAI where it has none."""

    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64), Whole] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0), Whole] | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    logit_bias: Biases | None = None
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


class JsonSchema(Strict):
    """The schema, and what it is called."""

    model_config = ConfigDict(populate_by_name=True)
    name: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(Strict):
    """What text a reply may be. `grammar` (Lark) and `regex` are our own."""

    type: Literal["text", "json_object", "json_schema", "grammar", "regex"]
    json_schema: JsonSchema | None = None
    grammar: str | None = None
    regex: str | None = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[MessageValues], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Listed | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolValues] | None = None
    tool_choice: ToolChoice | None = None
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

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1), Whole] | None = None
    logprobs: Listed | None = None
    echo: bool | None = None
    best_of: Choices | None = None
    suffix: Unsupported | None = None
    response_format: ResponseFormat | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt as it is, or messages through the chat template."""

    prompt: str | None = None
    messages: Annotated[list[MessageValues], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
