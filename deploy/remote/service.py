"""The systemd unit that serves the active release, made from deploy/edge-serve.service."""

from __future__ import annotations

import re
from pathlib import Path

TEMPLATE = Path(__file__).parent.parent / "edge-serve.service"
SCOPES = ("auto", "user", "system")


def render_unit(scope: str, folder: str, user: str, memory_max: str) -> str:
    """The unit's text. scope: 'system', or 'user', without what only the system's manager can do."""
    text = TEMPLATE.read_text(encoding="utf-8")
    if scope == "user":
        text = re.sub(r"^#system.*?^#end\n", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    values = {
        "DIR": folder,
        "USER": user,
        "MEMORY_MAX": memory_max,
        "TARGET": "default.target" if scope == "user" else "multi-user.target",
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text
