"""Ctrl-C in the middle of changes that must happen as a whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Generator[None, None, None]:
    """Ctrl-C inside takes effect at the end. Also a decorator. Only the main thread is ever interrupted.

    For what is over soon: a call into a library delays Ctrl-C just as long.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])
