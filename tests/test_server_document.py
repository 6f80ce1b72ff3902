"""The server against its own OpenAPI document: schemathesis finds nothing, and streams are what it says."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edge.plan import EngineOptions
from edge.server.service import ServerSettings
from tests.document_hooks import MOST_TOKENS
from tests.served import Served, serving

ROOT = Path(__file__).parent.parent
MESSAGES = [{"role": "user", "content": "The quick brown fox"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"properties": {"far": {"type": "boolean"}}}}}


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[Served]:
    options = EngineOptions(context=2048, chunk=256, threads=2, sequences=4, logits_rows=64)
    with serving(tiny_bundle, options, settings=ServerSettings(api_key="key", max_tokens=MOST_TOKENS)) as served:
        yield served


def ask(served: Served, path: str, body: Any = None) -> bytes:
    """What an endpoint answers."""
    headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("GET" if body is None else "POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    answer = response.read()
    assert response.status == 200, answer
    return answer


def test_schemathesis_finds_nothing(served: Served, tmp_path: Path) -> None:
    """Whether what is well-formed is accepted depends on more than a schema says; that much of it is, is counted."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json", "--seed", "1"]
    command += ["--header", "Authorization: Bearer key", "--max-examples", "10"]
    command += ["--no-shrink", "--suppress-health-check", "too_slow"]
    command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--no-color"]
    variables = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.document_hooks", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tested: 9" in done.stdout, done.stdout
    page = ask(served, "/metrics").decode()
    replies = re.findall(r'^edge_requests_total\{finish_reason="(?:stop|length)"\} (.*)$', page, re.M)
    assert sum(map(float, replies)) > 50 and 'edge_requests_total{finish_reason="error"}' not in page
    served.wait_until_idle()


CHAT = {"messages": MESSAGES, "stream_options": {"include_usage": True}}
STREAMED: list[tuple[str, str, dict[str, Any]]] = [
    ("chat", "ChatChunk", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}),
    (
        "chat",
        "ChatChunk",
        {**CHAT, "tools": [TOOL], "response_format": {"type": "regex", "regex": "<think>a</think>b"}},
    ),
    ("text", "CompletionChunk", {"prompt": ["The fox", "A"], "echo": True, "logprobs": 3}),
    ("text", "CompletionChunk", {"prompt": "The fox", "stream_options": {"include_usage": True}}),
]


@pytest.mark.parametrize(("kind", "chunk", "body"), STREAMED)
def test_events_of_a_stream_are_as_documented(served: Served, kind: str, chunk: str, body: dict[str, Any]) -> None:
    document = json.loads(ask(served, "/openapi.json"))
    path = {"chat": "/v1/chat/completions", "text": "/v1/completions"}[kind]
    events = ask(served, path, {**body, "stream": True}).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and len(events) > 3
    described = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    assert described == {"$ref": f"#/components/schemas/{chunk}"}
    validator = jsonschema.Draft202012Validator({**described, "components": document["components"]})
    for event in events[:-2]:
        validator.validate(json.loads(event.removeprefix("data: ")))


def test_the_document_names_the_key(served: Served) -> None:
    document = json.loads(ask(served, "/openapi.json"))
    assert document["security"] == [{"key": []}] and document["paths"]["/health"]["get"]["security"] == []
    schemas = [
        media["schema"]
        for operations in document["paths"].values()
        for operation in operations.values()
        for response in operation["responses"].values()
        for media in response["content"].values()
    ]
    assert len(schemas) > 60 and all(schemas), "an answer that may be anything"
