"""The compiler's process, seen from outside: its messages, its memory, its death."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO

from build_engine.lowering import Progress
from build_engine.tensorrt_compile import PROGRESS_TOTAL, Request
from build_engine.tensorrt_memory import MemoryWatch
from edge.errors import EdgeError


@dataclass(frozen=True)
class Compiled:
    """What the process said at its end, and its anonymous memory as seen from here."""

    peak_rss_bytes: int
    peak_anonymous_bytes: int
    notes: tuple[str, ...]


def compile_in_child(request: Request, memory_limit: int | None, progress: Progress) -> Compiled:
    """Run tensorrt_compile.main. An exception here, such as Ctrl-C, ends the child, and so does too much memory."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from build_engine.tensorrt_compile import main; main()"
    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            start_new_session=True,  # the terminal's Ctrl-C comes here only
            text=True,
        )
        assert child.stdin is not None and child.stdout is not None
        notes: list[str] = []
        try:
            with MemoryWatch(child, memory_limit) as watch:
                with suppress(BrokenPipeError), child.stdin as stdin:
                    stdin.write(json.dumps(asdict(request)))
                peak = _listen(child.stdout, progress, notes)
                child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if watch.verdict is not None:
            raise EdgeError(f"building {request.onnx} was stopped: {watch.verdict}")
        if peak is None:
            raise EdgeError(f"building {request.onnx} failed: TensorRT {_cause_of_death(child.returncode, noise)}")
        return Compiled(peak, watch.peak, tuple(notes))


def _listen(messages: IO[str], progress: Progress, notes: list[str]) -> int | None:
    """Pass progress on until the result: peak memory in bytes, an EdgeError, or None if the child died."""
    for line in messages:
        message = json.loads(line)
        if "error" in message:
            raise EdgeError(message["error"])
        if "peak_rss_bytes" in message:
            return int(message["peak_rss_bytes"])
        if "note" in message:
            notes.append(message["note"])
        else:
            progress(message["progress"], PROGRESS_TOTAL, message["name"])
    return None


def _cause_of_death(returncode: int, noise: IO[bytes]) -> str:
    if returncode == -signal.SIGKILL:
        return "was killed, most likely for lack of memory; close other programs or build on a larger machine"
    noise.seek(0)
    words = noise.read().decode(errors="replace").strip().splitlines()
    cause = f"ended with {signal.Signals(-returncode).name if returncode < 0 else f'exit code {returncode}'}"
    return f"{cause}: {words[-1]}" if words else cause
