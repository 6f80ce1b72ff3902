"""The code blocks of README.md and docs/, and a person who types them.

A block's info string is its language and, after it, why it is not run here, if it is not; neither GitHub nor the site
shows that. `sh` holds commands, `console` commands after `$ ` and what they print; both go to `bash -e`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
RUN = ("sh", "console", "python")
PARSED = ("json", "toml", "yaml")
SHOWN = ("text", "ini", "dockerfile")  # pictures of text, and files of other programs
REASONS = {
    "needs-board": "a Jetson, an RTX box or a host reached by ssh",
    "needs-network": "packages of other people, which are fetched",
    "needs-root": "changes of the whole machine",
    "takes-minutes": "more time than a test should take",
}
_TIMING = re.compile(r"\d[\d.,]*(?= ?(s|ms|tok/s|MiB|GiB|MB|GB/s|%)\b)")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, what it is, why it is not run, what it says."""

    page: str
    line: int
    language: str
    reasons: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = []
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type == "fence":
            language, *reasons = token.info.split() or [""]
            line = (token.map or [0])[0] + 1
            found.append(Block(str(page.relative_to(ROOT)), line, language, tuple(reasons), token.content))
    return found


def pages() -> list[Path]:
    """README.md and every page of the guide."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Reader:
    """Somebody at a terminal in a fresh folder, with `edge` of this environment on the PATH.

    `pip`, `git clone` and `make` do what they would, without fetching: pip looks whether there is such an extra, a
    clone is made of links, and make finds an environment that is set up. `edge serve` runs on until the next one, as in
    a terminal of its own. Replies and measurements are made short, by options after the line's.
    """

    def __init__(self, folder: Path, given: Mapping[str, Path] | None = None) -> None:
        """given: files and folders that are wherever the reader is, by name."""
        self.given = dict(given or {})
        self.home, self.tools = folder / "home", folder / "tools"
        self.cwd = self.home
        for place in (self.home, self.tools):
            place.mkdir()
        (self.home / "nvme").mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._write_tools()
        self.environment = {
            **os.environ,
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "KEY": "secret",
            "READER_TOOLS": str(self.tools),
        }
        self._lay_out()

    def _lay_out(self) -> None:
        for name, place in self.given.items():
            if not (self.cwd / name).exists():
                (self.cwd / name).symlink_to(place)

    def _write_tools(self) -> None:
        python = shlex.quote(sys.executable)
        tools = {
            "python": f'exec {python} "$@"',
            "edge": _EDGE.format(python=python, port=self.port, pid=self.tools / "server.pid", log=self.server_log),
            "pip": f'exec {python} -m tests.docs_tools pip "$@"',
            "git": f'exec {python} -m tests.docs_tools git "$@"',
        }
        for name, text in tools.items():
            path = self.tools / name
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        (self.tools / "python3").symlink_to("python")
        (self.tools / "activate").touch()  # of a venv, whose commands are here already

    @property
    def server_log(self) -> Path:
        return self.tools / "server.log"

    def type(self, block: Block) -> None:
        """Run a block; an AssertionError says what went wrong where."""
        if block.language == "python":
            self._run([sys.executable, "-c", self._here(block.text)], block)
        elif block.language == "sh":
            self._shell(block.text, block)
        else:
            for command, shown in transcript(block.text):
                printed = self._shell(command, block)
                missing = [line for line in shown if not is_printed(line, printed)]
                assert not missing, f"{block}: `{command}` printed\n{printed}\nwithout {missing}"

    def clone(self) -> None:
        """Be in a clone of the repository."""
        self.type(Block("a clone", 1, "sh", (), "git clone REPOSITORY minicpm-edge && cd minicpm-edge"))

    def close(self) -> None:
        """End the server, if one runs."""
        pid = self.tools / "server.pid"
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)

    def _here(self, text: str) -> str:
        disk = self.home / "nvme"
        return text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}").replace("/mnt/nvme", str(disk))

    def _shell(self, text: str, block: Block) -> str:
        """The folder that a block changes to is the next one's."""
        where = self.tools / "cwd"
        script = f"set -e\ntrap 'pwd > {shlex.quote(str(where))}' EXIT\n{self._here(text)}"
        printed = self._run(["bash", "-c", script], block)
        self.cwd = Path(where.read_text().strip())
        self._lay_out()
        return printed

    def _run(self, command: list[str], block: Block) -> str:
        begin = time.monotonic()
        result = subprocess.run(
            command,
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        printed = result.stdout.decode(errors="replace")
        print(f"{block} took {time.monotonic() - begin:.1f} s\n{printed}")
        log = self.server_log.read_text()[-2000:] if self.server_log.exists() else ""
        assert result.returncode == 0, f"{block} ended with {result.returncode}:\n{printed}\n{log}"
        return printed


def transcript(text: str) -> list[tuple[str, list[str]]]:
    """A console block -> its commands, each with the lines it is said to print."""
    commands: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            commands.append((line[2:], []))
        elif commands and line.startswith("> "):
            commands[-1] = (f"{commands[-1][0]}\n{line[2:]}", commands[-1][1])
        elif line.strip():
            commands[-1][1].append(line)
    return commands


def is_printed(line: str, printed: str) -> bool:
    """Whether a line was printed, whatever times, speeds and sizes it has; ... stands for anything."""
    parts = [re.escape(_plain(part)) for part in line.split("...")]
    return re.search(".*".join(parts), _plain(printed)) is not None


def _plain(text: str) -> str:
    return re.sub(r"[ \t]+", " ", _TIMING.sub("#", text)).strip()


_EDGE = """
case "$1" in
serve)
  if [ -f {pid} ]; then kill -9 "$(cat {pid})"; fi
  {python} -m edge "$@" --port {port} --context 2048 --max-tokens 32 --memory 1GiB >{log} 2>&1 </dev/null &
  echo $! >{pid}
  exec {python} -m tests.docs_tools ready {port} "$(cat {pid})" ;;
chat) shift; exec {python} -m edge chat "$@" --max-tokens 8 <<END
Hello
END
  ;;
bench) shift
  case " $* " in *" --static "* | *" --workload list "* | " compare "*) exec {python} -m edge bench "$@" ;; esac
  exec {python} -m edge bench "$@" --contexts 16,32 --new-tokens 4 --repeat 1 --no-gate ;;
run|mapreduce) exec {python} -m edge "$@" --max-tokens 16 ;;
quantize) shift; exec {python} -m edge quantize "$@" --samples 2 --length 64 ;;
eval) shift; exec {python} -m edge eval "$@" --samples 1 --lengths 900 ;;
*) exec {python} -m edge "$@" ;;
esac"""
