"""The page of error messages quotes what the code says: every message is looked for in the sources."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
_ANY = "\0"  # what a source fills in
_FAILURE = re.compile(r'\bfail "(.*?)"(?:$|\s)', re.MULTILINE)  # of a board's script


def quoted() -> list[str]:
    """The messages of the page: what its tables' rows begin with."""
    return [match[1] for match in re.finditer(r"^\| `(.+?)`(?: \(\d+\))? \|", PAGE.read_text(), re.MULTILINE)]


@cache
def said() -> tuple[str, ...]:
    """Every text of the sources, what is filled in as \\0."""
    texts = []
    for script in sorted((ROOT / "deploy" / "board").glob("*.sh")):
        texts += [re.sub(r"\$\(.*?\)|\$\{.*?\}|\$\w+", _ANY, text) for text in _FAILURE.findall(script.read_text())]
    for package in ("build_engine", "edge", "plugins", "deploy"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else _ANY for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return tuple(texts)


def is_said(message: str, texts: tuple[str, ...]) -> bool:
    """Whether one text has the message's words in order; … stands for whatever lies between."""
    wanted = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
    return any(wanted.search(text) for text in texts)


@pytest.mark.parametrize("message", quoted())
def test_a_message_of_the_page_is_in_the_sources(message: str) -> None:
    assert is_said(message, said())


def test_a_message_that_nobody_says_is_found_out() -> None:
    texts = (f"{_ANY} already exists; choose another --out or add --overwrite",)
    assert is_said("… already exists; choose another --out or add …", texts)
    assert not is_said("… already exists; choose another --out or add --force", texts)
    assert not is_said("… add --overwrite … already exists", texts)


def test_the_page_has_messages_and_each_says_enough_to_be_found() -> None:
    messages = quoted()
    assert len(messages) > 80 and len(set(messages)) == len(messages)
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(messages), "a row does not begin with a message"
    for message in messages:
        assert sum(len(part.strip()) for part in message.split("…")) >= 12, message
