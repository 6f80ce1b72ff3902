"""One thread that reads all sources at a fixed interval."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from edge.telemetry.reading import Key, Source
from edge.telemetry.recording import Series

Clock = Callable[[], float]


class Sampler:
    """Samples from `start` to `stop`; times are those of `clock`, in the middle of each source's reading.

    `series` may be read at any time: lists only grow. What several sources have is the first one's. A source that
    fails is not read again.
    """

    def __init__(self, sources: Sequence[Source], interval: float, clock: Clock = time.perf_counter) -> None:
        self.sources, self.interval, self.clock = list(sources), interval, clock
        self.series: dict[Key, Series] = {}
        self.samples = 0
        self.reading_s = 0.0  # of all samples together
        self.cpu_s = 0.0
        self._owners: dict[Key, Source] = {}
        self._last_begun = -math.inf
        self._stop = threading.Event()
        self._sampled = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sensors", daemon=True)

    def start(self) -> None:
        """Begin; the first sample has been taken when this returns."""
        self.sample()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and close the sources."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        for source in self.sources:
            source.close()

    def sample(self) -> None:
        """Read every source once."""
        begun = self.clock()
        for source in list(self.sources):
            before = self.clock()
            try:
                values = source.read()
            except OSError:
                self.sources.remove(source)
                source.close()
                continue
            middle = (before + self.clock()) / 2
            for key, value in values.items():
                if self._owners.setdefault(key, source) is source:
                    self.series.setdefault(key, Series()).append(middle, value)
        self.samples += 1
        self.reading_s += self.clock() - begun

    def wait_beyond(self, moment: float, patience: float) -> None:
        """Return when a sample was begun after `moment` of the clock, or after `patience` seconds."""
        end = time.monotonic() + patience
        with self._sampled:
            while self._thread.is_alive() and self._last_begun <= moment and time.monotonic() < end:
                self._sampled.wait(self.interval)

    def _run(self) -> None:
        due = time.monotonic() + self.interval
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            begun = self.clock()
            self.sample()
            with self._sampled:
                self._last_begun = begun
                self._sampled.notify_all()
            # Samples that were missed are not made up for.
            due = max(due + self.interval, time.monotonic())
            self.cpu_s = time.thread_time()
