"""`edge bench compare`: what is said of simulated and of two reports, and its outputs."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from edge.bench.checks import FAILED, PASSED, Check, Gate
from edge.bench.compare.comparison import (
    FASTER,
    NO_CLAIM,
    NOT_SHOWN,
    SLOWER,
    Comparison,
    Side,
    compare_sides,
    samples,
    slower_rows,
    warnings,
)
from edge.bench.compare.facts import differences, figures, format_change, ledger_figures
from edge.bench.compare.page import interval_plot, render_html
from edge.bench.compare.text import markdown, terminal, to_dict, to_json
from edge.bench.options import PeerRow
from edge.bench.report import Report
from edge.bench.report import to_json as report_json
from edge.errors import EdgeError, UsageError
from tests.bench_samples import CPU_ENGINE, HERE, LEDGER, MIB, Page, case_result, pair, plots, reports, sample_report
from tests.browser import CHROMIUM, browsing

# ---- simulated reports -------------------------------------------------------------------------------------


def simulated(draw: np.random.Generator, repetitions: int, noise: float, factor: float = 1.0) -> Report:
    """Three contexts whose speeds vary by `noise`; `factor` on all speeds."""
    cases = []
    for prompt, tokens in ((128, 32), (512, 32), (2048, 32)):
        runs = []
        for _ in range(repetitions):
            slow = np.exp(noise * draw.standard_normal(2)) / factor
            runs.append((prompt / 300 * slow[0], [0.02 * slow[1]] * tokens))
        cases.append(case_result(prompt, *runs))
    return sample_report(cases=tuple(cases), peers=())


def verdicts(a: Report, b: Report) -> list[str]:
    return [row.verdict for row in compare_sides([Side("a", (a,)), Side("b", (b,))]).rows]


@pytest.mark.parametrize("repetitions", [2, 3, 5])
def test_equal_reports_are_called_different_in_at_most_five_of_a_hundred(repetitions: int) -> None:
    draw = np.random.default_rng(repetitions)
    wrong = 0
    for _ in range(300):
        found = verdicts(*(simulated(draw, repetitions, 0.02) for _ in range(2)))
        wrong += any(verdict != NOT_SHOWN for verdict in found)
    assert wrong / 300 <= 0.05


def test_a_tenth_is_seen_with_five_repetitions_of_one_percent_noise() -> None:
    draw = np.random.default_rng(0)
    for factor, verdict in ((1.1, FASTER), (1 / 1.1, SLOWER)):
        for _ in range(40):
            sides = simulated(draw, 5, 0.01), simulated(draw, 5, 0.01, factor)
            assert verdicts(*sides) == [verdict] * 6


def test_the_interval_holds_the_true_ratio() -> None:
    draw = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        a, b = simulated(draw, 4, 0.03), simulated(draw, 4, 0.03, 1.05)
        rows = compare_sides([Side("a", (a,)), Side("b", (b,))]).rows
        inside += sum(low <= 1.05 <= high for low, high in (row.interval or (2, 0) for row in rows))
    assert 0.93 <= inside / 600 <= 0.98


def test_runs_of_one_thing_are_samples_and_their_repetitions_are_not() -> None:
    """Runs that differ by 5 % although each is steady show nothing; one of each looks like a difference."""
    draw = np.random.default_rng(2)
    shifts = [np.exp(0.05 * draw.standard_normal(3)) for _ in range(2)]
    shifts = [np.sort(shift)[:: 1 - 2 * i] for i, shift in enumerate(shifts)]
    sides = [tuple(simulated(draw, 5, 0.001, factor) for factor in shift) for shift in shifts]
    assert set(verdicts(sides[0][0], sides[1][0])) != {NOT_SHOWN}
    pooled = compare_sides([Side("a", sides[0]), Side("b", sides[1])])
    assert {row.verdict for row in pooled.rows} == {NOT_SHOWN}
    assert {row.samples for row in pooled.rows} == {(3, 3)}


# ---- two reports -------------------------------------------------------------------------------------------


def has_spread(report: Report) -> bool:
    return all(len(result.repetitions) > 1 for result in report.cases)


@settings(max_examples=40, deadline=None)
@given(reports())
def test_a_report_is_not_different_from_itself(report: Report) -> None:
    comparison = compare_sides([Side("a", (report,)), Side("b", (report,))])
    assert differences(comparison) == []
    for row in comparison.rows:
        assert row.ratio == 1 and row.verdict in (NOT_SHOWN, NO_CLAIM)
        assert row.verdict == NOT_SHOWN or min(row.samples) == 1
    assert all(
        change == 0 for _, found in figures(comparison) for f in found for change in f.changes if change is not None
    )


INVERSE = {FASTER: SLOWER, SLOWER: FASTER, NOT_SHOWN: NOT_SHOWN, NO_CLAIM: NO_CLAIM}


@settings(max_examples=40, deadline=None)
@given(reports(), st.data())
def test_exchanging_the_sides_inverts_everything(report: Report, data: st.DataObject) -> None:
    scale = st.floats(0.2, 5)
    cases = []
    for result in report.cases:
        runs = [
            (run.ttft_s * data.draw(scale), [gap * data.draw(scale) for gap in run.intervals_s])
            for run in result.repetitions
        ]
        cases.append(replace(case_result(result.case.prompt_tokens, *runs), case=result.case))
    other = replace(report, cases=tuple(cases))
    ways = (("a", report), ("b", other)), (("b", other), ("a", report))
    there, back = (compare_sides([Side(name, (r,)) for name, r in way]).rows for way in ways)
    for one, two in zip(there, back, strict=True):
        assert two.ratio == pytest.approx(1 / one.ratio)
        assert two.verdict == INVERSE[one.verdict]
        assert (one.interval is None) == (two.interval is None)
        if one.interval and two.interval and one.interval[0] > 1e-100 and one.interval[1] < 1e100:
            assert two.interval == pytest.approx((1 / one.interval[1], 1 / one.interval[0]), rel=1e-6)


def test_verdicts_ratios_and_medians() -> None:
    rows = {(row.case.prompt_tokens, row.phase): row for row in pair().rows}
    assert {key: row.verdict for key, row in rows.items()} == {
        (128, "prefill"): NOT_SHOWN,
        (128, "decode"): FASTER,
        (2048, "prefill"): NOT_SHOWN,
        (2048, "decode"): FASTER,
    }
    row = rows[128, "decode"]
    assert row.ratio == pytest.approx(4 / 3)
    assert (row.baseline_tok_s, row.candidate_tok_s) == (pytest.approx(40 / 0.501), pytest.approx(40 / 0.501 / 0.75))
    assert row.interval is not None and row.interval[0] < 4 / 3 < row.interval[1] < 1.34


def test_what_is_different_comes_from_machine_engine_and_options() -> None:
    machine = replace(HERE, cpu_model="Grace", packages={"numpy": "2.3.0"}, timestamp="2027-01-01T00:00:00+00:00")
    engine = CPU_ENGINE | {"bundle_key": "ab" * 32, "attention": "sparse"}
    found = {row.name: row.values for row in differences(pair(machine=machine, engine=engine, other_cpu=0.03))}
    assert found == {
        "machine: cpu model": ("Cortex-A78AE", "Grace"),
        "machine: packages numpy": ("2.2.0", "2.3.0"),
        "engine: bundle key": ("9f9f9f9f9f9f", "abababababab"),
        "engine: attention": ("-", "sparse"),
    }


def test_memory_and_the_ledger_stand_beside_each_other() -> None:
    ledger = (replace(LEDGER[1], measured=91 * MIB), *LEDGER[2:])
    comparison = pair(ledger=ledger)
    cells = {figure.name: figure.cells() for figure in ledger_figures(comparison)}
    assert cells["weights"] == ["300 MiB", "-"]
    assert cells["kv cache"] == ["65.0 MiB", "91.0 MiB (+40.0 %)"]
    assert cells["loading (planned)"] == ["16.0 MiB", "16.0 MiB (0.0 %)"]
    (_, found), _ = figures(comparison)
    cells = {figure.name: figure.cells() for figure in found}
    assert cells["peak memory"] == ["500 MiB", "500 MiB (0.0 %)"]
    assert cells["p99 between tokens"] == ["12.6", "9.41 (-25.0 %)"]
    assert format_change(-0.0001) == "0.0 %"


def test_other_prompts_and_missing_cases_are_warned_of() -> None:
    (warning,) = [said for said in warnings(pair(seed=3)) if "prompts" in said]
    assert warning == "new read other prompts than old (another seed): not comparable."
    assert not [said for said in warnings(pair()) if "prompts" in said]
    old = sample_report()
    alone = compare_sides([Side("old", (old,)), Side("new", (replace(old, cases=old.cases[:1]),))])
    assert "Only old has 2,048+61." in warnings(alone)
    with pytest.raises(EdgeError, match="old and new have no case in common"):
        compare_sides(
            [Side("old", (replace(old, cases=old.cases[1:]),)), Side("new", (replace(old, cases=old.cases[:1]),))]
        )
    busy = "Other processes took 40% of the CPU meanwhile: read the speeds as a lower bound."
    assert f"new: {busy}" in warnings(pair(other_cpu=0.4))


class Later(Side):
    """A side whose report has figures of power."""

    @cached_property
    def values(self) -> list[dict[str, Any]]:
        (values,) = [json.loads(report_json(report)) for report in self.reports]
        watts = {"new": 24.0}.get(self.name, 30.0)
        for case in values["cases"]:
            case["summary"]["decode_w"] = {"median": watts, "low": 1.0, "high": 99.0, "interval": None}
            case["telemetry"] = {"prompt_tokens": 9, "hottest": {"tj": 61.5}, "runs": [1], "trace": {"end_s": 1.0}}
            case["telemetry"]["clocks"] = {"gpu": {"lowest": 1.0, "median": 1.3e9, "highest": 2.0}}
        return [values | {"telemetry": {"scope": "VDD_IN", "interval_s": 0.1, "locked": True}}]


def gated(side: Side) -> Side:
    """With power, and a quality gate that the new one failed."""
    outcome = FAILED if side.name == "new" else PASSED
    gate = Gate((Check("same tokens twice", outcome, "token 3 is 5, and 7 the second time"),))
    return Later(side.name, tuple(replace(report, gate=gate) for report in side.reports))


def test_power_and_the_quality_gate_are_compared_if_reports_have_them() -> None:
    comparison = compare_sides([gated(side) for side in pair().sides])
    (_, found), _ = figures(comparison)
    cells = {figure.name: figure.cells() for figure in found}
    assert cells["decode w"] == ["30.0", "24.0 (-20.0 %)"]
    assert cells["hottest tj"] == ["61.5", "61.5 (0.0 %)"]
    assert cells["clocks gpu"] == ["1,300,000,000", "1,300,000,000 (0.0 %)"]
    assert not {name for name in cells if name.startswith(("runs", "trace", "prompt"))}
    assert warnings(comparison)[0] == (
        "new failed its quality gate (same tokens twice: token 3 is 5, and 7 the second time): "
        "its speeds are of no use."
    )
    assert "Quality gate of old: same tokens twice passed." in printed(comparison)
    assert differences(comparison) == []


def test_one_repetition_makes_no_claim() -> None:
    old = sample_report(cases=(case_result(128, (0.5, [0.01] * 9)),))
    more = sample_report(cases=(case_result(128, *[(0.4, [0.01] * 9)] * 3),))
    comparison = compare_sides([Side("old", (old,)), Side("new", (more,))])
    assert {row.verdict for row in comparison.rows} == {NO_CLAIM}
    assert any("no claim is made" in said for said in warnings(comparison))
    with pytest.raises(UsageError, match="nothing to judge"):
        slower_rows(comparison, 5)


def test_slower_by_more_than_a_share() -> None:
    forth = pair()
    back = compare_sides(forth.sides[::-1])
    assert slower_rows(forth, 0) == []
    assert {row.phase for row in slower_rows(back, 20)} == {"decode"} and len(slower_rows(back, 20)) == 2
    assert slower_rows(back, 30) == []


def test_a_case_that_took_no_time_has_no_row() -> None:
    still = sample_report(cases=(case_result(128, (0.0, [0.01] * 4), (0.5, [0.01] * 4)),))
    comparison = compare_sides([Side("a", (still,)), Side("b", (still,))])
    assert [row.phase for row in comparison.rows] == ["decode"]
    assert samples(comparison.sides[0], still.cases[0].case, "prefill") == []
    assert len(plots(render_html(comparison))) == 2


# ---- outputs -----------------------------------------------------------------------------------------------


def printed(comparison: Comparison, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal(comparison))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def three_sides() -> Comparison:
    forth = pair()
    peers = (
        PeerRow("llama.cpp [bold]Q4|0", 128, 260.0, 60.0, machine="<b>RTX</b>", source="llama-bench", note="half"),
    )
    slow = replace(forth.sides[0].first, cases=forth.sides[0].first.cases[:1])
    name = "a board with a name that is much too long for any table / and more"
    return compare_sides([*forth.sides, Side(name, (slow,))], peers)


def test_the_terminal_is_80_columns_wide_and_keeps_its_figures_whole() -> None:
    said = printed(three_sides())
    assert max(map(len, said.splitlines())) <= 80
    assert re.search(r"128 +61 +decode +79.8 +106 +1.333 +1.327–1.339 +faster", said)
    assert re.search(r"llama.cpp \[bold\]Q4\|0 +128 +60.0 +1.33x +1.77x +1.33x", said)
    assert "llama.cpp [bold]Q4|0: llama-bench; <b>RTX</b>; half." in said.replace("\n", " ")


def test_markdown_keeps_its_columns() -> None:
    said = markdown(three_sides())
    tables = [block.splitlines() for block in said.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1
    assert r"llama.cpp \[bold\]Q4\|0" in said and "## new against old" in said


def test_json_has_the_rows_with_their_verdicts() -> None:
    values = json.loads(to_json(pair(seed=1)))
    assert [row["verdict"] for row in values["rows"]] == [NOT_SHOWN, FASTER, NOT_SHOWN, FASTER]
    assert values["rows"][1]["case"] == {"prompt_tokens": 128, "new_tokens": 61, "batch": 1}
    assert values["differences"] == [{"name": "seed", "values": ["0", "1"]}]
    assert values["warnings"] and values["figures"][0]["figures"][0]["unit"] == "bytes"
    assert to_dict(pair())["sides"][1]["name"] == "new"


@settings(max_examples=10, deadline=None)
@given(st.lists(reports(), min_size=2, max_size=3))
def test_any_comparison_is_a_well_formed_page_of_its_own(found: Sequence[Report]) -> None:
    shared = [replace(report, cases=found[0].cases) for report in found]
    names = [f"<side {index}>" for index in range(len(shared))]
    comparison = compare_sides([Side(name, (report,)) for name, report in zip(names, shared, strict=True)])
    page = render_html(comparison)
    parsed = Page(page)
    tags = [tag for tag, _ in parsed.elements]
    assert not set(tags) & {"script", "iframe", "img", "object", "embed"}
    assert page.startswith("<!doctype html>") and tags.count("h1") == 1
    assert "http://" not in page and "https://" not in page and "url(" not in page
    assert all(name in "".join(parsed.texts) for name in names)
    assert tags.count("caption") == tags.count("table")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in parsed.elements if tag == "th")
    for plot in plots(page):
        places = [value for element in plot.iter() for key, value in element.items() if key != "class"]
        assert not any(re.search("nan|inf", place) for place in places)
    assert printed(comparison) and markdown(comparison) and to_json(comparison)


def test_dots_and_whiskers_are_where_their_ratios_are() -> None:
    """On a logarithmic axis: distances to 1 are as the logarithms; an end beyond the axis has no cap."""
    forth = pair()
    plot = interval_plot(forth, "decode")
    (first, _), row = plot.marks, next(row for row in forth.rows if row.phase == "decode")
    ticks = {float(text): x for x, text in plot.ticks}
    assert ticks[1.0] == pytest.approx(plot.one)
    tick = max(ticks)
    assert (first.x - plot.one) / (ticks[tick] - plot.one) == pytest.approx(math.log(row.ratio) / math.log(tick))
    assert first.whisker is not None and first.whisker[0] < first.x < first.whisker[1] and first.cut == (False, False)
    assert all(118 <= x <= 412 for x, _ in plot.ticks)
    wide = sample_report(cases=(case_result(128, (0.1, [0.01] * 9), (9.0, [0.01] * 9)),))
    comparison = compare_sides([Side("a", (wide,)), Side("b", (wide,))])
    (mark,) = interval_plot(comparison, "prefill").marks
    assert mark.cut == (True, True)
    page = render_html(comparison)
    assert "v10" not in re.findall(r'class="whisker" d="([^"]*)"', page)[0]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render_html(three_sides()), encoding="utf-8")
    with browsing(tmp_path / "profile") as browser:
        for width in (1180, 400):
            browser.resize(width, 900)
            browser.open((tmp_path / "page.html").as_uri())
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        boxes = browser.run("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)")
        assert len(boxes) == 4 and min(boxes) > 250
        lost = "[...document.querySelectorAll('svg text')].filter(t => t.getBoundingClientRect().width === 0).length"
        assert browser.run(lost) == 0
        said = "Decode: speed over that of old new at 128+61: 1.333 ("
        assert any(role == "image" and name.startswith(said) for role, name in browser.accessibility())
        assert browser.addresses and all(address.startswith(("file:", "data:")) for address in browser.addresses)
        assert browser.problems == []
