"""Many boards at once: a push each, in a process of its own, their lines behind their names."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from .errors import UsageError
from .target import Entry
from .terminal import say, styled

PUSH = Path(__file__).parent.parent / "push"


@dataclass
class Run:
    """One board's push: its exit code, last line and duration once it has ended."""

    name: str
    command: list[str]
    width: int
    code: int | None = None
    last: str = ""
    seconds: float = 0.0
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def go(self) -> None:
        """To its end."""
        start = time.monotonic()
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        assert self.process.stdout
        for line in self.process.stdout:
            self.last = line.rstrip("\n")
            say(f"{styled(self.name.ljust(self.width), 'dim')} | {self.last}")
        self.code, self.seconds = self.process.wait(), time.monotonic() - start


def push(entries: list[Entry], bundle: str | None, options: list[str]) -> int:
    """All of them in parallel, then a table -> 1 if any failed. Options given now are stronger than an entry's."""
    runs = []
    for entry in entries:
        path = bundle or entry.values.get("bundle")
        if path is None:
            raise UsageError(
                f"no bundle for {entry.name}; give it as the last word, or write bundle = in the inventory"
            )
        command = [sys.executable, str(PUSH), entry.values["host"], path, *entry.options(), *options]
        runs.append(Run(entry.name, command, max(len(each.name) for each in entries)))
    threads = [threading.Thread(target=run.go, daemon=True) for run in runs]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        for run in runs:
            if run.process is not None and run.process.poll() is None:
                run.process.send_signal(2)  # each leaves its board as it was
        for thread in threads:
            thread.join(30)
        raise
    say("")
    for run in runs:
        word = styled("ok    ", "green") if run.code == 0 else styled("failed", "red")
        say(f"{run.name.ljust(run.width)}  {word}  {run.seconds:5.0f} s  {run.last.removeprefix('error: ')}")
    return int(any(run.code != 0 for run in runs))
