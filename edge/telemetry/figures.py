"""What a report keeps of the sensors: raw values of one case, facts of the machine, and their JSON form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """When a repetition started, had its first token and its last, in seconds of one clock."""

    start: float
    first: float
    end: float


@dataclass(frozen=True)
class RunEnergy:
    """One repetition, in seconds and joules: prefill up to the first token, then decode up to the last.

    Joules are None if they could not be read, or if the phase was too short for the sampling interval.
    """

    prefill_s: float
    prefill_j: float | None
    decode_s: float
    decode_j: float | None


@dataclass(frozen=True)
class ClockRange:
    """A clock over the repetitions of a case, in hertz."""

    lowest: float
    median: float
    highest: float

    @property
    def moved(self) -> float:
        """From the lowest to the highest, as a share of the median."""
        return (self.highest - self.lowest) / self.median


@dataclass(frozen=True)
class Trace:
    """The last repetition over time, for plots; `seconds` since its start, one value each or None.

    power_w: mean power of the interval around each point. clocks_hz: by unit. temperature_c: the hottest zone.
    """

    first_token_s: float
    end_s: float
    seconds: tuple[float, ...]
    power_w: tuple[float | None, ...]
    clocks_hz: dict[str, tuple[float | None, ...]]
    temperature_c: tuple[float | None, ...]


@dataclass(frozen=True)
class CaseTelemetry:
    """One case: `runs` are its repetitions; `prompt_tokens` and `decode_tokens` what their phases computed.

    The first token of a reply comes out of the prefill, and is in neither.

    hottest: degrees Celsius by zone, of the hottest zone only. throttled: what held clocks down, in words; None if the
    machine does not tell. idle_w: power before the benchmark.
    """

    prompt_tokens: int
    decode_tokens: int
    idle_w: float | None
    runs: tuple[RunEnergy, ...]
    clocks: dict[str, ClockRange]
    hottest: dict[str, float]
    throttled: tuple[str, ...] | None
    trace: Trace | None


@dataclass(frozen=True)
class Telemetry:
    """How a benchmark's sensors were read, and what the machine was set to.

    reading_s: mean time of reading all sensors once. cpu_share: of one core, that the sampling took. scope: what the
    power is that of. unreadable: why, by quantity. locked: by unit, whether its clock stays at the maximum.
    """

    interval_s: float
    reading_s: float
    cpu_share: float
    sources: tuple[str, ...]
    scope: str
    idle_w: float | None
    unreadable: dict[str, str]
    jetson: bool
    power_mode: str | None
    locked: dict[str, bool]
