"""How figures and texts are written: three significant digits, a unit that suits their size, short hashes."""

from __future__ import annotations

from edge.bench.samples import PERCENTILES, CaseResult, Summary

NONE = "-"
SHORT_HASH = 12  # digits of a hash that are shown; the JSON report has them all


def format_number(value: float | None) -> str:
    """Three significant digits, thousands separated: 0.512, 9.84, 75.2, 13,558."""
    if value is None:
        return NONE
    if value == 0 or abs(value) >= 99.95:
        return f"{value:,.0f}"
    decimals = next(d for d, limit in ((1, 9.995), (2, 0.9995), (3, 0.0)) if abs(value) >= limit)
    return f"{value:.{decimals}f}"


def format_seconds(seconds: float | None) -> str:
    """Milliseconds below a second, seconds above."""
    if seconds is None:
        return NONE
    return f"{format_number(seconds * 1000)} ms" if seconds < 0.9995 else f"{format_number(seconds)} s"


def format_bytes(size: float | None) -> str:
    """MiB below 1 GiB, GiB above."""
    if size is None:
        return NONE
    unit, scale = ("MiB", 2**20) if size < 1023.5 * 2**20 else ("GiB", 2**30)
    return f"{format_number(size / scale)} {unit}"


def format_ratio(ratio: float | None) -> str:
    """Our figure over the peer's: 1.08x."""
    return NONE if ratio is None else f"{ratio:.2f}x"


def format_share(share: float | None) -> str:
    """A fraction as a percentage: 73 %, 4.2 %, 0.31 %."""
    return NONE if share is None else f"{format_number(100 * share) if share < 0.0995 else f'{100 * share:,.0f}'} %"


def format_summary(summary: Summary | None) -> str:
    """The median, and on a second line the slowest to the fastest repetition, where there is more than one."""
    if summary is None:
        return NONE
    median = format_number(summary.median)
    if summary.interval is None:
        return median
    return f"{median}\n{format_number(summary.low)} to {format_number(summary.high)}"


def format_percentiles(result: CaseResult) -> list[str]:
    """p50, p90 and p99 of the inter-token intervals in milliseconds."""
    percentiles = result.interval_percentiles_s
    return [format_number(percentiles[p] * 1000 if percentiles else None) for p in PERCENTILES]


def plain_markdown(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text.replace("\n", " "))


def short_hash(text: str) -> str:
    """The first digits of a hash, and any other text as it is."""
    is_hash = len(text) >= 32 and set(text) <= set("0123456789abcdef")
    return text[:SHORT_HASH] if is_hash else text
