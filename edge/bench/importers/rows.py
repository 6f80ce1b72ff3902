"""What all importers share: a file as they see it, what they make of it, and numbers that must be numbers."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edge.bench.options import PeerRow


@dataclass(frozen=True)
class ResultFile:
    """A file's text; `values` are its JSON values, one a line if it is JSONL, or None if it is neither."""

    name: str
    text: str
    values: Any


@dataclass(frozen=True)
class Imported:
    """The rows of a file, and a sentence for each figure of it that no row can hold."""

    rows: tuple[PeerRow, ...]
    notes: tuple[str, ...] = ()


def positive(value: Any, field: str) -> float:
    """A finite number above 0; ValueError names the field."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise ValueError(f"{field} is {value!r}, no number above 0")
    return number


def count(value: Any, field: str) -> int:
    """A whole number from 0 on; ValueError names the field."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not (0 <= number < 2**53 and number.is_integer()):
        raise ValueError(f"{field} is {value!r}, no whole number")
    return int(number)


def read_csv(text: str, is_heading: Callable[[Sequence[str]], bool], advice: str = "") -> list[dict[str, str]]:
    """The rows under each heading, by its names; ValueError, with the advice, if a row has another number of fields."""
    rows: list[dict[str, str]] = []
    heading: list[str] = []
    for cells in csv.reader(text.splitlines()):
        if is_heading(cells):
            heading = cells
        elif heading and cells:
            if len(cells) != len(heading):
                raise ValueError(f"a row has {len(cells)} fields under a heading of {len(heading)}{advice}")
            rows.append(dict(zip(heading, cells, strict=True)))
    return rows


def merge(rows: Iterable[PeerRow]) -> tuple[PeerRow, ...]:
    """Rows sorted, prefill and decode of one engine, context and batch in one; a figure given twice stays apart."""
    merged: list[PeerRow] = []
    for row in sorted(rows, key=lambda r: (r.name, r.batch, r.prompt_tokens)):
        last = merged[-1] if merged else None
        if last and _completes(last, row):
            merged[-1] = replace(
                last,
                prefill_tok_s=last.prefill_tok_s or row.prefill_tok_s,
                decode_tok_s=last.decode_tok_s or row.decode_tok_s,
                note=_joined((last.note, row.note)),
            )
        else:
            merged.append(row)
    return tuple(merged)


def _completes(first: PeerRow, second: PeerRow) -> bool:
    """Whether the second row has only what the first one lacks."""
    same = ("name", "prompt_tokens", "batch", "machine", "source")
    if any(getattr(first, field) != getattr(second, field) for field in same):
        return False
    speeds = ("prefill_tok_s", "decode_tok_s")
    return all(getattr(first, speed) is None or getattr(second, speed) is None for speed in speeds)


def _joined(notes: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(note for note in notes if note))
