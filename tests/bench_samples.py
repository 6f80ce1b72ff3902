"""What the benchmark tests share: an engine on a known clock, sample reports, and a strict HTML parser."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

from hypothesis import strategies as st

from edge.bench.bandwidth import Limits
from edge.bench.checks import FAILED, NOT_POSSIBLE, PASSED, Check, Gate
from edge.bench.compare.comparison import Comparison, Side, compare_sides
from edge.bench.fit import Skipped
from edge.bench.identity import Identity
from edge.bench.machine import Machine, MemoryUse
from edge.bench.options import PeerRow, WorkloadFacts
from edge.bench.report import Report
from edge.bench.roofline import Roofline, RooflineRow
from edge.bench.samples import BenchCase, CaseResult, Repetition, SpeculationResult
from edge.bench.step_bytes import StepBytes
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


def pair(**changes: object) -> Comparison:
    """The sample report, named old, and one that decodes a third faster, named new, whose facts are changed."""
    old, steady = sample_report(), (0.500, 0.501, 0.502)
    cases = (
        case_result(128, *((t, [t / 40] * 60) for t in steady)),
        case_result(2048, *((t, [t / 40] * 60) for t in steady)),
    )
    quick = tuple(
        replace(
            r,
            repetitions=tuple(
                replace(run, intervals_s=tuple(g * 0.75 for g in run.intervals_s)) for run in r.repetitions
            ),
        )
        for r in cases
    )
    old = replace(old, cases=cases)
    return compare_sides([Side("old", (old,)), Side("new", (replace(old, cases=quick, **changes),))])  # type: ignore[arg-type]


def batch_result(prompt: int, batch: int, first: Sequence[float], gap: float, steps: int = 8) -> CaseResult:
    """Sequences whose first tokens came after `first` seconds, and which then took `steps` steps of `gap` seconds."""
    run = Repetition(max(first), (gap,) * steps * batch, tuple(first), gap * steps)
    return CaseResult(
        BenchCase(prompt, steps + 1, batch), (run, run), MemoryUse(500 * MIB, "case", None, None), "ab" * 32
    )


def full_report() -> Report:
    """A report in which everything has something to say."""
    cases = (
        case_result(128, (0.5, [0.012] * 60), (0.52, [0.013] * 60)),
        batch_result(128, 4, (0.5, 1.0, 1.5, 2.0), 0.02),
    )
    plain = (Repetition(0.5, (0.02,) * 60),)
    spoken = SpeculationResult(20, 60, 41, 61, ((20, 18), (20, 14), (15, 9)), 0.1, plain)
    step = StepBytes(300e6, 20e6, 5e6, 1e6)
    rows = tuple(RooflineRow(r.case, step, 150.0, 0.53, 2.5e9, None, None) for r in cases)
    return sample_report(
        cases=(replace(cases[0], prompts_sha256="cd" * 32, speculation=spoken), cases[1]),
        peers=(PeerRow("CPM.cu", 128, 1161.0, 58.8, machine="Jetson AGX Orin", source="published, another machine"),),
        skipped=(Skipped(BenchCase(131072, 64), "9,000 MiB of memory", "4,096 MiB"),),
        workload=WorkloadFacts("quick", "some seconds", "here", "any"),
        roofline=Roofline(Limits(25.0, "measured here: by a test", None, "not known"), rows),
        gate=Gate((Check("same tokens twice", PASSED, "16 tokens"), Check("needle", NOT_POSSIBLE, "no tokenizer"))),
        identity=Identity(
            "0f" * 32, {"model.onnx": "1e" * 32}, {"key": "2d" * 32}, "3c" * 32, "4b" * 32, "0.1.0", "5a" * 32, "MAXN"
        ),
    )


positive = st.floats(1e-6, 1e4)
text = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=30)


def _roofline(said: str, value: float, share: float | None) -> Roofline:
    step = StepBytes(value, 2 * value, 3 * value, 0)
    row = RooflineRow(BenchCase(7, 2, 3), step, value, share, value, share, None)
    return Roofline(Limits(value, said, share, said), (row,)) if share else Roofline(None, problem=said)


def _identity(said: str, digest: str) -> Identity:
    return Identity(digest, {said: digest}, {said: said}, "", digest, said, digest, said)


def _speculation(steps: int, seconds: float) -> SpeculationResult:
    depths = tuple((steps, kept) for kept in range(steps))
    return SpeculationResult(steps, 3 * steps, steps, 2 * steps, depths, seconds, (Repetition(seconds, (seconds,)),))


rooflines = st.builds(_roofline, text, positive, st.none() | positive)
gates = st.builds(lambda said, outcome: Gate((Check(said, outcome, said),)), text, st.sampled_from([PASSED, FAILED]))
identities = st.builds(_identity, text, st.sampled_from(["ab" * 32, "0c" * 32]))
speculations = st.builds(_speculation, st.integers(0, 4), positive)


@st.composite
def reports(draw: st.DrawFn) -> Report:
    cases = []
    for prompt in draw(st.lists(st.integers(1, 2**20), min_size=1, max_size=4, unique=True)):
        gaps = draw(st.integers(0, 5))
        runs = draw(st.lists(st.tuples(positive, st.lists(positive, min_size=gaps, max_size=gaps)), min_size=1))
        result = case_result(prompt, *runs[:3], peak=draw(st.integers(1, 2**40)))
        cases.append(replace(result, speculation=draw(st.none() | speculations)))
    if draw(st.booleans()):
        cases.append(batch_result(64, 3, draw(st.tuples(positive, positive, positive)), draw(positive)))
    sizes = st.integers(0, 2**40)
    line = st.builds(Compared, text, sizes, st.none() | sizes, st.sampled_from(["memory", "disk"]))
    peer = st.builds(PeerRow, text, st.integers(1, 2**20), st.none() | positive, st.none() | positive)
    return Report(
        tuple(sorted(cases, key=lambda c: (c.case.batch, c.case.prompt_tokens))),
        replace(HERE, cpu_model=draw(text), packages=draw(st.dictionaries(text, text, max_size=2))),
        draw(st.dictionaries(text, text, max_size=3)) | {"model": draw(text)},
        draw(st.integers(0, 9)),
        draw(st.none() | st.floats(0, 1)),
        tuple(draw(st.lists(peer, max_size=4))),
        tuple(draw(st.lists(line, max_size=4))),
        tuple(draw(st.lists(st.builds(Skipped, st.just(BenchCase(9, 9, 9)), text, text), max_size=1))),
        draw(st.none() | st.builds(lambda said: WorkloadFacts(said, said, said, said), text)),
        draw(st.none() | rooflines),
        draw(st.none() | gates),
        draw(st.none() | identities),
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
