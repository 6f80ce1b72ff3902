"""Power and clocks in the benchmark's report: figures, notes, tables, JSON, and the page in a browser."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from edge.bench.html import render_html
from edge.bench.measure import BenchCase
from edge.bench.options import BenchOptions
from edge.bench.power import decode_j, decode_w, power_notes, prefill_w, prompt_j
from edge.bench.power_plots import span_axis
from edge.bench.report import Report, from_dict, run_bench, to_dict, to_json
from edge.bench.tables import markdown, terminal
from edge.sampler import SamplingParams
from edge.telemetry.figures import ClockRange, RunEnergy
from edge.telemetry.recorder import Recorder
from edge.telemetry.sampler import Sampler
from tests.bench_samples import Event, FakeEngine, Page, case_result, of_class, plots, sample_report
from tests.browser import CHROMIUM, browsing, write_png
from tests.command import edge
from tests.telemetry_samples import LINES, TELEMETRY, Scripted, case_telemetry, power_report


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(terminal(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---- figures -----------------------------------------------------------------------------------------------

RUNS = (RunEnergy(2.0, 80.0, 3.0, 75.0), RunEnergy(2.0, 84.0, 3.0, 72.0), RunEnergy(2.5, 100.0, 3.0, 90.0))


def test_figures_are_joules_over_seconds_and_tokens_of_each_repetition() -> None:
    case = replace(case_telemetry(1000, 50), runs=RUNS, idle_w=8.0)
    summaries = prefill_w(case), decode_w(case), prompt_j(case), decode_j(case)
    assert [s and s.median for s in summaries] == pytest.approx([40.0, 25.0, 0.084, 1.5])
    watts, joules = prefill_w(case), decode_j(case)
    assert watts is not None and (watts.low, watts.high) == (40.0, 42.0) and watts.interval is not None
    assert joules is not None and (joules.low, joules.high) == pytest.approx((1.44, 1.8))
    net = prompt_j(case, net=True), decode_j(case, net=True)
    assert [s and s.median for s in net] == pytest.approx([0.068, (75 - 24) / 50])


def test_what_is_unknown_has_no_figure() -> None:
    case = replace(case_telemetry(1000, 50), runs=RUNS, idle_w=None)
    assert prompt_j(case) is not None and prompt_j(case, net=True) is None
    missing = replace(case, runs=(RUNS[0], replace(RUNS[1], prefill_j=None)))
    assert prefill_w(missing) is None and decode_w(missing) is not None
    single = replace(case, decode_tokens=0, runs=(RunEnergy(1.0, 9.0, 0.0, None),))
    assert decode_w(single) is None and decode_j(single) is None and prefill_w(single) is not None


# ---- a benchmark with sensors ------------------------------------------------------------------------------


class Drawing(FakeEngine):
    """On its own clock: 60 W for 2 s of prefill, 20 W for 0.5 s a token, 500 W in warm-ups, 8 W at rest."""

    watts = 8.0

    def __init__(self) -> None:
        super().__init__()
        scripted = Scripted(self.clock, lambda _: {("power", "VDD_IN"): self.watts})
        self.sampler = Sampler([scripted], 0.05, self.clock)

    def wait(self, seconds: float) -> None:
        """Let time pass, in which the sampler samples."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.sampler.sample()
            self.now = min(end, self.now + 0.05)
        self.sampler.sample()

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        warm_up = not self.requests
        self.requests.append((list(prompt_ids), params))
        for index in range(params.max_tokens):
            self.watts = 500.0 if warm_up else 20.0 if index else 60.0
            self.wait(0.5 if index else 2.0)
            yield Event(index)


def test_a_benchmark_measures_the_energy_of_its_phases_and_not_of_its_warm_up() -> None:
    engine = Drawing()
    recorder = Recorder(engine.sampler, {}, Path("/nowhere"), engine.wait)
    engine.sampler.sample()
    report = run_bench(engine, BenchOptions([BenchCase(100, 5)], repeat=2), clock=engine.clock, meter=recorder)
    case = report.cases[0].telemetry
    assert case is not None and (case.prompt_tokens, case.decode_tokens, len(case.runs)) == (100, 4, 2)
    # A step of power is seen with half an interval's doubt.
    assert [run.prefill_j for run in case.runs] == pytest.approx([120, 120], abs=0.025 * 480)
    assert [run.decode_j for run in case.runs] == pytest.approx([40, 40], abs=0.025 * 40)
    assert [run.decode_s for run in case.runs] == pytest.approx([2.0, 2.0])
    assert report.telemetry is not None and report.telemetry.idle_w == case.idle_w == pytest.approx(8.0)
    assert report.cases[0].prefill_tok_s is not None and report.cases[0].prefill_tok_s.median == pytest.approx(50)


