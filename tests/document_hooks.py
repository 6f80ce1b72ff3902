"""Hooks of schemathesis: generated requests stay short."""

from __future__ import annotations

from typing import Any

import schemathesis

MOST_TOKENS = 8


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Ask for a few tokens of the model that is there; what is malformed stays so."""
    if not isinstance(body, dict):
        return body
    changed = dict(body)
    if isinstance(body.get("model"), str):
        changed["model"] = None
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if isinstance(value, int) and MOST_TOKENS < value < 2**31:
            changed[name] = MOST_TOKENS
    return changed
