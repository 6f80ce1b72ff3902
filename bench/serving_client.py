"""Clients of a server under measurement: as little of their own work as there can be, on the same machine."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil


@dataclass
class Streamed:
    """A reply as its client saw it. times: seconds since the request, of each event with tokens."""

    text: str = ""
    tokens: int = 0
    cached: int = 0
    times: list[float] = field(default_factory=list)
    status: int = 0
    finish_reason: str | None = None
    seconds: float = 0.0


@contextmanager
def server(bundle: Path, *options: object) -> Iterator[tuple[int, psutil.Process]]:
    """`edge serve` in a process of its own -> its port, and the process."""
    command = [sys.executable, "-m", "edge", "serve", bundle, "--port", 0, *options]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        if '"serving"' not in line:
            raise SystemExit(line + process.stderr.read())
        drain_log(process)
        yield int(json.loads(line)["address"].rpartition(":")[2].partition("/")[0]), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def drain_log(process: subprocess.Popen[str]) -> None:
    """Read what the server logs, or it would wait for us."""
    assert process.stderr is not None
    threading.Thread(target=process.stderr.read, daemon=True).start()


async def complete(
    port: int, body: dict[str, Any], *, hang_up_after: int | None = None, read_pause: float = 0.0
) -> Streamed:
    """POST /v1/completions, streamed, with its usage. hang_up_after: events; read_pause: seconds between two."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
    started, found = time.perf_counter(), Streamed()
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        found.status = int((await reader.readline()).split()[1])
        events = await _read(reader, started, hang_up_after, read_pause)
        found.seconds = time.perf_counter() - started
    finally:
        writer.close()
    for now, line in events:
        _take(found, json.loads(line[6:]), now)
    return found


async def _read(
    reader: asyncio.StreamReader, started: float, hang_up_after: int | None, read_pause: float
) -> list[tuple[float, bytes]]:
    """Events and when they came; they are looked into at the end, as the server has these cores, too."""
    events = []
    async for line in reader:
        if line.startswith(b"data: {"):
            events.append((time.perf_counter() - started, line))
            if len(events) == hang_up_after:
                break
            if read_pause:
                await asyncio.sleep(read_pause)
    return events


def _take(found: Streamed, chunk: dict[str, Any], now: float) -> None:
    if "error" in chunk:
        found.finish_reason = chunk["error"]["message"]
        return
    for choice in chunk["choices"]:
        found.text += choice["text"]
        found.times.append(now)
        found.finish_reason = choice["finish_reason"] or found.finish_reason
    if usage := chunk.get("usage"):
        found.tokens = usage["completion_tokens"]
        found.cached = usage["prompt_tokens_details"]["cached_tokens"]
