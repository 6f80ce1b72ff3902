"""Clients that flood, stall or send what is no HTTP: they get a refusal or nothing, and everybody else is answered."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge.plan import EngineOptions
from edge.server.service import ServerSettings
from tests.served import Served, serving

BODY = json.dumps({"prompt": "The fox", "max_tokens": 2, "ignore_eos": True}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[Served]:
    options = EngineOptions(context=512, chunk=256, threads=2, sequences=4)
    with serving(tiny_bundle, options, settings=ServerSettings(body=1 << 20)) as served:
        yield served


def connect(served: Served, sent: bytes) -> socket.socket:
    """A connection over which something was sent."""
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    connection.sendall(sent)
    return connection


def answer(served: Served, sent: bytes) -> bytes:
    """All that comes back until the server closes; it may do so while it is still being sent to."""
    received = b""
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    try:
        connection.sendall(sent)
        while piece := connection.recv(1 << 16):
            received += piece
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        connection.close()
    return received


def post(body: bytes, head: bytes = POST) -> bytes:
    """A whole request."""
    return head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def check_alive(served: Served) -> None:
    """Somebody else is answered, and at the end nothing is held."""
    assert answer(served, post(BODY)).startswith(b"HTTP/1.1 200")
    served.wait_until_idle()


NO_HTTP = [
    b"\xff\xfe\x00\x01" * 50 + b"\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /%ff%fe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /v1/models/\x00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    POST + b"Content-Length: -5\r\n\r\n",
    POST + b"Content-Length: 99999999999999999999999\r\n\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 1000) for i in range(5000)),
    b"GET /" + b"a" * (1 << 20),
]


@pytest.mark.parametrize("sent", NO_HTTP, ids=range(len(NO_HTTP)))
def test_what_is_no_http_is_refused(served: Served, sent: bytes) -> None:
    status = answer(served, sent).split(b"\r\n")[0].split(b" ")
    assert len(status) < 2 or status[1] in (b"400", b"404", b"413", b"431"), status
    check_alive(served)


BODIES = [
    (b'{"prompt": "\xff\xfe"}', b"JSON"),
    (b'{"prompt": ' + b"[" * 200_000, b"JSON"),
    (b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"recursion"),
    (b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", b"JSON"),
    (b'{"prompt": "a", "temperature": 1e999}', b"temperature"),
    (b'{"prompt": "a", "stop": ' + json.dumps(["x"] * 17).encode() + b"}", b"stop"),
    (b'{"prompt": ' + json.dumps([1] * 100_000).encode() + b"}", b"context is limited"),
    (b'{"prompt": "' + b"fox " * 200_000 + b'"}', b"context is limited"),
]


@pytest.mark.parametrize(("body", "words"), BODIES, ids=range(len(BODIES)))
def test_bodies_made_to_hurt_are_refused(served: Served, body: bytes, words: bytes) -> None:
    found = answer(served, post(body))
    assert found.startswith(b"HTTP/1.1 400") and words in found, found[:500]
    check_alive(served)


@pytest.mark.parametrize("depth", [300, 900, 970])
def test_values_of_any_depth_are_no_fault_of_the_server(served: Served, depth: int) -> None:
    """JSON's reader takes about as many levels as Python; what is done with them may take more."""
    deep = '{"a": ' * depth + "1" + "}" * depth
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": "DEEP"}}}}]
    call = {"function": {"name": "f", "arguments": "DEEP"}}
    asked = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    for values in (
        {**asked, "tools": tools},
        {**asked, "tools": tools, "tool_choice": "required"},
        {**asked, "response_format": {"type": "json_schema", "json_schema": {"schema": "DEEP"}}},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "max_tokens": 1},
    ):
        body = json.dumps(values).replace('"DEEP"', deep)
        found = answer(served, post(body.encode(), POST.replace(b"completions", b"chat/completions")))
        assert found.split(b" ")[1] in (b"200", b"400"), found[:500]
    check_alive(served)


def test_a_body_must_say_that_it_is_json(served: Served) -> None:
    """A page of another origin may send anything else without asking first."""
    for kind in (b"text/plain", b"application/x-www-form-urlencoded"):
        found = answer(served, post(BODY, POST.replace(b"application/json", kind)))
        assert found.startswith(b"HTTP/1.1 400") and b"Content-Type: application/json" in found


def test_who_sends_nothing_or_half_holds_up_nobody(served: Served) -> None:
    with ExitStack() as stack:
        for i in range(200):
            sent = (b"", b"POST /v1/compl", post(BODY)[:-10], POST + b"X-Slow: ")[i % 4]
            stack.enter_context(connect(served, sent))
        started = time.monotonic()
        for _ in range(3):
            assert answer(served, post(BODY)).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - started < 10 and not served.service.worker.running
    check_alive(served)
