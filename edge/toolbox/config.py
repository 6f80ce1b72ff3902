"""The file that names MCP servers, in the form that MCP's own clients read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.errors import UsageError


@dataclass(frozen=True)
class ServerConfig:
    """How a server is started: a command that speaks MCP on standard input and output."""

    name: str
    command: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] | None = None


def read_config(path: Path) -> tuple[ServerConfig, ...]:
    """The servers of {"mcpServers": {name: {"command", "args", "env"}}}; UsageError says what is wrong."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); give a JSON file with mcpServers") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}); correct it") from None
    servers = values.get("mcpServers") if isinstance(values, dict) else None
    if not isinstance(servers, dict) or not servers:
        raise UsageError(f'{path} names no server; write {{"mcpServers": {{"NAME": {{"command": ...}}}}}}')
    return tuple(_server(f"{path}: mcpServers.{name}", name, value) for name, value in servers.items())


def _server(where: str, name: str, value: Any) -> ServerConfig:
    if not isinstance(value, dict) or not isinstance(value.get("command"), str):
        raise UsageError(f"{where} has no command; only servers that are started by one can be used")
    args, env = value.get("args", []), value.get("env")
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        raise UsageError(f"{where}.args must be a list of strings")
    if env is not None and not (isinstance(env, dict) and all(isinstance(word, str) for word in env.values())):
        raise UsageError(f"{where}.env must be an object of strings")
    return ServerConfig(name, value["command"], tuple(args), env)
