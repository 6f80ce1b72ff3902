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

    What several sources have is the first one's. A source that fails is not read again.
    """

    def __init__(self, sources: Sequence[Source], interval: float, clock: Clock = time.perf_counter) -> None:
        self.sources, self.interval, self.clock = list(sources), interval, clock
        self._series: dict[Key, Series] = {}
        self.samples = 0
        self.reading_s = 0.0  # of all samples together
        self.cpu_s = 0.0
        self._owners: dict[Key, Source] = {}
        self._sampled_at = -math.inf
        self._stop = threading.Event()
        self._sampled = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sensors", daemon=True)

    @property
    def series(self) -> dict[Key, Series]:
        """What was read so far; may be used while the thread runs, since lists only grow."""
        return dict(self._series)

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
                    self._series.setdefault(key, Series()).append(middle, value)
        self.samples += 1
        self._sampled_at = begun
        self.reading_s += self.clock() - begun

    def wait_beyond(self, moment: float, keys: Sequence[Key], patience: float) -> None:
        """Return when all of `keys` have values after `moment` of the clock, or after `patience` seconds.

        One sample more is not enough: a command may have printed nothing new.
        """
        end = time.monotonic() + patience
        with self._sampled:
            while self._thread.is_alive() and self._oldest(keys) <= moment and time.monotonic() < end:
                self._sampled.wait(self.interval)

    def _oldest(self, keys: Sequence[Key]) -> float:
        """When the last sample was taken, or the last value of the key that has the oldest."""
        return min([self._sampled_at, *(self._series[key].times[-1] for key in keys)])

    def _run(self) -> None:
        due = time.monotonic() + self.interval
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            self.sample()
            with self._sampled:
                self._sampled.notify_all()
            # Samples that were missed are not made up for.
            due = max(due + self.interval, time.monotonic())
            self.cpu_s = time.thread_time()
