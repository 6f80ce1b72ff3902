"""The page docs/commands.md, from what every command says of itself: `python docs/site/commands.py` writes it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from edge.cli.app import app

PAGE = Path(__file__).parent.parent / "commands.md"
_VALUES = {"int": "N", "float": "X", "str": "TEXT", "list[str]": "TEXT", "Path": "PATH"}
_INTRODUCTION = """# Commands

What `edge COMMAND --help` prints, on one page; `make docs` writes it anew. Every command takes `--help`, and `--debug`,
which shows where an error came from. Exit codes: 0 done, 1 failed or interrupted, 2 wrong use.
"""


def page() -> str:
    """The whole page as Markdown: a section a command, in the order of `edge --help`."""
    return "\n".join([_INTRODUCTION, *_sections("edge", typer.main.get_command(app))])


def _sections(name: str, command: Any) -> Iterator[str]:
    """A command's section; of a group those of its commands."""
    if name != "edge":
        yield _section(name, command)
    for child, inner in getattr(command, "commands", {}).items():
        yield from _sections(f"{name} {child}", inner)


def _section(name: str, command: Any) -> str:
    words, _, examples = re.sub(r"Examples?:\n", "\0", command.help or "").partition("\0")
    parameters = [p for p in command.params if not getattr(p, "hidden", False)]
    usage = [name, *(_argument(p) for p in parameters if p.param_type_name == "argument"), "[OPTIONS]"]
    lines = [f"## {name}", "", words.strip(), "", "```text", " ".join(usage), *_example_lines(examples), "```", ""]
    rows = [f"| {_names(p)} | {_cell(_description(p))} |" for p in parameters]
    return "\n".join([*lines, "| | |", "|---|---|", *rows, ""])


def _example_lines(examples: str) -> list[str]:
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    return ["", *lines] if lines else []


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    name += "..." if parameter.nargs == -1 and not name.endswith("...") else ""
    return name if parameter.required else f"[{name}]"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _code(_argument(parameter))
    names = ", ".join(_code(option) for option in [*parameter.opts, *parameter.secondary_opts])
    if getattr(parameter, "is_flag", False):
        return names
    return f"{names} {_code(parameter.metavar or _VALUES[parameter.bare_type()])}"


def _code(text: str) -> str:
    """As HTML: a table's cell cannot hold a bar between backticks."""
    return f'<code class="option">{_cell(html.escape(text))}</code>'


def _description(parameter: Any) -> str:
    """Its help, what it may be, and its default unless the help says that."""
    words = [parameter.help or ""]
    least, most = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if least is not None or most is not None:
        bounds = [f"{word} {value}" for word, value in (("at least", least), ("at most", most)) if value is not None]
        words.append(f"({', '.join(bounds)})")
    default = parameter.default
    if parameter.required and parameter.param_type_name == "option":
        words.append("**Required.**")
    elif default not in (None, False, True, "") and not callable(default):
        words.append(f"Default: {default}.")
    if getattr(parameter, "multiple", False) and "repeated" not in words[0]:
        words.append("May be repeated.")
    return " ".join(word for word in words if word)


def _cell(text: str) -> str:
    return text.replace("|", "&#124;")


if __name__ == "__main__":
    PAGE.write_text(page())