def test_a_benchmark_without_sensors_says_nothing_of_them() -> None:
    engine = FakeEngine()
    report = run_bench(engine, BenchOptions([BenchCase(100, 5)], repeat=2), clock=engine.clock)
    assert report.telemetry is None and report.cases[0].telemetry is None
    for form in (printed(report), markdown(report), render_html(report)):
        assert "Sensors" not in form and "readable: " not in form


# ---- notes -------------------------------------------------------------------------------------------------


def test_notes_of_throttling_moving_clocks_and_loose_ones() -> None:
    found = power_notes(power_report().cases, TELEMETRY)
    said = " ".join(found)
    assert "Clocks were held down at 2,048 tokens: gpu-throttle-alert" in said and "over-current oc3 (4 events)" in said
    assert re.search(r"The GPU's clock moved by \d\d% within a case", said) and "memory's clock" not in said
    assert "Clocks are not locked (GPU): run sudo jetson_clocks" in said


def test_a_steady_locked_board_has_no_notes() -> None:
    calm = ClockRange(1270e6, 1300e6, 1300e6)
    case = replace(case_telemetry(), throttled=(), clocks={"GPU": calm})
    result = replace(case_result(2048, (8.0, [0.02] * 60)), telemetry=case)
    assert power_notes([result], replace(TELEMETRY, locked={"GPU": True, "memory": True})) == []
    assert "not locked" in power_notes([result], replace(TELEMETRY, locked={}))[0]
    assert power_notes([result], replace(TELEMETRY, locked={}, jetson=False)) == []
    moved = replace(result, telemetry=replace(case, clocks={"GPU": replace(calm, lowest=1234e6)}))
    assert "moved by 5% within" in power_notes([moved], replace(TELEMETRY, locked={"GPU": True}))[0]


def test_a_phase_too_short_for_the_samples_is_told_once() -> None:
    short = replace(case_telemetry(64), throttled=(), clocks={}, runs=(RunEnergy(0.05, None, 3.0, 75.0),) * 3)
    result = replace(case_result(64, (0.05, [0.05] * 60)), telemetry=short)
    (note,) = power_notes([result], replace(TELEMETRY, jetson=False))
    assert note == "No energy of prefill at 64 tokens: a phase takes 3 samples, 0.3 s; ask for more tokens."
    assert power_notes([result], replace(TELEMETRY, jetson=False, scope="")) == [], "no power: said elsewhere"


# ---- JSON, text, HTML --------------------------------------------------------------------------------------


def test_json_keeps_raw_values_and_older_reports_still_load() -> None:
    report = power_report()
    values = json.loads(to_json(report))
    assert from_dict(values) == report
    summary = values["cases"][1]["summary"]
    assert summary["prefill_w"]["median"] == pytest.approx(38, abs=4)
    assert summary["j_per_generated_token_net"]["median"] < summary["j_per_generated_token"]["median"]
    for older in (values, *values["cases"]):
        del older["telemetry"]
    assert from_dict(values).telemetry is None and from_dict(values).cases[1].telemetry is None


def test_every_form_of_the_report_has_power_and_clocks() -> None:
    report = power_report()
    text, md, html = printed(report), markdown(report), " ".join(Page(render_html(report)).texts)
    assert max(len(line) for line in text.splitlines()) <= 80 and "…" not in text
    assert re.search(r"^ *128 +37.8 +24.7 +0.590 +0.465 +1.13 +0.765 *$", text, re.MULTILINE)
    for form in (text, md, html):
        plain = re.sub(r"\s+", " ", form.replace("\\", ""))
        assert "1,300 (918)" in plain and "62.7 °C (tj)" in plain and "3,199 (3,199)" in plain
        assert "Power is that of VDD_IN, the module's input" in plain and "8.00 W" in plain
        assert "memory clock (before JetPack 7 only root may read it)" in plain
        assert "every 100 ms, 2.10 ms each time, 1.2% of a core" in plain
    assert "MAXN_SUPER" in html and "GPU not locked" in html


def test_a_machine_that_shows_nothing_gets_one_sentence() -> None:
    blank = replace(
        case_telemetry(), runs=(RunEnergy(1.0, None, 1.0, None),), clocks={}, hottest={}, throttled=None, trace=None
    )
    missing = {"power": "no RAPL", "clocks": "no cpufreq", "temperature": "no zones", "throttling": "no counts"}
    nothing = replace(TELEMETRY, sources=(), scope="", idle_w=None, unreadable=missing, jetson=False, locked={})
    cases = tuple(replace(result, telemetry=blank) for result in sample_report().cases)
    report = replace(sample_report(), cases=cases, telemetry=nothing)
    html = render_html(report)
    assert len(plots(html)) == 4
    for form in (printed(report), markdown(report), " ".join(Page(html).texts)):
        plain = re.sub(r"\s+", " ", form.replace("\\", ""))
        assert plain.count("Not readable: power (no RAPL)") == 1
        assert "J / prompt token" not in plain and "Throttled" not in plain and " 0 W" not in plain
    assert to_dict(report)["cases"][0]["summary"]["prefill_w"] is None


