"""What the benchmark tests share: an engine on a known clock, sample reports, and a strict HTML parser."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

from hypothesis import strategies as st

from edge.bench.machine import Machine, MemoryUse
from edge.bench.measure import BenchCase, CaseResult, Repetition
from edge.bench.report import PeerRow, Report
from edge.memory.measured import Compared
from edge.sampler import SamplingParams

MIB = 2**20
HERE = Machine(
    cpu_model="Cortex-A78AE",
    board="",
    instruction_sets=("asimddp",),
    logical_cores=12,
    usable_cores=8,
    cpu_governor="schedutil",
    memory_bytes=64 * 2**30,
    os="Ubuntu 22.04, kernel 5.15.148-tegra, aarch64",
    python="3.10.12",
    packages={"numpy": "2.2.0"},
    accelerator="no CUDA device (no driver installed)",
    timestamp="2026-11-24T08:00:00+00:00",
)
CPU_ENGINE = {"model": "MiniCPM4-0.5B", "weights": "w4a16", "target": "onnxruntime", "bundle_key": "9f" * 32}


LEDGER = (
    Compared("weights", 300 * MIB, 300 * MIB),
    Compared("kv cache", 64 * MIB, 65 * MIB),
    Compared("offloaded kv", 512 * MIB, 512 * MIB, "disk"),
    Compared("process", 160 * MIB, 40 * MIB),
    Compared("loading", 16 * MIB, None),
)


@dataclass(frozen=True)
class Event:
    token_id: int


@dataclass
class FakeEngine:
    """Takes 1 ms a prompt token and `gaps` seconds between tokens, on its own clock; warm-ups take 10x."""

    vocab_size: int = 1000
    max_context: int = 4096
    gaps: Sequence[float] = (0.25, 0.5)
    stop_after: int | None = None
    now: float = 0.0
    requests: list[tuple[list[int], SamplingParams]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def describe(self) -> dict[str, str]:
        return CPU_ENGINE

    def ledger(self) -> Sequence[Compared]:
        return LEDGER

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        same_length = [ids for ids, _ in self.requests if len(ids) == len(prompt_ids)]
        slow = 1 if same_length else 10
        self.requests.append((list(prompt_ids), params))
        self.now += slow * 0.001 * len(prompt_ids)
        for index in range(params.max_tokens if self.stop_after is None else self.stop_after):
            if index:
                self.now += slow * self.gaps[(index - 1) % len(self.gaps)]
            yield Event(index)


def case_result(prompt: int, *runs: tuple[float, Sequence[float]], peak: int = 500 * MIB) -> CaseResult:
    repetitions = tuple(Repetition(ttft, tuple(gaps)) for ttft, gaps in runs)
    return CaseResult(
        BenchCase(prompt, len(runs[0][1]) + 1), repetitions, MemoryUse(peak, "case", peak // 4, peak // 2)
    )


def sample_report(**changes: Any) -> Report:
    cases = (
        case_result(128, (0.5, [0.012] * 60), (0.52, [0.013] * 60)),
        case_result(2048, (8.0, [0.020] * 60), (8.2, [0.022] * 60), peak=1800 * MIB),
    )
    peers = (PeerRow("llama.cpp Q4_0", 2048, 230.0, 60.0), PeerRow("llama.cpp Q4_0", 8192, 120.0, None))
    return replace(Report(cases, HERE, CPU_ENGINE, 0, 0.02, peers, LEDGER), **changes)


positive = st.floats(1e-6, 1e4)
text = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=30)


@st.composite
def reports(draw: st.DrawFn) -> Report:
    cases = []
    for prompt in draw(st.lists(st.integers(1, 2**20), min_size=1, max_size=4, unique=True)):
        gaps = draw(st.integers(0, 5))
        runs = draw(st.lists(st.tuples(positive, st.lists(positive, min_size=gaps, max_size=gaps)), min_size=1))
        cases.append(case_result(prompt, *runs[:3], peak=draw(st.integers(1, 2**40))))
    sizes = st.integers(0, 2**40)
    line = st.builds(Compared, text, sizes, st.none() | sizes, st.sampled_from(["memory", "disk"]))
    peer = st.builds(PeerRow, text, st.integers(1, 2**20), st.none() | positive, st.none() | positive)
    return Report(
        tuple(sorted(cases, key=lambda c: c.case.prompt_tokens)),
        replace(HERE, cpu_model=draw(text), packages=draw(st.dictionaries(text, text, max_size=2))),
        draw(st.dictionaries(text, text, max_size=3)) | {"model": draw(text)},
        draw(st.integers(0, 9)),
        draw(st.none() | st.floats(0, 1)),
        tuple(draw(st.lists(peer, max_size=4))),
        tuple(draw(st.lists(line, max_size=4))),
    )


VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Parses strictly: every element closed in order, ids unique; keeps elements and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []
        ids = self.attribute("id")
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def attribute(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]


def plots(page: str) -> list[ET.Element]:
    return [ET.fromstring(found) for found in re.findall(r"<svg .*?</svg>", page, re.S)]


def of_class(element: ET.Element, name: str) -> list[ET.Element]:
    return [child for child in element.iter() if name in child.get("class", "").split()]
