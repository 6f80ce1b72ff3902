"""`deploy/remove`: a board without anything that push put there."""

from __future__ import annotations

import sys

from . import terminal
from .errors import DeployError
from .ssh import Connection, Lock
from .target import add_target, locate

EXAMPLES = """  deploy/remove nvidia@orin.local
  deploy/remove nvidia@orin.local --yes"""


def main() -> int:
    """The command."""
    return terminal.run(_remove)


def _remove() -> int:
    parser = terminal.parser("Stop the server and delete what push put on a board.", EXAMPLES)
    parser.add_argument("host", metavar="[USER@]HOST")
    add_target(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args()
    address, folder = locate(options.host, options)
    with Connection(address) as connection:
        listed = connection.ask("remove", folder, "list").strip()
        if not listed:
            terminal.say(f"nothing of ours is in {folder} on {address.host}")
            return 0
        terminal.say(f"to be deleted on {address.host}:\n{listed}")
        if not options.yes:
            if not sys.stdin.isatty():
                raise DeployError("nobody can be asked here; give --yes if all of this is to be deleted")
            if input("delete all of this? [y/N] ").strip().lower() not in ("y", "yes"):
                terminal.say("nothing was deleted")
                return 1
        with Lock(connection, folder) as lock:
            left = connection.ask("remove", lock.folder, "delete").strip()
        terminal.say(left or "all of it is deleted")
    return 0