def test_plots_shade_the_phases_and_mark_the_extremes() -> None:
    found = {plot.get("aria-labelledby", "").split("-title")[0]: plot for plot in plots(render_html(power_report()))}
    power, clocks, heat = (found[f"plot-{name}"] for name in ("power", "clocks", "heat"))
    for plot in (power, clocks, heat):
        prefill, decode = of_class(plot, "band")
        width = [float(band.get("width", "")) for band in (prefill, decode)]
        assert width[1] / width[0] == pytest.approx(3 / 2, rel=0.01), "3 s of decode, 2 s of prefill"
    assert [text.text for text in of_class(power, "legend")] == ["power", "idle"]
    assert {text.text for text in of_class(clocks, "value")} >= {"918"}
    assert float(of_class(power, "value")[0].text or "") == pytest.approx(40, abs=0.5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-0.5, 5.5), (44.2, 62.9), (-12.0, 950.0), (0.013, 0.0195)])
def test_an_axis_has_a_few_round_ticks_within_it(low: float, high: float) -> None:
    for exact in (False, True):
        axis = span_axis("x", low, high, exact=exact)
        assert axis.low <= low and high <= axis.high and 3 <= len(axis.ticks) <= 8
        assert all(axis.low - 1e-9 <= value <= axis.high + 1e-9 for value, _ in axis.ticks)
        assert all(float(text.replace(",", "")) == pytest.approx(value, abs=1e-9) for value, text in axis.ticks)
    assert span_axis("x", low, high, exact=True).low == low


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_the_page_renders_with_its_power_plots(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_html(power_report()), encoding="utf-8")
    with browsing(tmp_path / "profile") as browser:
        browser.resize(1180, 3200)
        browser.open(path.as_uri())
        boxes = browser.run("""[...document.querySelectorAll('svg')].map(s => {
          const box = s.getBoundingClientRect();
          return [s.getAttribute('aria-labelledby').split('-title')[0], box.width, box.height];
        })""")
        assert {name for name, _, _ in boxes} >= {"plot-power", "plot-clocks", "plot-heat"}
        assert all(width > 300 and height > 150 for _, width, height in boxes)
        assert browser.run("[...document.querySelectorAll('svg text')].every(t => t.getBoundingClientRect().width)")
        assert not browser.run("document.documentElement.scrollWidth > window.innerWidth")
        # A band is to be seen: the page's pixels there are neither the card's nor those outside of it.
        inside, outside = browser.run("""(() => {
          const band = document.querySelector('#power ~ .plots .band').getBoundingClientRect();
          return [[band.x + 6, band.y + 6], [band.x - 12, band.y + 6]];
        })()""")
        pixels = browser.screenshot()
        colours = [tuple(pixels[round(y), round(x)]) for x, y in (inside, outside)]
        assert colours[0] != colours[1]
        assert browser.problems == []
        write_png(pixels, tmp_path / "report.png")


# ---- the command -------------------------------------------------------------------------------------------


def test_edge_bench_takes_power_from_tegrastats(tiny_bundle: Path, tmp_path: Path) -> None:
    """A command that prints a recorded line again and again, where sysfs has no rails."""
    if any("ina" in path.read_text() for path in Path("/sys/class/hwmon").glob("*/name")):
        pytest.skip("this machine has rails of its own")
    line = LINES["Orin NX, JetPack 6"][0]
    command = tmp_path / "tegrastats"
    command.write_text(f"#!/bin/sh\nwhile echo '{line}'; do sleep 0.004; done\n")
    command.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    lengths = ("--contexts", "32", "--new-tokens", 400, "--repeat", 2)
    result = edge("bench", tiny_bundle, *lengths, "--sensors", 5, "--json", PATH=path)
    assert result.returncode == 0, result.stderr.decode()
    values = json.loads(result.stdout)
    assert (
        values["telemetry"]["scope"] == "VDD_IN, the module's input" and "tegrastats" in values["telemetry"]["sources"]
    )
    assert values["telemetry"]["idle_w"] == pytest.approx(4.304) and "power" not in values["telemetry"]["unreadable"]
    (case,) = values["cases"]
    assert case["summary"]["decode_w"]["median"] == pytest.approx(4.304, rel=1e-3)
    seconds = sum(case["repetitions"][0]["intervals_s"])
    assert case["telemetry"]["runs"][0]["decode_j"] == pytest.approx(4.304 * seconds, rel=1e-3)
    assert case["summary"]["j_per_generated_token_net"]["median"] == pytest.approx(0, abs=1e-4)
    off = edge("bench", tiny_bundle, *lengths[:2], "--new-tokens", 2, "--sensors", 0, "--json", PATH=path)
    assert off.returncode == 0 and json.loads(off.stdout)["telemetry"] is None
