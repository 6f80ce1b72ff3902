"""`deploy/bench`: `edge bench` on a board's active bundle, with its clocks held, and the reports brought back."""

from __future__ import annotations

import html
import json
import re
import sys
import time
from pathlib import Path

from . import terminal
from .errors import DeployError
from .ssh import Connection, Lock, Said
from .target import add_target, locate

EXAMPLES = """  deploy/bench nvidia@orin.local
  deploy/bench nvidia@orin.local --power-mode 0 --contexts 2048,32768 --repeat 5

Options that are not listed here are those of `edge bench`."""


def main() -> int:
    """The command."""
    return terminal.run(_bench)


def _bench() -> int:
    parser = terminal.parser("Measure the active bundle on a board; reports: ./reports/HOST-DATE.*", EXAMPLES)
    parser.add_argument("host", metavar="[USER@]HOST")
    add_target(parser)
    parser.add_argument("--power-mode", default="keep", metavar="N", help="of nvpmodel, for this run (default: keep)")
    parser.add_argument("--reports", type=Path, default=Path("reports"), metavar="FOLDER")
    options, rest = parser.parse_known_args()
    address, folder = locate(options.host, options)
    name = f"{re.sub(r'[^A-Za-z0-9.-]', '_', options.host.rpartition('@')[2])}-{time.strftime('%Y%m%d-%H%M%S')}"
    conditions: list[str] = []

    def heard(line: str) -> None:
        """Conditions are kept; of the rest, what edge itself reports to a person."""
        if line.startswith("condition "):
            conditions.append(line.removeprefix("condition "))
            terminal.say(conditions[-1])
        elif not line.startswith("report written to"):
            print(line, file=sys.stderr)

    options.reports.mkdir(parents=True, exist_ok=True)
    with Connection(address) as connection, Lock(connection, folder) as lock:
        said = connection.run("bench", lock.folder, options.power_mode, name, *rest, on_out=print, on_err=heard)
        there = f"{address.host}:{lock.folder}/reports/"
        chosen = [f"--include={name}.*", "--exclude=*", there, f"{options.reports}/"]
        connection.rsync(["-rt", "--remove-source-files", *chosen])
    _finish(said, options.reports / name, conditions)
    return said.code


def _finish(said: Said, stem: Path, conditions: list[str]) -> None:
    """Name the reports. Conditions go into the readable ones, and beside the JSON."""
    paths = [path for suffix in (".html", ".md", ".json") if (path := stem.with_name(stem.name + suffix)).is_file()]
    if not paths:
        if said.code == 0:
            raise DeployError("the board wrote no report; is its wheel of another version?")
        return  # it has said why
    beside = stem.with_name(f"{stem.name}.conditions.json")
    beside.write_text(json.dumps({"conditions": conditions}, indent=1) + "\n", encoding="utf-8")
    for path in paths:
        if path.suffix == ".md":
            lines = "".join(f"- {line}\n" for line in conditions)
            path.write_text(f"{path.read_text(encoding='utf-8')}\n## Conditions\n\n{lines}", encoding="utf-8")
        if path.suffix == ".html":
            items = "".join(f"<li>{html.escape(line)}</li>" for line in conditions)
            section = f"<section><h2>Conditions</h2><ul>{items}</ul></section>"
            text = path.read_text(encoding="utf-8")
            end = text.rfind("</main>") if "</main>" in text else text.rfind("</body>")
            path.write_text(text[:end] + section + text[end:], encoding="utf-8")
    for path in (*paths, beside):
        terminal.say(f"report: {path}")
