"""OpenAI's own client against the server: it gets what the engine gives, and refusals are as it expects them."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from edge.engine import Engine, open_engine
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.server.service import ServerSettings
from edge.serving.batcher import BatchLimits
from edge.text import Tokenizer
from tests.served import Served, serving

MESSAGES: Any = [{"role": "user", "content": "The quick brown fox"}]
NO_END: Any = {"ignore_eos": True}


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[Served]:
    with serving(tiny_bundle) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def single(tiny_bundle: Path) -> Engine:
    return open_engine(tiny_bundle, EngineOptions(context=4096, chunk=64, threads=2, prefix_cache=False))


def expected(engine: Engine, tokenizer: Tokenizer, messages: Any, tokens: int) -> str:
    ids = tokenizer.encode_chat(messages)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return tokenizer.decode([event.token_id for event in engine.generate(ids, params)])


def test_a_chat_is_what_the_engine_says(served: Served, client: openai.OpenAI, single: Engine) -> None:
    messages: Any = [{"role": "system", "content": "You watch. " * 12}, *MESSAGES]
    wanted = expected(single, served.service.tokenizer, messages, 30)
    model = client.models.list().data[0].id
    asked: Any = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 30, "extra_body": NO_END}
    first = client.chat.completions.create(**asked)
    assert first.choices[0].message.content == wanted and first.choices[0].finish_reason == "length"
    assert first.usage is not None and first.usage.completion_tokens == 30
    assert first.usage.prompt_tokens == len(served.service.tokenizer.encode_chat(messages))
    again = client.chat.completions.create(**asked)
    assert again.choices[0].message.content == wanted
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == (first.usage.prompt_tokens - 2) // 64 * 64 > 0
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 30 and len(chunks) > 5


def test_many_at_once_do_not_mix(served: Served, single: Engine) -> None:
    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        messages: Any = [{"role": "user", "content": f"{i} foxes jump " * (1 + 3 * i)}]
        more: Any = {"model": served.service.model, "temperature": 0, "max_tokens": 10 + 3 * i, "extra_body": NO_END}
        if i % 2:
            stream = await client.chat.completions.create(messages=messages, stream=True, **more)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        reply = await client.chat.completions.create(messages=messages, **more)
        return reply.choices[0].message.content

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(9)))

    for i, found in enumerate(asyncio.run(ask_all())):
        messages = [{"role": "user", "content": f"{i} foxes jump " * (1 + 3 * i)}]
        assert found == expected(single, served.service.tokenizer, messages, 10 + 3 * i)
    served.wait_until_idle()


SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["fox", "dog"]}},
    "required": ["count", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_json_keeps_to_its_schema(client: openai.OpenAI, served: Served, temperature: float) -> None:
    format_: Any = {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA}}
    reply = client.chat.completions.create(
        model=served.service.model,
        messages=MESSAGES,
        temperature=temperature,
        seed=3,
        n=3,
        max_tokens=200,
        response_format=format_,
    )
    assert len(reply.choices) == 3
    for choice in reply.choices:
        value = json.loads(choice.message.content or "")
        assert set(value) == {"count", "kind"} and 0 <= value["count"] <= 99 and value["kind"] in ("fox", "dog")
        assert choice.finish_reason == "stop"


def test_choices_seeds_and_stops(client: openai.OpenAI, served: Served) -> None:
    more: Any = {"model": served.service.model, "prompt": "The quick", "max_tokens": 24, "extra_body": NO_END}
    many = client.completions.create(**more, n=3, seed=5, temperature=1.0)
    texts = [choice.text for choice in many.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in many.choices] == [0, 1, 2]
    assert client.completions.create(**more, seed=6, temperature=1.0).choices[0].text == texts[1]
    whole = client.completions.create(**more, temperature=0).choices[0].text
    stop = whole[7:10]
    cut = client.completions.create(**more, temperature=0, stop=["nowhere to be found", stop])
    assert cut.choices[0].text == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"
    streamed = list(client.completions.create(**more, temperature=0, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.choices[0].text


def test_bias_penalties_and_logprobs(client: openai.OpenAI, served: Served, single: Engine) -> None:
    tokenizer = served.service.tokenizer
    more: Any = {"model": served.service.model, "temperature": 0, "max_tokens": 12, "extra_body": NO_END}
    forced = tokenizer.model.token_to_id("x")
    biased = client.completions.create(prompt="a", logit_bias={str(forced): 100}, **more)
    assert biased.choices[0].text == "x" * 12
    free = client.completions.create(prompt="a", logit_bias={str(forced): 15}, frequency_penalty=2, logprobs=2, **more)
    said = free.choices[0].logprobs.tokens  # type: ignore[union-attr]
    assert said is not None and 1 < said.count("x") < 12
    listed = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=4, **more)
    ids = tokenizer.encode_chat(MESSAGES)
    content = listed.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and len(content) == 12
    for entry in content:
        logits = single.logits(ids, 1)[0].astype(np.float64)
        logits -= logits.max() + math.log(np.exp(logits - logits.max()).sum())
        best = int(logits.argmax())
        assert abs(entry.logprob - logits[best]) < 1e-3 and len(entry.top_logprobs) == 4
        assert entry.top_logprobs[0].logprob == entry.logprob
        ids = [*ids, best]


def test_an_echoed_prompt_has_logprobs(client: openai.OpenAI, served: Served, single: Engine) -> None:
    """As evaluation harnesses ask for them: tokens in, and the last of the list is the one generated."""
    tokenizer = served.service.tokenizer
    prompts = [tokenizer.encode("The northern wind and then the rain", add_bos=True), [5, 60, 70, 80]]
    reply = client.completions.create(
        model=served.service.model, prompt=prompts, echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1
    )
    for ids, choice in zip(prompts, reply.choices, strict=True):
        logits = single.logits(ids, len(ids)).astype(np.float64)
        table = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        found = choice.logprobs
        assert found is not None and found.token_logprobs is not None and found.token_logprobs[0] is None
        wanted = [table[i, ids[i + 1]] for i in range(len(ids) - 1)]
        assert np.allclose(found.token_logprobs[1:-1], wanted, atol=1e-3)
        assert choice.text.startswith(tokenizer.decode(ids)) and len(found.tokens or ()) == len(ids) + 1
    only = client.completions.create(model=served.service.model, prompt="The fox", echo=True, max_tokens=0, logprobs=0)
    assert only.choices[0].text == "The fox" and only.usage is not None and only.usage.completion_tokens == 0


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks.",
            "parameters": {
                "type": "object",
                "properties": {"river": {"enum": ["Elbe", "Oder"]}, "days": {"type": "integer", "maximum": 9}},
                "required": ["river"],
            },
        },
    }
    for name in ("water_level", "rain")
]


def test_tools_are_called_when_they_must_be(client: openai.OpenAI, served: Served) -> None:
    """A random model calls nothing by itself; told to, it fills in what the tool's schema allows.

    It would think for long before: its bias against h keeps it from <think>.
    """
    vocabulary = served.service.tokenizer.model.get_vocab()
    bias = {str(token): -100 for text, token in vocabulary.items() if "h" in text}
    more: Any = {"model": served.service.model, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 150, "seed": 1}
    more["logit_bias"] = bias
    named: Any = {"type": "function", "function": {"name": "rain"}}
    for choice, names in (("required", {"water_level", "rain"}), (named, {"rain"})):
        whole = client.chat.completions.create(**more, tool_choice=choice, parallel_tool_calls=False).choices[0]
        assert whole.finish_reason == "tool_calls" and whole.message.tool_calls is not None
        (call,) = whole.message.tool_calls
        assert call.function.name in names and json.loads(call.function.arguments)["river"] in ("Elbe", "Oder")
        chunks = list(
            client.chat.completions.create(**more, tool_choice=choice, parallel_tool_calls=False, stream=True)
        )
        streamed = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
        assert [c.function for c in streamed] and chunks[-1].choices[0].finish_reason == "tool_calls"
        assert (streamed[0].function.name, streamed[0].function.arguments) == (  # type: ignore[union-attr]
            call.function.name,
            call.function.arguments,
        )
        again: Any = [*MESSAGES, whole.message, {"role": "tool", "tool_call_id": call.id, "content": "3 m"}]
        answer = client.chat.completions.create(**{**more, "messages": again, "max_tokens": 8}, tool_choice="none")
        assert answer.choices[0].message.tool_calls is None
    with pytest.raises(openai.BadRequestError, match="tide"):
        client.chat.completions.create(**more, tool_choice={"type": "function", "function": {"name": "tide"}})


def raw(served: Served, path: str, body: bytes, method: str = "POST", **headers: str) -> tuple[int, dict, dict]:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    data = response.read()
    return response.status, json.loads(data) if data else {}, dict(response.getheaders())


CHAT = "/v1/chat/completions"
BAD: list[tuple[str, bytes, int, str]] = [
    (CHAT, b"{", 400, "not JSON"),
    (CHAT, b"", 400, ""),
    (CHAT, b"[1]", 400, ""),
    (CHAT, b'{"messages": "\xff\xfe"}', 400, ""),
    (CHAT, b'{"messages": "hello"}', 400, "messages"),
    (CHAT, b'{"messages": []}', 400, "at least 1 item"),
    (CHAT, b'{"messages": [{"role": "user", "content": 5}]}', 400, "content"),
    (CHAT, b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400, "one string of text"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400, "temperature"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": "hot"}', 400, "temperature"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "n": 1000000}', 400, "n"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"99999": 1}}', 400, "vocabulary"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 9999}', 400, "context is limited"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "stop": ""}', 400, "stop"),
    (CHAT, b'{"model": "gpt-7", "messages": [{"role": "user", "content": "a"}]}', 404, "gpt-7"),
    ("/v1/completions", b'{"prompt": [1, 2, 99999]}', 400, "99999"),
    ("/v1/completions", b'{"prompt": []}', 400, "at least 1 item"),
    ("/v1/completions", b'{"prompt": "a", "suffix": "b"}', 400, "suffix"),
    ("/v1/nothing", b"{}", 404, "Not Found"),
    ("/tokenize", b"{}", 400, "prompt or messages"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), BAD)
def test_what_is_wrong_is_told(served: Served, path: str, body: bytes, status: int, words: str) -> None:
    found, answer, _ = raw(served, path, body)
    assert found == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"} and words in answer["error"]["message"]
    served.wait_until_idle()


def test_a_schema_that_is_none_is_refused(served: Served) -> None:
    for schema in ({"type": "bogus"}, {"type": "object", "properties": 3}, {"$ref": "#/nowhere"}):
        body = {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        status, answer, _ = raw(served, CHAT, json.dumps(body).encode())
        assert status == 400 and "JSON schema is not usable" in answer["error"]["message"]


def test_unknown_fields_are_ignored_and_named(served: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "store": True, "wöw\n": 1}
    status, _, headers = raw(served, CHAT, json.dumps(body).encode())
    assert status == 200 and headers["x-ignored-fields"] == "store, w?w?"


def test_tokenize_health_and_metrics(served: Served, client: openai.OpenAI) -> None:
    status, answer, _ = raw(served, "/tokenize", b'{"prompt": "The fox"}')
    assert status == 200 and answer["tokens"] == served.service.tokenizer.encode("The fox", add_bos=True)
    assert raw(served, "/health", b"", "GET")[0] == 200 and raw(served, "/ready", b"", "GET")[1]["running"] == 0
    assert client.models.retrieve(served.service.model).id == served.service.model
    import urllib.request

    page = urllib.request.urlopen(f"{served.url}/metrics").read().decode()
    for name in ("edge_requests_total", "edge_time_to_first_token_seconds_count", "edge_cached_prompt_tokens_total"):
        assert name in page
    assert 'edge_kv_pages{state="held"} 0.0' in page


def test_keys_and_sizes(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, settings=ServerSettings(api_key="sésame", body=2000, max_tokens=9)) as served:
        body = json.dumps({"messages": MESSAGES, "max_tokens": 2}).encode()
        assert raw(served, CHAT, body)[0] == 401
        assert raw(served, CHAT, body, Authorization="Bearer wrong")[0] == 401
        key = "Bearer sésame".encode().decode("latin-1")
        assert raw(served, CHAT, body, Authorization=key)[0] == 200
        assert raw(served, "/health", b"", "GET")[0] == 200 and raw(served, "/metrics", b"", "GET")[0] == 401
        assert raw(served, CHAT, b" " * 2001, Authorization=key)[0] == 413
        status, answer, _ = raw(served, CHAT, b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 10}',
                                Authorization=key)  # fmt: skip
        assert status == 400 and "this server allows 9" in answer["error"]["message"]
        chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n"
        chunked += b"Content-Type: application/json\r\nAuthorization: Bearer s\xc3\xa9same\r\n\r\n"
        chunked += b"fa0\r\n" + b" " * 4000 + b"\r\n0\r\n\r\n"
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(chunked)
            assert b"413" in connection.recv(65536).split(b"\r\n")[0]


def slow_reply(served: Served, tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": served.service.model, "prompt": "The", "max_tokens": tokens, "ignore_eos": True, **more}


def test_who_hangs_up_gives_everything_back(served: Served, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=served.service.model, prompt="The", max_tokens=500, stream=True, extra_body=NO_END
    )
    next(iter(stream))
    stream.close()
    served.wait_until_idle()
    body = json.dumps(slow_reply(served, 500)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection = socket.create_connection(("127.0.0.1", served.port))
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    while not served.service.worker.running:
        pass
    connection.close()
    served.wait_until_idle(seconds=1.0)


def test_who_does_not_read_holds_up_nobody(tiny_bundle: Path) -> None:
    """Its replies pause, and it takes no more than their unread tokens and the buffers; then it goes on."""
    limits = BatchLimits(sequences=2, unread=32)
    with serving(tiny_bundle, limits=limits, send_buffer=8192) as served:
        body = json.dumps(slow_reply(served, 1500, n=2, stream=True, logprobs=5, temperature=1)).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        worker = served.service.worker
        slow = worker._batcher.running
        end = time.monotonic() + 20
        while not (len(slow) == 2 and all(ticket.outbox.full for ticket in slow)):
            assert time.monotonic() < end
            time.sleep(0.01)
        tickets = list(slow)
        status, answer, _ = raw(served, "/v1/completions", json.dumps(slow_reply(served, 100)).encode())
        assert status == 200 and answer["usage"]["completion_tokens"] == 100
        assert all(ticket.finish_reason is None and ticket.statistics.tokens < 1000 for ticket in tickets)
        received = b""
        while piece := connection.recv(1 << 20):
            received += piece
        assert received.count(b'"finish_reason":"length"') == 2 and b"data: [DONE]" in received
        assert [ticket.statistics.tokens for ticket in tickets] == [1500, 1500]
        served.wait_until_idle()


def test_too_many_are_told_when_to_come_again(tiny_bundle: Path) -> None:
    options = EngineOptions(context=512, chunk=64, threads=2, sequences=1)
    with serving(tiny_bundle, options, BatchLimits(sequences=1, queue=2)) as served:
        found: list[tuple[int, dict[str, str]]] = []

        def ask() -> None:
            status, _, headers = raw(served, "/v1/completions", json.dumps(slow_reply(served, 120)).encode())
            found.append((status, headers))

        threads = [threading.Thread(target=ask) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [status for status, _ in found]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 3
        assert all(int(headers["retry-after"]) >= 1 for status, headers in found if status == 429)
        served.wait_until_idle()


def test_a_request_that_takes_too_long_is_ended(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, settings=ServerSettings(timeout=0.15)) as served:
        status, answer, _ = raw(served, "/v1/completions", json.dumps(slow_reply(served, 500)).encode())
        assert status == 408 and answer["error"]["code"] == "timeout"
        served.wait_until_idle()
