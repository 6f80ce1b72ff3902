"""Energy of Intel's and AMD's processors: RAPL counters below /sys/class/powercap (Documentation/power/powercap)."""

from __future__ import annotations

from pathlib import Path

from edge.telemetry.reading import Key, Reading, SysFile, Unreadable, in_order, text_of

FOLDER = "sys/class/powercap"


class Rapl:
    """Joules by domain since this was opened, as 'package-0' and 'package-0 dram'."""

    name = "RAPL"

    def __init__(self, domains: dict[str, tuple[SysFile, int]]) -> None:
        """`domains`: the counter's file, and where it starts again, in microjoules."""
        self._domains = domains
        self._last: dict[str, int] = {}
        self._total = dict.fromkeys(domains, 0)

    def read(self) -> Reading:
        found: dict[Key, float] = {}
        for domain, (file, span) in self._domains.items():
            number = file.number()
            if number is None:
                continue
            self._total[domain] += growth(self._last.get(domain, number), number, span)
            self._last[domain] = number
            found["energy", domain] = self._total[domain] / 1e6
        return found

    def close(self) -> None:
        for file, _ in self._domains.values():
            file.close()


def growth(before: int, after: int, span: int) -> int:
    """How far a counter that starts again after `span` has counted, if it did so at most once."""
    return after - before if after >= before else after - before + span


def open_rapl(root: Path) -> Rapl:
    """The counters of all domains; Unreadable if there are none, or only root may read them (Linux since 5.10)."""
    domains: dict[str, tuple[SysFile, int]] = {}
    refused = ""
    for folder in in_order((root / FOLDER).glob("intel-rapl:*")):
        span = text_of(folder / "max_energy_range_uj")
        if not span.isdigit():
            continue
        # intel-rapl:0 is a package, intel-rapl:0:1 a part of it or its memory.
        parent = folder.with_name(folder.name.rpartition(":")[0]) if folder.name.count(":") == 2 else None
        domain = " ".join(text_of(place / "name") for place in (parent, folder) if place)
        try:
            domains[domain] = (SysFile(folder / "energy_uj"), int(span))
        except OSError as error:
            refused = f"/{folder.relative_to(root)}/energy_uj: {error.strerror}"
    if not domains:
        raise Unreadable(refused or f"no RAPL counters in /{FOLDER}")
    return Rapl(domains)
