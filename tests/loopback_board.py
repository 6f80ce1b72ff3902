"""A board on this machine: a real sshd on loopback whose sessions have a home and a PATH of their own.

rsync, Python, venv, pip and all of `edge` are real there. What a Jetson has and this machine has not is played by
tests/board_commands, first on the PATH; the system's Python packages are those of the tests' environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = Path(__file__).parent / "board_commands"
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
MISSING = [*([] if SSHD else ["sshd"]), *(name for name in ("ssh", "rsync") if not shutil.which(name))]

# The board's Python: environments that it makes see the packages of the tests' environment, as JetPack's see TensorRT.
# An editable minicpm-edge is not among what they can import: its .pth counts only where Python itself looks for one.
_PYTHON = """#!/bin/sh
"{python}" "$@" || exit
case "$1 $2" in "-m venv")
  for venv; do :; done
  for folder in "$venv"/lib/python3*/site-packages; do echo "{packages}" >"$folder/system.pth"; done ;;
esac
"""
# That of a board without packages: nor do its environments see those that this machine's Python may have.
_BARE_PYTHON = """#!/bin/sh
for word; do shift; [ "$word" = --system-site-packages ] || set -- "$@" "$word"; done
exec "{python}" "$@"
"""


@dataclass(frozen=True)
class LoopbackBoard:
    """home: of its user. config: for deploy's --ssh-config; its host is `board`. commands: first on the PATH."""

    home: Path
    config: Path
    commands: Path

    @property
    def folder(self) -> Path:
        """Where deploy puts everything."""
        return self.home / "minicpm-edge"

    @property
    def active(self) -> str | None:
        """The active release's ID."""
        link = self.folder / "current"
        return Path(os.readlink(link)).name if link.is_symlink() else None

    def said(self) -> list[str]:
        """What the board's stand-ins were asked to do."""
        path = self.home / "said"
        return path.read_text().splitlines() if path.exists() else []

    def deploy(self, command: str, *words: object) -> subprocess.CompletedProcess[str]:
        """A command of deploy/, to its end; nobody can be asked."""
        nobody = subprocess.DEVNULL
        line = self.words(command, *words)
        return subprocess.run(line, stdin=nobody, capture_output=True, text=True, timeout=600, env=_environment())

    def start(self, command: str, *words: object) -> subprocess.Popen[str]:
        """The same, not waited for."""
        return subprocess.Popen(
            self.words(command, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
        )

    def words(self, command: str, *words: object) -> list[str]:
        """The command line."""
        return [sys.executable, str(ROOT / "deploy" / command), "--ssh-config", str(self.config), *map(str, words)]

    def processes(self, part: str) -> list[int]:
        """Processes on the board's side whose command line has the board's folder and `part` in it."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.folder) in line and part in line and "ssh -" not in line and "--ssh-config" not in line:
                found.append(int(path.parent.name))
        return found

    def kill(self, part: str) -> None:
        """Without a word, all `processes` that there are."""
        for pid in self.processes(part):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """Nothing that makes the source tree importable comes along."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NO_COLOR")}
    return {**kept, "LC_ALL": "C.UTF-8"}


@contextmanager
def loopback_board(folder: Path, *, bare: bool = False) -> Iterator[LoopbackBoard]:
    """Up for as long as the context lasts; a bare one has Python and no packages."""
    assert SSHD is not None
    home, commands = folder / "home", folder / "bin"
    home.mkdir(parents=True)
    shutil.copytree(COMMANDS, commands)
    packages = sysconfig.get_paths()["purelib"]
    python = commands / "python3"
    script = _BARE_PYTHON if bare else _PYTHON
    python.write_text(script.format(python=getattr(sys, "_base_executable", sys.executable), packages=packages))
    python.chmod(0o755)
    (home / "power-mode").write_text("2\n")
    (home / "clock-state").write_text("free\n")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = _free_port()
    config = _write_configs(folder, home, commands, port)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd of root wants it; Debian's service makes it
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", folder / "sshd_config"], stdout=log, stderr=log, start_new_session=True
        )
    board = LoopbackBoard(home, config, commands)
    try:
        _wait_for(port, server, folder / "sshd.log")
        yield board
    finally:
        server.terminate()
        server.wait()
        board.kill("")


def _write_configs(folder: Path, home: Path, commands: Path, port: int) -> Path:
    (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin prohibit-password\nMaxStartups 50\n"
        f"SetEnv HOME={home} PATH={commands}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin PIP_NO_INDEX=1\n"
    )
    config = folder / "ssh_config"
    config.write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking yes\n"
    )
    return config


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(log.read_text())


def build_wheel(folder: Path) -> Path:
    """A wheel of the source tree with the operator libraries that are built in it: nothing is compiled again."""
    source = folder / "source"
    source.mkdir(parents=True)
    skipped = shutil.ignore_patterns("__pycache__")
    for name in ("build_engine", "edge", "plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # As if they had been compiled: setuptools takes along what is there already, and a compiler that fails is no error.
    built = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "plugins" / "ort"
    built.mkdir(parents=True)
    for library in (ROOT / "plugins" / "ort").glob("*.so"):
        shutil.copy(library, built)
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    subprocess.run([*command, "--wheel-dir", folder, source], check=True, env=environment, capture_output=True)
    (wheel,) = folder.glob("minicpm_edge-*.whl")
    return wheel
