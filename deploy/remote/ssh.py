"""One connection to a board: scripts that run there, files that go there and come back."""

from __future__ import annotations

import contextlib
import getpass
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import DeployError, UsageError

SCRIPTS = Path(__file__).parent.parent / "board"
LOST = 255  # what ssh exits with if it is the connection that failed
_HEARTBEAT = 5.0  # seconds; after 60 without one a board takes a lock for left behind (board/lock.sh)
_REASONS = (
    (
        r"Host key verification failed|REMOTE HOST IDENTIFICATION",
        "its host key is not known here, or has changed; compare its fingerprint once with: ssh {host}",
    ),
    (
        r"Permission denied|Too many authentication",
        "it lets nobody in without a password; copy your key there with: ssh-copy-id {host}",
    ),
    (r"Could not resolve|Name or service not known", "no machine has that name; check it, or give its address"),
    (r"refused", "no ssh server listens there; run on the board: sudo apt install openssh-server"),
    (r"timed out|No route|unreachable", "nothing answers; check the board's power, network and address"),
)


@dataclass(frozen=True)
class Address:
    """Where a board is: [user@]host as ssh takes it; port and configuration file of ssh, if they are not the usual."""

    host: str
    port: int | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.:@%+][\w.:@%+-]*", self.host):
            raise UsageError(f"{self.host!r} is no host; write it as [USER@]HOST")

    def options(self) -> list[str]:
        """Of ssh."""
        config = ["-F", self.config] if self.config else []
        return [*config, *(["-p", str(self.port)] if self.port else [])]


@dataclass(frozen=True)
class Said:
    """A script's exit code and output."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """Its error in one sentence: what follows the last 'error:', else the last line of all."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(internal )?error:", line, re.IGNORECASE)]
        last = (errors or lines or [f"exit code {self.code}"])[-1]
        return re.sub(r"^error:\s*", "", last, flags=re.IGNORECASE)


class Connection:
    """A multiplexed ssh connection, for as long as the context lasts."""

    def __init__(self, address: Address) -> None:
        for program in ("ssh", "rsync"):
            if shutil.which(program) is None:
                raise DeployError(f"{program} is not installed here; run: sudo apt install openssh-client rsync")
        self.address = address
        self._folder = tempfile.mkdtemp(prefix="edge-")
        self._master: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        """ssh with all options, to be followed by host and command."""
        return [
            *("ssh", *self.address.options()),
            *("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "LogLevel=ERROR"),
            *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),
            *("-o", f"ControlPath={self._folder}/ssh"),
        ]

    def __enter__(self) -> Connection:
        said = Path(self._folder) / "said"
        command = [*self.command, "-o", "ControlMaster=yes", self.address.host, "cat"]
        # In a session of its own, as all that this starts: Ctrl-C is for this program, which ends them in order. If it
        # is killed, the pipe to `cat` ends, and so does the connection.
        with said.open("wb") as file:
            self._master = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True
            )
        try:
            while not (Path(self._folder) / "ssh").exists():
                if self._master.poll() is not None:
                    raise DeployError(self._why(said.read_text(errors="replace")))
                time.sleep(0.02)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _why(self, said: str) -> str:
        host = self.address.host
        for pattern, reason in _REASONS:
            if re.search(pattern, said):
                return f"{host} cannot be reached: {reason.format(host=host)}"
        lines = said.strip().splitlines() or ["ssh said nothing"]
        return f"{host} cannot be reached ({lines[-1].strip()}); try: ssh {host}"

    def __exit__(self, *_: object) -> None:
        if self._master is not None:
            self._master.terminate()
            self._master.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """A script of deploy/board with its standard input open: who closes it ends what the script runs."""
        text = (SCRIPTS / "common.sh").read_text() + (SCRIPTS / f"{script}.sh").read_text()
        words = shlex.join(["sh", "-c", text, "edge-deploy", *arguments])
        command = [*self.command, "-o", "ControlMaster=no", self.address.host, f"exec {words}"]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def run(
        self,
        script: str,
        *arguments: str,
        on_out: Callable[[str], None] | None = None,
        on_err: Callable[[str], None] | None = None,
    ) -> Said:
        """A script to its end; lines also go to the functions as they come. DeployError if the connection is lost."""
        process = self.start(script, *arguments)
        out, err = list[str](), list[str]()
        assert process.stdin and process.stdout and process.stderr
        readers = [_read(process.stdout, out, on_out), _read(process.stderr, err, on_err)]
        try:
            code = process.wait()
        except BaseException:
            process.stdin.close()  # the board ends what runs there
            _end(process)
            raise
        for reader in readers:
            reader.join()
        process.stdin.close()
        if code == LOST:
            raise DeployError(f"the connection to {self.address.host} was lost; run the same command again")
        return Said(code, "".join(out), "".join(err))

    def ask(self, script: str, *arguments: str) -> str:
        """A script's output; its failure is a DeployError."""
        said = self.run(script, *arguments)
        if said.code:
            raise DeployError(said.reason)
        return said.out

    def rsync(
        self, arguments: Iterable[str], files: Iterable[str] = (), on_percent: Callable[[int], None] | None = None
    ) -> int:
        """Copy (`files`: with --files-from=-) -> bytes that went over the line. DeployError says what stopped it."""
        command = ["rsync", "-e", shlex.join([*self.command, "-o", "ControlMaster=no"]), "--stats", "--info=progress2"]
        process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin and process.stdout and process.stderr
        errors = list[str]()
        reader = _read(process.stderr, errors, None)
        try:
            process.stdin.write("\n".join(files).encode())
            process.stdin.close()
            said = _watch(process.stdout, on_percent)
            code = process.wait()
        except BrokenPipeError:
            said, code = "", process.wait()
        except BaseException:
            _end(process)
            raise
        reader.join()
        if code:
            raise DeployError(_rsync_failure("".join(errors), self.address.host))
        return sum(int(n.replace(",", "")) for n in re.findall(r"Total bytes (?:sent|received): ([\d,]+)", said))


