"""What systemd hears of `edge serve` by a real datagram socket: ready, alive, ending; nothing of a stuck engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.server.notify import Watchdog, notify, watchdog_seconds
from edge.server.run import engine_moves
from tests.command import EDGE
from tests.served import serving


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield heard


def hear(heard: socket.socket) -> str:
    return heard.recv(4096).decode()


def test_a_server_tells_when_it_is_ready_that_it_lives_and_that_it_ends(
    systemd: socket.socket, tiny_bundle: Path
) -> None:
    command = [*EDGE, "serve", str(tiny_bundle), "--port", "0", "--context", "256", "--threads", "1"]
    environment = {**os.environ, "WATCHDOG_USEC": "600000"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert hear(systemd) == "READY=1"
        assert process.stderr is not None and json.loads(process.stderr.readline())["event"] == "serving"
        start = time.monotonic()
        assert [hear(systemd) for _ in range(3)] == ["WATCHDOG=1"] * 3
        assert time.monotonic() - start >= 0.5
        process.send_signal(signal.SIGTERM)
        last = [hear(systemd)]
        while last[-1] == "WATCHDOG=1":
            last.append(hear(systemd))
        assert last[-1] == "STOPPING=1" and process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_stuck_engine_gives_no_sign_of_life(
    systemd: socket.socket, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    with serving(tiny_bundle) as served:
        watchdog = Watchdog(lambda seconds: engine_moves(served.service, seconds))
        assert hear(systemd) == "WATCHDOG=1"
        stuck, reached = threading.Event(), threading.Event()
        served.service.worker.between_steps(lambda batcher: (reached.set(), stuck.wait()))
        assert reached.wait(20)
        systemd.settimeout(0.9)  # nine signs' time
        with pytest.raises(TimeoutError):
            while True:  # what was sent before it got stuck
                hear(systemd)
        stuck.set()
        systemd.settimeout(60)
        assert hear(systemd) == "WATCHDOG=1"
        watchdog.stop()


def test_a_server_that_takes_nothing_is_not_alive(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as served:
        assert engine_moves(served.service, 60)
        served.service.draining = True
        assert not engine_moves(served.service, 60)
        served.service.draining = False
        served.service.worker.stop()
        assert not engine_moves(served.service, 60)


def test_without_systemd_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("READY=1")  # a warning in the log, and no more
    for value, process, seconds in (("", "", None), ("0", "", None), ("90000000", "", 90.0), ("5", "1", None)):
        monkeypatch.setenv("WATCHDOG_USEC", value)
        monkeypatch.setenv("WATCHDOG_PID", process or str(os.getpid()))
        assert watchdog_seconds() == seconds


def test_abstract_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0edge-notify-{os.getpid()}")
        heard.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@edge-notify-{os.getpid()}")
        notify("READY=1")
        assert hear(heard) == "READY=1"
