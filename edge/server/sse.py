"""Server-sent events, as OpenAI streams them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse

from edge.server.errors import dumps


def event(value: dict[str, Any] | str) -> bytes:
    """One event of JSON, or of a word."""
    text = value if isinstance(value, str) else dumps(value)
    return f"data: {text}\n\n".encode("utf-8", "replace")


class EventStream(StreamingResponse):
    """Events as they come. Who hangs up ends the iterator; a slow reader holds it up, and nobody else."""

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, media_type="text/event-stream", headers=headers)
