"""What systemd is told of a server (sd_notify): that it is ready, that it lives, and that it is about to end.

The protocol is a datagram to the Unix socket in NOTIFY_SOCKET; where there is none, nothing is sent.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable

log = logging.getLogger("edge.server")
_BEATS = 3  # in the time after which systemd takes a service for dead


def notify(state: str) -> None:
    """Send a state, as 'READY=1'. A socket that does not take it is no reason to end."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # in Linux's abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(state.encode(), address)
    except OSError as error:
        log.warning("systemd was not told %s (%s)", state, error.strerror)


def watchdog_seconds() -> float | None:
    """After how long without a sign of life this process is ended; None if nobody watches it."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 1e6 or None


class Watchdog:
    """Sends WATCHDOG=1 several times in the time allowed while `alive(seconds)`, which may wait so long, says so."""

    def __init__(self, alive: Callable[[float], bool]) -> None:
        self._alive, self._ended = alive, threading.Event()
        self._seconds = watchdog_seconds()
        if self._seconds is not None:
            threading.Thread(target=self._run, args=(self._seconds / _BEATS,), name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """No more signs."""
        self._ended.set()

    def _run(self, pause: float) -> None:
        while not self._ended.wait(pause):
            if self._alive(pause):
                notify("WATCHDOG=1")
