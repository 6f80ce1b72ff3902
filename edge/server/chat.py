"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from edge.generation import TokenEvent
from edge.server.chat_prompt import Deltas, Prompt, prompt_of
from edge.server.errors import ApiError, Json, ignored_fields
from edge.server.protocol import ChatBody
from edge.server.replies import ChatChunk, ChatCompletion, generated
from edge.server.service import Replies, Service, check_output, choices, client_of, failure_of
from edge.server.sse import EventStream, event
from edge.server.tokens import chat_logprobs, usage
from edge.serving.request import Output, Request


def chat_router(service: Service) -> APIRouter:
    """The endpoint, for one service."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None, responses=generated(ChatCompletion, ChatChunk))
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        service.check_model(body.model)
        prompt = await run_in_threadpool(prompt_of, service.tokenizer, body)
        requests = await run_in_threadpool(_requests, service, body, prompt, http)
        replies = service.submit([requests])
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.model}
        if body.stream:
            return EventStream(_chunks(service, body, prompt, replies, head), ignored_fields(body))
        return Json(await _whole(service, prompt, replies, head, http), headers=ignored_fields(body))

    return router


def _requests(service: Service, body: ChatBody, prompt: Prompt, http: HttpRequest) -> list[Request]:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    room = service.engine.max_context - len(prompt.ids)
    max_tokens = body.max_completion_tokens or body.max_tokens or _default_tokens(service, room)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = service.params(body, max_tokens, logprobs=logprobs)
    constraint = service.constraint(body.response_format)
    if prompt.grammar is not None:
        if constraint is not None:
            raise ApiError(400, "tool_choice already says what the reply is; leave out response_format")
        constraint = service.guidance.lark(prompt.grammar)
    request = Request(
        tuple(prompt.ids),
        params,
        client=client_of(body, http),
        timeout=service.settings.timeout,
        text=service.text(params, after_prompt=False),
        constraint=constraint,
    )
    return choices(request, body.choices)


def _default_tokens(service: Service, room: int) -> int:
    """What the context holds; a prompt that fills it is refused with at least one token of a reply."""
    limit = service.settings.max_tokens
    return max(1, room if limit is None else min(room, limit))


def _make_id() -> str:
    return f"call_{secrets.token_hex(8)}"


def _reason(output: Output, has_calls: bool) -> str | None:
    return "tool_calls" if output.finish_reason == "stop" and has_calls else output.finish_reason


async def _whole(
    service: Service, prompt: Prompt, replies: Replies, head: dict[str, Any], http: HttpRequest
) -> dict[str, Any]:
    wholes = []
    for index, outputs in enumerate(await replies.all(http)):
        check_output(outputs[-1])
        events = [event for output in outputs for event in output.tokens]
        message = prompt.message("".join(output.text for output in outputs), _make_id)
        wholes.append(
            {
                "index": index,
                "message": message,
                "logprobs": _logprobs(service, events),
                "finish_reason": _reason(outputs[-1], "tool_calls" in message),
            }
        )
    counts = usage(replies.tickets, len(replies.tickets))
    return {**head, "object": "chat.completion", "choices": wholes, "usage": counts}


async def _chunks(
    service: Service, body: ChatBody, prompt: Prompt, replies: Replies, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    """Server-sent events: for each choice its role, then deltas, then a reason; usage if it was asked for."""
    head = {**head, "object": "chat.completion.chunk"}
    if body.wants_usage:
        head["usage"] = None
    deltas = [Deltas(prompt.parser(), _make_id) for _ in replies.tickets]
    waiting: list[list[TokenEvent]] = [[] for _ in replies.tickets]  # whose text is not certain yet
    for index in range(len(deltas)):
        yield event({**head, "choices": [_choice(index, {"role": "assistant", "content": ""})]})
    async for index, output in replies.outputs():
        waiting[index].extend(output.tokens)
        if (failure := failure_of(output)) is not None:
            yield event(failure.body())
            return
        written = deltas[index].push(output.text, is_last=output.finish_reason is not None)
        for i, delta in enumerate(written):
            events = waiting[index] if i == len(written) - 1 else []
            yield event({**head, "choices": [_choice(index, delta, None, _logprobs(service, events))]})
        if written:
            waiting[index] = []
        if output.finish_reason is not None:
            rest = _logprobs(service, waiting[index])
            yield event({**head, "choices": [_choice(index, {}, _reason(output, deltas[index].calls > 0), rest)]})
    if body.wants_usage:
        yield event({**head, "choices": [], "usage": usage(replies.tickets, len(replies.tickets))})
    yield event("[DONE]")


def _logprobs(service: Service, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
    return chat_logprobs(service.tokenizer, events) if events else None


def _choice(
    index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
