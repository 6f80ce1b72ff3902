"""`edge chat`, through a pipe and in a terminal of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import EDGE, edge


def read_until(terminal: int, pattern: str, seconds: float = 60) -> str:
    """What the terminal shows until the pattern appears."""
    shown, deadline = "", time.monotonic() + seconds
    while not re.search(pattern, shown):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no {pattern!r} in {shown!r}")
        shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


def press_until(terminal: int, key: bytes, pattern: str) -> None:
    """Press a key, again if nothing comes of it: Python loses a signal just before it waits for a line."""
    for _ in range(20):
        os.write(terminal, key)
        with contextlib.suppress(TimeoutError):
            read_until(terminal, pattern, seconds=3)
            return
    raise TimeoutError(f"{key!r} never led to {pattern!r}")


@pytest.fixture
def terminal(tiny_bundle: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Our end of a terminal with `edge chat` at the other; replies are long and end only when stopped."""
    ours, theirs = pty.openpty()
    command = [*EDGE, "chat", str(tiny_bundle), "--max-tokens", "100000", "--context", "100100"]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=own_terminal
    )
    os.close(theirs)
    try:
        read_until(ours, "> $")
        yield ours, process
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def own_terminal() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C typed there becomes a signal."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_chat_from_a_pipe(tiny_bundle: Path) -> None:
    """Two turns, one after a reset: the second is the first and more, the third is the first again."""
    result = edge(
        "chat", tiny_bundle, "--max-tokens", 5, stdin=b"hello there\nand again\n/reset\n\nhello there\n/what\n"
    )
    assert result.returncode == 0
    counts = [int(n) for n in re.findall(r"(\d+) prompt tokens", result.stderr.decode())]
    assert counts[0] < counts[1]
    assert counts[2:] == counts[:1]
    assert "/what is no command; there are /reset and /exit" in result.stderr.decode()


CTRL_C, CTRL_D = b"\x03", b"\x04"


def test_ctrl_c_stops_a_reply_and_ctrl_d_the_chat(terminal: tuple[int, subprocess.Popen[bytes]]) -> None:
    keys, process = terminal
    counts = []
    for question in (b"hello there", b"and again"):
        os.write(keys, question + b"\n")
        read_until(keys, re.escape(question.decode()) + r"\s+\S")  # the reply has begun
        os.write(keys, CTRL_C)
        shown = read_until(keys, r"stopped\s+\d+ prompt tokens(.|\s)*> $")
        counts += [int(n) for n in re.findall(r"(\d+) prompt tokens", shown)]
    assert counts[0] < counts[1]
    os.write(keys, b"half a line")
    read_until(keys, "half a line$")
    press_until(keys, CTRL_C, r"Ctrl-D or /exit ends the chat\s+> $")
    os.write(keys, b"/reset\n")
    read_until(keys, r"forgotten\s+> $")
    os.write(keys, CTRL_D)
    assert process.wait(30) == 0


def test_a_chat_that_outgrows_its_context_goes_on_after_a_reset(tiny_bundle: Path) -> None:
    lines = b"hello\n" + b"x" * 400 + b"\n" + b"hello\n"
    result = edge("chat", tiny_bundle, "--max-tokens", 5, "--context", 128, stdin=lines)
    assert result.returncode == 0
    stderr = result.stderr.decode()
    assert re.search(
        r"error: the prompt has \d+ tokens and the context is limited to 128;.*; /reset starts over", stderr
    )
    assert len(re.findall(r"\d+ prompt tokens,", stderr)) == 2


def test_a_chat_is_kept_and_gone_on_with(tiny_bundle: Path, tmp_path: Path) -> None:
    """The restored chat's next turn is the third of one long chat; the run after it asks once more."""
    file, limits = tmp_path / "chat.session", ("--max-tokens", 5, "--temperature", 0)
    whole = edge("chat", tiny_bundle, *limits, stdin=b"hello there\nand again\n")
    begun = edge("chat", tiny_bundle, *limits, "--save", file, stdin=b"hello there\n")
    assert begun.returncode == 0 and f"conversation kept in {file}" in begun.stderr.decode()
    rest = edge("chat", tiny_bundle, *limits, "--restore", file, stdin=b"and again\n")
    assert begun.stdout + rest.stdout == whole.stdout
    asked = edge("run", tiny_bundle, *limits, "--restore", file, "--prompt", "and again")
    assert asked.stdout == rest.stdout

    both = edge("chat", tiny_bundle, "--restore", file, "--system", "Be brief.")
    assert both.returncode == 2 and b"drop one of them" in both.stderr
    file.write_bytes(file.read_bytes()[:-1])
    damaged = edge("chat", tiny_bundle, "--restore", file, stdin=b"hello\n")
    assert damaged.returncode == 1 and b"is damaged (its checksum is wrong)" in damaged.stderr
