"""Which board a command is for: options that all of them have, and the inventory of many boards."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .ssh import Address

FOLDER = "minicpm-edge"  # in the home of the user who logs in
# What an inventory may say of a board: how the option of deploy/push is called, or "" for its own words.
KEYS = {
    "host": "",
    "bundle": "",
    "dir": "--dir",
    "ssh_port": "--ssh-port",
    "ssh_config": "--ssh-config",
    "memory": "--memory",
    "context": "--context",
    "wheel": "--wheel",
    "wheelhouse": "--wheelhouse",
    "build": "--build",
    "serve": "--serve",
    "service": "--service",
    "memory_max": "--memory-max",
    "ready": "--ready",
    "bwlimit": "--bwlimit",
}
_PATHS = ("bundle", "ssh_config", "wheel", "wheelhouse")


@dataclass(frozen=True)
class Entry:
    """A board of an inventory: its name, and its values as strings."""

    name: str
    values: dict[str, str]

    def options(self) -> list[str]:
        """Of deploy/push."""
        return [f"{option}={self.values[key]}" for key, option in KEYS.items() if option and key in self.values]


def add_target(parser: argparse.ArgumentParser) -> None:
    """HOST's options."""
    parser.add_argument("--dir", metavar="FOLDER", help=f"where it is on the board (default: ~/{FOLDER})")
    parser.add_argument("--ssh-port", type=int, metavar="N", help="the board's ssh port")
    parser.add_argument("--ssh-config", metavar="FILE", help="ssh's configuration, instead of ~/.ssh/config")
    parser.add_argument("--inventory", type=Path, metavar="FILE", help="boards.toml, whose names may be given as HOST")


def locate(host: str, options: argparse.Namespace) -> tuple[Address, str]:
    """Address and folder of a host, or of a name in --inventory."""
    values: dict[str, str] = {}
    if options.inventory is not None:
        boards = {entry.name: entry for entry in read_inventory(options.inventory)}
        if host not in boards:
            raise UsageError(f"{options.inventory} has no board {host}; it has {', '.join(boards)}")
        values = boards[host].values
    port = options.ssh_port or (int(values["ssh_port"]) if "ssh_port" in values else None)
    address = Address(values.get("host", host), port, options.ssh_config or values.get("ssh_config"))
    return address, folder_of(options.dir or values.get("dir"))


def folder_of(text: str | None) -> str:
    """The board's folder, relative to the home there unless it begins with /; UsageError for odd characters."""
    folder = (text or FOLDER).removeprefix("~/").rstrip("/")
    # It goes into a systemd unit and is deleted by deploy/remove.
    if not re.fullmatch(r"/?[\w.+][\w.+-]*(/[\w.+][\w.+-]*)*", folder) or ".." in folder.split("/"):
        raise UsageError(f"--dir {text!r} cannot be used; give a folder of letters, digits, and . _ - +")
    return folder


def read_inventory(path: Path) -> list[Entry]:
    """All boards of a boards.toml, defaults filled in, paths relative to it; UsageError says what is wrong in it."""
    try:
        import tomllib as toml
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as toml  # type: ignore[no-redef,import-not-found]
        except ModuleNotFoundError:
            raise UsageError("an inventory needs Python 3.11 here, or: pip install tomli") from None
    try:
        values = toml.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"the inventory {path} does not exist; deploy/boards.example.toml shows one") from None
    except (UnicodeDecodeError, toml.TOMLDecodeError) as error:
        raise UsageError(f"{path} is no TOML ({error})") from None
    boards, defaults = values.pop("boards", None), values.pop("defaults", {})
    if values or not isinstance(boards, dict) or not boards or not isinstance(defaults, dict):
        raise UsageError(f"{path} must have tables [boards.NAME], and may have [defaults], and nothing else")
    return [_entry(path, name, board, defaults) for name, board in boards.items()]


def _entry(path: Path, name: str, board: Any, defaults: dict[str, Any]) -> Entry:
    if not isinstance(board, dict):
        raise UsageError(f"{path}: [boards.{name}] is no table")
    merged = {**defaults, **board}
    for key, value in merged.items():
        if key not in KEYS:
            raise UsageError(f"{path}: {name} has {key}, which is not one of {', '.join(KEYS)}")
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise UsageError(f"{path}: {key} of {name} is {value!r}; write a text or a number")
        if key in _PATHS:
            merged[key] = str(path.parent / Path(value).expanduser())
    if "host" not in merged:
        raise UsageError(f'{path}: {name} has no host; write host = "user@address"')
    return Entry(name, {key: str(value) for key, value in merged.items()})
