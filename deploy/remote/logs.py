"""`deploy/logs`: the server's journal, or what the last push and bench left."""

from __future__ import annotations

import sys

from . import terminal
from .ssh import Connection
from .target import add_target, locate

EXAMPLES = """  deploy/logs nvidia@orin.local
  deploy/logs nvidia@orin.local -f"""


def main() -> int:
    """The command."""
    return terminal.run(_logs)


def _logs() -> int:
    parser = terminal.parser("Show a board's log: the unit's journal if there is one, else log files.", EXAMPLES)
    parser.add_argument("host", metavar="[USER@]HOST")
    add_target(parser)
    parser.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="of the end (default: 50)")
    parser.add_argument("-f", "--follow", action="store_true", help="and what comes, until Ctrl-C")
    options = parser.parse_args()
    address, folder = locate(options.host, options)
    follow = "yes" if options.follow else ""
    with Connection(address) as connection:
        said = connection.run(
            "logs",
            folder,
            str(options.lines),
            follow,
            on_out=lambda line: print(line, flush=True),
            on_err=lambda line: print(line, file=sys.stderr),
        )
    return said.code
