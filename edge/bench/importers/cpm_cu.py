"""CPM.cu's summary of a generation, as its README shows it and as `cpmcu.cli` prints it, plain or in a frame.

Older versions print "Prefill tokens/s: 6530.77", newer ones "Prefill Speed: 6530.8 tokens/s" (cpmcu/common/display.py).
"""

from __future__ import annotations

import re
from statistics import median

from edge.bench.importers.rows import Imported, ResultFile, count, positive
from edge.bench.options import PeerRow

_LINE = re.compile(
    r"(?P<what>prefill|decode|mean accept)\s(?P<kind>length|speed|tokens/s)\s*:\s*(?P<value>\S+)", re.IGNORECASE
)
_GPU = re.compile(r"GPU:\s*(?P<name>[^│|\n]+?)\s*(?:[│|]|$)", re.MULTILINE)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Its decode length counts the token that prefill gave, whose time is prefill's.
_NOTE = "decode speed counts the first token"


def recognises(file: ResultFile) -> bool:
    """A line with the speed of a prefill."""
    return any(match["what"].lower() == "prefill" and _is_speed(match) for match in _lines(file.text))


def read(file: ResultFile) -> Imported:
    """A row a prompt length; of several generations with one length, the median. ValueError: a figure is missing."""
    runs: list[dict[str, float]] = []
    for match in _lines(file.text):
        what = match["what"].lower().split()[-1]
        key = f"{what} speed" if _is_speed(match) else f"{what} length"
        if key == "prefill length":
            runs.append({key: count(match["value"], "the prefill length")})
        elif not runs:
            raise ValueError(f"it begins with a {key}, before any prefill length")
        else:
            runs[-1][key] = positive(match["value"], f"the {key}")
    gpu = _GPU.search(_ESCAPES.sub("", file.text))
    return Imported(tuple(_row(length, runs, gpu["name"] if gpu else "") for length in _lengths(runs)))


def _lengths(runs: list[dict[str, float]]) -> list[int]:
    return sorted({int(run["prefill length"]) for run in runs})


def _row(length: int, runs: list[dict[str, float]], machine: str) -> PeerRow:
    same = [run for run in runs if run["prefill length"] == length]
    speeds = {key: [run[key] for run in same if key in run] for key in ("prefill speed", "decode speed")}
    if not speeds["prefill speed"]:
        raise ValueError(f"the prefill of {length} tokens has no speed")
    decode = median(speeds["decode speed"]) if speeds["decode speed"] else None
    accepted = [run["accept length"] for run in same if "accept length" in run]
    notes = [_NOTE] if decode else []
    if accepted:
        notes.append(f"speculative, {median(accepted):.2f} tokens a step")
    name = "CPM.cu, speculative" if accepted else "CPM.cu"
    return PeerRow(
        name, length, median(speeds["prefill speed"]), decode, machine=machine, source="CPM.cu", note="; ".join(notes)
    )


def _lines(text: str) -> list[re.Match[str]]:
    return [match for line in _ESCAPES.sub("", text).splitlines() if (match := _LINE.search(line))]


def _is_speed(match: re.Match[str]) -> bool:
    return match["kind"].lower() != "length"
