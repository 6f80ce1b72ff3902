"""Tools in `edge chat`: which there are, and the person's word before each call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edge.chat_format.tools import Tool, ToolCall
from edge.cli.console import err, note
from edge.text import Tokenizer
from edge.toolbox.config import ServerConfig
from edge.toolbox.rounds import shortened
from edge.toolbox.servers import Toolbox, open_toolbox

DENIED = "Error: the user does not allow this call."
_ALWAYS, _YES, _NO = ("a", "always"), ("y", "yes"), ("", "n", "no")
Ask = Callable[[str], str | None]


@dataclass
class ToolUse:
    """The tools of a chat, its limits, and what the person allowed once and for all."""

    toolbox: Toolbox
    tokenizer: Tokenizer
    rounds: int
    result_tokens: int
    allowed: set[tuple[str, str]] = field(default_factory=set)

    @property
    def tools(self) -> tuple[Tool, ...]:
        """As the model sees them."""
        return tuple(tool.tool for tool in self.toolbox.tools)

    def execute(self, call: ToolCall, ask: Ask) -> str:
        """The call's result as the model will read it, after the person has agreed."""
        if not self._is_allowed(call, ask):
            return DENIED
        return shortened(self.toolbox.call(call), self.tokenizer, self.result_tokens)

    def _is_allowed(self, call: ToolCall, ask: Ask) -> bool:
        tool = self.toolbox.find(call.name)
        if tool is None:
            note(f"the model calls {printable(call.name)}, which there is not")
            return True  # the toolbox says so to the model
        err.print(printable(f"{tool.server}: {tool.name}"), style="bold", markup=False)
        for name, value in json.loads(call.arguments).items():
            err.print(f"  {printable(name)} = {printable(json.dumps(value, ensure_ascii=False))}", markup=False)
        key = (tool.server, tool.name)
        if key in self.allowed:
            return True
        while True:
            word = ask("call it? y(es), n(o), a(lways): ")
            answer = None if word is None else word.strip().lower()
            if answer in _ALWAYS:
                self.allowed.add(key)
            if answer in (*_ALWAYS, *_YES):
                return True
            if answer is None or answer in _NO:
                note("not called")
                return False


def printable(text: str) -> str:
    """Text with whatever could move the cursor or turn the writing around spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def open_tools(
    configs: tuple[ServerConfig, ...], tokenizer: Tokenizer, rounds: int, result_tokens: int, seconds: float
) -> Iterator[ToolUse | None]:
    """Start the servers, say which tools they have, and stop them at the end; None if there are no servers."""
    if not configs:
        yield None
        return
    with open_toolbox(configs, seconds=seconds, clean=tokenizer.without_special_tokens) as toolbox:
        names = ", ".join(printable(f"{tool.server}: {tool.name}") for tool in toolbox.tools)
        note(f"tools: {names or 'none'}")
        yield ToolUse(toolbox, tokenizer, rounds, result_tokens)
