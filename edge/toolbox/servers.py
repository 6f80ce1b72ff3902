"""MCP servers as plain function calls: an event loop in a thread of its own talks to them."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from edge.chat_format.tools import Tool, ToolCall, parse_tools
from edge.errors import EdgeError, UsageError
from edge.toolbox.config import ServerConfig

if TYPE_CHECKING:
    from anyio.abc import TaskStatus
    from anyio.from_thread import BlockingPortal
    from mcp import Client

_START_SECONDS = 30.0
_MOST_PAGES = 100  # of a server's list of tools


@dataclass(frozen=True)
class ServerTool:
    """A tool as the model sees it, and whose it is."""

    tool: Tool
    server: str
    name: str  # what the server calls it


@dataclass
class Toolbox:
    """The tools of all servers. Make it with `open_toolbox`; calls come from one thread at a time."""

    tools: tuple[ServerTool, ...]
    seconds: float  # that a call may take
    _portal: BlockingPortal = field(repr=False)
    _clients: dict[str, Client] = field(repr=False)

    def find(self, name: str) -> ServerTool | None:
        """The tool of a name that the model used."""
        return next((tool for tool in self.tools if tool.tool.name == name), None)

    def call(self, call: ToolCall) -> str:
        """What the tool answers, as text; what went wrong is an answer too, for the model to read.

        KeyboardInterrupt cancels the call at its server.
        """
        tool = self.find(call.name)
        if tool is None:
            return f"Error: there is no function {call.name}."
        client, arguments = self._clients[tool.server], json.loads(call.arguments)
        running = self._portal.start_task_soon(client.call_tool, tool.name, arguments, self.seconds)
        try:
            result = running.result()
        except KeyboardInterrupt:
            running.cancel()
            raise
        except Exception as error:  # the server's, or the protocol's: the model reads it and goes on
            return f"Error: {reason(error)}"
        text = "\n".join(_text_of(block) for block in result.content)
        if not text and result.structured_content is not None:
            text = json.dumps(result.structured_content, ensure_ascii=False)
        return f"Error: {text}" if result.is_error else text


@contextmanager
def open_toolbox(
    configs: Sequence[ServerConfig], *, seconds: float = 60.0, clean: Callable[[str], str] = str
) -> Iterator[Toolbox]:
    """Start the servers, and stop them at the end. `clean` goes over all that a server says of its tools.

    UsageError without the package mcp, EdgeError if a server does not start, with its last words.
    """
    try:
        from anyio.from_thread import start_blocking_portal
        from mcp import Client  # noqa: F401
    except ImportError:
        raise UsageError("MCP servers need the package mcp; install minicpm-edge[mcp]") from None
    with start_blocking_portal() as portal:
        # A failure comes as a value: whatever is raised among open servers arrives wrapped by each of them.
        running, started = portal.start_task(_run_servers, configs)
        if isinstance(started, EdgeError):
            raise started
        clients, found, stop = started
        try:
            yield Toolbox(_named(found, clean), seconds, portal, clients)
        finally:
            portal.call(stop.set)
            running.result()


async def _run_servers(configs: Sequence[ServerConfig], *, task_status: TaskStatus[Any]) -> None:
    """Open the servers, report (clients, their tools, the event that ends it) or an EdgeError, and wait for the end."""
    from anyio import Event
    from mcp import Client, StdioServerParameters, stdio_client

    clients: dict[str, Client] = {}
    found: list[tuple[str, Any]] = []
    stop = Event()
    async with AsyncExitStack() as stack:
        for config in configs:
            log = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115
            env = None if config.env is None else dict(config.env)
            parameters = StdioServerParameters(command=config.command, args=list(config.args), env=env)
            client = Client(stdio_client(parameters, errlog=log), read_timeout_seconds=_START_SECONDS)
            try:
                clients[config.name] = await stack.enter_async_context(client)
                found += [(config.name, tool) for tool in await _list_tools(client)]
            except Exception as error:  # of the operating system, the protocol or the server
                words = _last_words(log) or reason(error)
                task_status.started(
                    EdgeError(
                        f"the MCP server {config.name} ({config.command}) does not start ({words}); "
                        "try its command by hand, or remove it from the file"
                    )
                )
                return
        task_status.started((clients, found, stop))
        await stop.wait()


async def _list_tools(client: Client) -> list[Any]:
    """All of a server's tools, which come in pages."""
    tools: list[Any] = []
    cursor: str | None = None
    for _ in range(_MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def _named(found: Sequence[tuple[str, Any]], clean: Callable[[str], str]) -> tuple[ServerTool, ...]:
    """Every tool under a name of its own that a call can have: the server's before it if others have the same."""
    names = [tool.name for _, tool in found]
    tools: list[ServerTool] = []
    for server, tool in found:
        name = tool.name if names.count(tool.name) == 1 else f"{server}.{tool.name}"
        name = re.sub(r"[^A-Za-z0-9_\-./]|^(?=[^A-Za-z_])", "_", name)
        while any(name == earlier.tool.name for earlier in tools):
            name += "_"
        schema = json.loads(clean(json.dumps(tool.input_schema, ensure_ascii=False)))
        parsed = parse_tools([{"name": name, "description": clean(tool.description or ""), "parameters": schema}])
        tools.append(ServerTool(parsed[0], server, tool.name))
    return tuple(tools)


def reason(error: BaseException) -> str:
    """An exception in a line; of a group, its first."""
    while inner := getattr(error, "exceptions", ()):
        error = inner[0]
    return " ".join(str(error).split()) or type(error).__name__


def _last_words(log: IO[str]) -> str:
    log.seek(0)
    lines = log.read()[-2000:].split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _text_of(block: Any) -> str:
    """A piece of a result as text; the model cannot see pictures or hear sounds."""
    if block.type == "text":
        return str(block.text)
    if block.type == "resource" and getattr(block.resource, "text", None) is not None:
        return str(block.resource.text)
    return f"[{block.type}]"
