"""POST /v1/completions: text or tokens go on, with the log-probabilities that evaluation harnesses read."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from edge.server.errors import ApiError, Json, ignored_fields
from edge.server.protocol import CompletionBody
from edge.server.replies import Completion, CompletionChunk, generated
from edge.server.service import Replies, Service, check_output, choices, client_of, failure_of
from edge.server.sse import EventStream, event
from edge.server.tokens import CompletionLogprobs, joined, usage
from edge.serving.request import Output, Request

_DEFAULT_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class _Prompt:
    ids: tuple[int, ...]
    text: str


def completions_router(service: Service) -> APIRouter:
    """The endpoint, for one service."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None, responses=generated(Completion, CompletionChunk))
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        service.check_model(body.model)
        _check(body)
        prompts = await run_in_threadpool(_prompts, service, body)
        groups = await run_in_threadpool(_requests, service, body, prompts, http)
        replies = service.submit(groups)
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
        head["model"] = service.model
        writers = [_Writer(service, body, prompt) for prompt in prompts for _ in range(body.choices)]
        if body.stream:
            return EventStream(_chunks(body, replies, writers, head), ignored_fields(body))
        wholes = []
        for index, outputs in enumerate(await replies.all(http)):
            check_output(outputs[-1])
            wholes.append(_whole(index, [writers[index].part(output) for output in outputs]))
        return Json({**head, "choices": wholes, "usage": _usage(body, replies)}, headers=ignored_fields(body))

    return router


def _check(body: CompletionBody) -> None:
    if body.suffix:
        raise ApiError(400, "suffix is not supported: the model continues text at its end only", param="suffix")
    if body.best_of is not None and body.best_of != body.choices:
        raise ApiError(400, "best_of is not supported; ask for n replies and choose", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(
            400, "max_tokens is 0, which leaves nothing to answer; raise it, or set echo", param="max_tokens"
        )


def _prompts(service: Service, body: CompletionBody) -> list[_Prompt]:
    given: Any = body.prompt
    is_one = isinstance(given, str) or all(isinstance(item, int) for item in given)
    return [_prompt(service, one, echo=bool(body.echo)) for one in ([given] if is_one else given)]


def _prompt(service: Service, given: str | list[int], *, echo: bool) -> _Prompt:
    tokenizer = service.tokenizer
    if isinstance(given, str):
        return _Prompt(tuple(tokenizer.encode_prompt(given)), given)
    service.engine.check_prompt(given, 0)
    return _Prompt(tuple(given), tokenizer.decode(given) if echo else "")


def _requests(
    service: Service, body: CompletionBody, prompts: Sequence[_Prompt], http: HttpRequest
) -> list[list[Request]]:
    default = min(_DEFAULT_TOKENS, service.settings.max_tokens or _DEFAULT_TOKENS)
    max_tokens = default if body.max_tokens is None else max(1, body.max_tokens)
    lists_prompt = bool(body.echo) and body.logprobs is not None
    params = service.params(body, max_tokens, logprobs=body.logprobs, prompt_logprobs=lists_prompt)
    first = Request(
        prompts[0].ids,
        params,
        client=client_of(body, http),
        timeout=service.settings.timeout,
        text=service.text(params, after_prompt=True),
        constraint=service.constraint(body.response_format),
    )
    return [choices(replace(first, prompt_ids=prompt.ids), body.choices) for prompt in prompts]


class _Writer:
    """What is told of one choice, output by output."""

    def __init__(self, service: Service, body: CompletionBody, prompt: _Prompt) -> None:
        self._body, self._prompt = body, prompt
        self._logprobs = CompletionLogprobs(service.tokenizer)
        self._is_first = True

    def part(self, output: Output) -> dict[str, Any]:
        """Text, and log-probabilities if they are wanted; the first part has an echoed prompt."""
        text, lists = "", list[dict[str, Any]]()
        if self._is_first and self._body.echo:
            text = self._prompt.text
            if self._body.logprobs is not None:
                lists.append(self._logprobs.prompt(self._prompt.ids, output.prompt_logprobs))
        self._is_first = False
        if self._body.max_tokens != 0:
            text += output.text
            if self._body.logprobs is not None:
                lists.append(self._logprobs.reply(output.tokens))
        logprobs = joined(lists) if self._body.logprobs is not None else None
        return {"text": text, "logprobs": logprobs, "finish_reason": output.finish_reason}


def _whole(index: int, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    logprobs = None if parts[0]["logprobs"] is None else joined([part["logprobs"] for part in parts])
    text = "".join(part["text"] for part in parts)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": parts[-1]["finish_reason"]}


def _usage(body: CompletionBody, replies: Replies) -> dict[str, Any]:
    counts = usage(replies.tickets, body.choices)
    if body.max_tokens == 0:  # the one token that was computed nevertheless
        counts["completion_tokens"], counts["total_tokens"] = 0, counts["prompt_tokens"]
    return counts


async def _chunks(
    body: CompletionBody, replies: Replies, writers: Sequence[_Writer], head: dict[str, Any]
) -> AsyncIterator[bytes]:
    if body.wants_usage:
        head = {**head, "usage": None}
    async for index, output in replies.outputs():
        if (failure := failure_of(output)) is not None:
            yield event(failure.body())
            return
        part = writers[index].part(output)
        if part["text"] or part["finish_reason"] or part["logprobs"]:
            yield event({**head, "choices": [{"index": index, **part}]})
    if body.wants_usage:
        yield event({**head, "choices": [], "usage": _usage(body, replies)})
    yield event("[DONE]")