def _rsync_failure(said: str, host: str) -> str:
    if "No space left" in said:
        return f"the disk of {host} is full; what came is kept there: make room and push again"
    if match := re.search(r"link_stat \"(.+?)\" failed|send_files failed to open \"(.+?)\"", said):
        return f"{match[1] or match[2]} cannot be read; check that it exists and its permissions"
    lines = [line for line in said.splitlines() if line.startswith("rsync")] or said.splitlines() or ["no reason given"]
    return f"the transfer to {host} stopped ({lines[0].strip()}); push again, it goes on where it stopped"


def _watch(stream: IO[bytes], on_percent: Callable[[int], None] | None) -> str:
    """All that rsync says; percentages, which end in a carriage return, as they come."""
    said = b""
    while chunk := stream.read1(4096):  # type: ignore[attr-defined]
        said += chunk
        if on_percent and (found := re.findall(rb"(\d+)%", chunk)):
            on_percent(int(found[-1]))
    return said.decode(errors="replace")


def _read(stream: IO[str] | IO[bytes], lines: list[str], on_line: Callable[[str], None] | None) -> threading.Thread:
    def read() -> None:
        for raw in stream:
            line = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
            lines.append(line)
            if on_line:
                on_line(line.rstrip("\n"))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def who() -> str:
    """As a board's lock names whoever holds it."""
    return f"{getpass.getuser()}@{platform.node()}"


class Lock:
    """The board's lock, for as long as the context lasts; `folder` is the absolute path of the board's folder."""

    def __init__(self, connection: Connection, folder: str) -> None:
        self._process = connection.start("lock", folder, who())
        assert self._process.stdout and self._process.stderr
        self.folder = self._process.stdout.readline().strip()
        if not self.folder:
            said = Said(self._process.wait(), "", self._process.stderr.read())
            raise DeployError(said.reason)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Lock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _beat(self) -> None:
        assert self._process.stdin
        while not self._ended.wait(_HEARTBEAT):
            try:
                self._process.stdin.write("\n")
                self._process.stdin.flush()
            except OSError:
                return
