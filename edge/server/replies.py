"""Bodies of answers, as the OpenAPI document describes them; the endpoints write them as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class Reply(BaseModel):
    """Nothing comes that is not named."""

    model_config = ConfigDict(extra="forbid")


class ErrorValues(Reply):
    """What went wrong. param: the field it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Reply):
    """Of every refusal."""

    error: ErrorValues


class CachedTokens(Reply):
    """How much of the prompts the prefix cache had."""

    cached_tokens: int


class PredictionTokens(Reply):
    """Guesses of speculative decoding."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Reply):
    """Tokens. completion_tokens_details: only with speculation."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: PredictionTokens | None = None


class TokenLogprob(Reply):
    """A token, by its natural log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenTokenLogprob(TokenLogprob):
    """One of the reply, beside the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Reply):
    """Of a chat's choice, or of a piece of it."""

    content: list[ChosenTokenLogprob]


class CalledFunction(Reply):
    """arguments: the text of a JSON object."""

    name: str
    arguments: str


class Call(Reply):
    """Of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class CallDelta(Call):
    """A call in a stream, which comes when it is whole."""

    index: int


class AssistantMessage(Reply):
    """content: null if the model only called tools. reasoning_content: what it thought before."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class ChatChoice(Reply):
    """A reply to a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(Reply):
    """What /v1/chat/completions answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Reply):
    """What a piece of a stream adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(Reply):
    """finish_reason: null until the last piece of the choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatChunk(Reply):
    """A piece of a stream. usage: in the last one, without choices, if it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobValues(Reply):
    """Lists of equal length: one entry for each token. The first of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """A text, after its prompt if that is echoed."""

    index: int
    text: str
    logprobs: CompletionLogprobValues | None
    finish_reason: FinishReason


class Completion(Reply):
    """What /v1/completions answers."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(CompletionChoice):
    """finish_reason: null until the last piece of the choice."""

    finish_reason: FinishReason | None  # type: ignore[assignment]


class CompletionChunk(Reply):
    """A piece of a stream. usage: in the last one, without choices, if it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class ServedModel(Reply):
    """max_model_len: tokens that a prompt and its reply may have together."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ServedModels(Reply):
    """What /v1/models answers."""

    object: Literal["list"]
    data: list[ServedModel]


class Tokens(Reply):
    """What /tokenize answers."""

    tokens: list[int]
    count: int
    max_model_len: int


class Health(Reply):
    """The engine works."""

    status: Literal["ok"]


class Ready(Reply):
    """Requests are taken. running, waiting: how many there are."""

    status: Literal["ok"]
    model: str
    running: int
    waiting: int


# An answer's `data:` lines, but for the last, which is [DONE].
STREAMED: Sequence[type[BaseModel]] = (ChatChunk, CompletionChunk)
_IGNORED = {"X-Ignored-Fields": {"description": "Fields of the body that nobody read", "schema": {"type": "string"}}}
_LATER = {"Retry-After": {"description": "Seconds", "required": True, "schema": {"type": "integer", "minimum": 1}}}


def generated(whole: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The successful answer of an endpoint that answers at once or as a stream."""
    events = {"schema": {"$ref": f"#/components/schemas/{chunk.__name__}"}}
    content = {"text/event-stream": events}
    return {200: {"model": whole, "description": "The replies", "content": content, "headers": _IGNORED}}


METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus's text", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "Not what is expected here"},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong"},
    404: {"model": ErrorBody, "description": "No such model or path"},
    405: {"model": ErrorBody, "description": "No such method"},
    408: {"model": ErrorBody, "description": "It took too long"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    429: {"model": ErrorBody, "description": "Too many requests wait", "headers": _LATER},
    500: {"model": ErrorBody, "description": "A fault of the server"},
    503: {"model": ErrorBody, "description": "The server takes no requests now"},
}


def streamed_schemas() -> dict[str, Any]:
    """Components of the document that no endpoint of FastAPI's brings along."""
    _, schemas = models_json_schema(
        [(model, "serialization") for model in STREAMED], ref_template="#/components/schemas/{model}"
    )
    return dict(schemas["$defs"])
