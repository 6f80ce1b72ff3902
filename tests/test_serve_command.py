"""`edge serve` as a user starts and stops it."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command import EDGE, edge


@contextmanager
def started(bundle: Path, *options: object, context: int = 512) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process, and the port that its log names."""
    values = map(str, ("--context", context, *options))
    command = [*EDGE, "serve", str(bundle), "--port", "0", "--threads", "2", *values]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = json.loads(process.stderr.readline())
        assert line["event"] == "serving" and line["context"] == context, line
        yield process, int(line["address"].rpartition(":")[2].partition("/")[0])
    finally:
        process.kill()
        process.wait()


def body(tokens: int, **more: Any) -> bytes:
    return json.dumps({"prompt": "The fox", "max_tokens": tokens, "ignore_eos": True, **more}).encode()


def test_sigterm_lets_a_reply_end_and_takes_no_more(tiny_bundle: Path) -> None:
    with started(tiny_bundle) as (process, port):
        streaming = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"Content-Type": "application/json"}
        streaming.request("POST", "/v1/completions", body(400, stream=True), headers)
        response = streaming.getresponse()
        assert response.readline().startswith(b"data: ")
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises((ConnectionError, urllib.error.URLError)):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10)
        rest = response.read().decode().strip().splitlines()
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in "".join(rest)
        assert process.wait(20) == 0
        assert process.stderr is not None
        events = [json.loads(line) for line in process.stderr.read().splitlines()]
        requests = [event for event in events if event["event"] == "request"]
        assert len(requests) == 1 and requests[0]["status"] == 200 and "fox" not in json.dumps(events)
        assert events[-1]["event"] == "stopped"


def test_a_drain_has_an_end(tiny_bundle: Path) -> None:
    with started(tiny_bundle, "--drain", 1, "--log-prompts") as (process, port):
        streaming = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"Content-Type": "application/json"}
        streaming.request("POST", "/v1/completions", body(400, stream=True, n=8), headers)
        streaming.getresponse().readline()
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert process.wait(20) is not None and time.monotonic() - begun < 10
        assert process.stderr is not None and "The fox" in process.stderr.read()


def test_wrong_use_is_told_in_a_sentence(tiny_bundle: Path) -> None:
    with started(tiny_bundle) as (_, port):
        taken = edge("serve", tiny_bundle, "--port", port, "--context", 128)
        assert taken.returncode == 2 and b"cannot be listened on" in taken.stderr and b"Traceback" not in taken.stderr
    helped = edge("serve", "--help")
    assert helped.returncode == 0 and b"edge serve bundle --host 0.0.0.0" in helped.stdout
