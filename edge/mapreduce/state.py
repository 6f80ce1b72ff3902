"""Replies kept in a file as they come, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from edge.errors import EdgeError, UsageError
from edge.whole_file import whole_file

_FORMAT = 1


def key_of(values: Any) -> str:
    """A hash of everything that replies depend on; JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Replies:
    """Replies by their prompts, in memory and in a file that is whole at any time.

    EdgeError if the file is damaged, UsageError if it was kept under another key.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.resumed = 0  # how often a reply of an earlier run was used
        self._key = key
        self._replies = _read(path, key) if path.exists() else {}
        self._earlier = frozenset(self._replies)

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, prompt: str) -> str | None:
        """The kept reply to a prompt."""
        name = _name(prompt)
        self.resumed += name in self._earlier
        return self._replies.get(name)

    def keep(self, prompt: str, reply: str) -> None:
        """Add a reply; the file is replaced as a whole, or not at all."""
        self._replies[_name(prompt)] = reply
        body = {"format": _FORMAT, "key": self._key, "replies": self._replies}
        with whole_file(self.path) as file:
            file.write(json.dumps({**body, "checksum": key_of(body)}, ensure_ascii=False).encode())

    def remove(self) -> None:
        """Delete the file, when there is nothing left to go on with."""
        self.path.unlink(missing_ok=True)


def _name(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def _read(path: Path, key: str) -> dict[str, str]:
    try:
        values = json.loads(path.read_bytes())
        checksum = values.pop("checksum")
        replies = values["replies"]
        whole = checksum == key_of(values) and values["format"] == _FORMAT
        whole = whole and all(isinstance(reply, str) for reply in replies.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise EdgeError(f"{path} is damaged; delete it to begin anew, or give another --state")
    if values["key"] != key:
        raise UsageError(
            f"{path} was kept for another question, bundle, document or option; give the same ones, or another --state"
        )
    return dict(replies)
