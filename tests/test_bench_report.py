"""The report of a benchmark as table, Markdown, JSON and HTML page."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from rich.console import Console

from edge.bench.html import render_html
from edge.bench.report import (
    SCHEMA_VERSION,
    PeerRow,
    Report,
    compare_peers,
    from_dict,
    load_report,
    to_dict,
    to_json,
    write_text,
)
from edge.bench.roofline import Roofline
from edge.bench.samples import CaseResult
from edge.bench.sections import sections
from edge.bench.tables import format_bytes, format_number, format_seconds, markdown, terminal
from edge.errors import EdgeError
from tests.bench_samples import HERE, MIB, Page, case_result, full_report, of_class, plots, reports, sample_report

# ---- JSON --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(reports())
def test_json_round_trip(report: Report) -> None:
    assert from_dict(json.loads(to_json(report))) == report


def test_json_carries_raw_samples_and_derived_figures(tmp_path: Path) -> None:
    report = sample_report()
    write_text(tmp_path / "report.json", to_json(report))
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["schema_version"] == SCHEMA_VERSION
    assert values["execution"] == "ONNX Runtime CPU; no device was used"
    case = values["cases"][0]
    assert len(case["repetitions"][1]["intervals_s"]) == 60
    assert case["summary"]["prefill_tok_s"]["median"] == pytest.approx((128 / 0.5 + 128 / 0.52) / 2)
    assert case["summary"]["interval_s"]["p50"] == pytest.approx(0.0125)
    assert load_report(tmp_path / "report.json") == report


def damaged(**changes: Any) -> str:
    values = to_dict(sample_report()) | changes
    return json.dumps({key: value for key, value in values.items() if value is not ...})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "no schema_version"),
        (damaged(schema_version=SCHEMA_VERSION + 1), "schema version 3, newer than 2"),
        (damaged(machine=...), "field 'machine' is missing"),
        (damaged(cases=[{"case": {"prompt_tokens": 1, "new_tokens": 2}}]), "field 'repetitions' is missing"),
        (damaged(cases=7), "is damaged"),
        (damaged(cases=[]), "it has no cases"),
        (damaged(peers=[{"nom": "x"}]), "nom"),
    ],
)
def test_a_damaged_report_is_refused_by_name(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(EdgeError, match=said) as error:
        load_report(path)
    assert "old.json" in str(error.value)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"absent\.json: No such file"):
        load_report(tmp_path / "absent.json")
    with pytest.raises(EdgeError, match="cannot write the report"):
        write_text(tmp_path / "nowhere" / "report.json", "{}")
    (tmp_path / "taken").mkdir()
    with pytest.raises(EdgeError, match="cannot write the report"):
        write_text(tmp_path / "taken", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"], "nothing half-written is left"


# ---- text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [(13558.2, "13,558"), (301.4, "301"), (99.96, "100"), (75.24, "75.2"), (9.996, "10.0"), (9.84, "9.84"),
     (0.9996, "1.00"), (0.0512, "0.051"), (0.0, "0"), (None, "-")],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value: float | None, said: str) -> None:
    assert format_number(value) == said


def test_units_follow_the_size() -> None:
    assert [format_seconds(s) for s in (0.0421, 0.9996, 60.25, 1080)] == [
        "42.1 ms",
        "1.00 s",
        "60.2 s",
        "1,080 s",
    ]
    assert [format_bytes(b) for b in (812 * MIB, 1024 * MIB, None)] == ["812 MiB", "1.00 GiB", "-"]


def printed(report: Report, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=80, **options)
    console.print(terminal(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_table_fits_80_columns_whatever_the_figures() -> None:
    runs = [(1080.0, [0.0001234] * 9), (1234.0, [98.7654] * 9)]
    huge = case_result(131072, *runs, peak=23 * 2**30)
    fast = case_result(2**20, (10.0, [1.23e-5] * 9), (10.7, [1.31e-5] * 9))
    said = printed(sample_report(cases=(huge, fast), other_cpu=0.5))
    assert max(len(line) for line in said.splitlines()) <= 80
    for figure in ("131,072", "1,157 s", "114", "23.0 GiB", "1,048,576", "97,998 to"):
        assert figure in said
    assert "…" not in said


def test_a_piped_table_is_plain_text_and_says_where_it_ran() -> None:
    said = printed(sample_report())
    assert "\x1b" not in said
    assert "Measured on this machine: Cortex-A78AE, 8 of 12 cores, 64.0 GiB memory." in said
    assert "ONNX Runtime CPU; no device was used." in said
    assert re.search(r"llama.cpp Q4_0 +2,048 +230 +1.10x +60.0 +0.80x", said)
    assert re.search(r"llama.cpp Q4_0 +8,192 +120 +- +- +-", said)


LEDGER_ROWS = [
    ["weights", "300 MiB", "300 MiB", "0.0 %"],
    ["kv cache", "64.0 MiB", "65.0 MiB", "+1.6 %"],
    ["offloaded kv (disk)", "512 MiB", "512 MiB", "0.0 %"],
    ["process", "160 MiB", "40.0 MiB", "-75.0 %"],
    ["loading", "16.0 MiB", "-", "-"],
    ["total", "540 MiB", "405 MiB", "-25.0 %"],
]


def test_the_ledger_is_in_every_form_of_the_report() -> None:
    """The total leaves out what is elsewhere; a line without a measure has none."""
    report = sample_report()
    said = printed(report)
    for row in LEDGER_ROWS:
        assert re.search(" +".join(map(re.escape, row)), said), row
        assert f"| {' | '.join(row)} |" in markdown(report)
    cells = Page(render_html(report)).texts
    start = cells.index("Difference")
    assert [text for text in cells[start:] if text.strip()][1 : 1 + 4 * len(LEDGER_ROWS)] == [
        cell for row in LEDGER_ROWS for cell in row
    ]
    assert to_dict(report)["ledger"][1] == {"name": "kv cache", "planned": 64 * MIB, "measured": 65 * MIB} | {
        "where": "memory"
    }
    older = to_dict(report)
    del older["ledger"]
    assert from_dict(older).ledger == ()
    assert "Planned" not in printed(from_dict(older)) and "Planned" not in render_html(from_dict(older))


def test_all_forms_show_the_same_facts() -> None:
    """Every cell of every section: intervals, batches, roofline, acceptance, gate, hashes, what did not fit."""
    report = full_report()
    words = re.sub(r"\s+", "", printed(report))
    page = re.sub(r"\s+", "", "".join(Page(render_html(report)).texts))
    plain = re.sub(r"[\s\\]+", "", markdown(report))
    found = sections(report)
    assert [section.identity for section in found] == [
        *("skipped", "first-tokens", "confidence", "roofline", "speculation", "gate", "identity", "ledger")
    ]
    for section in found:
        for text in (section.heading, *section.headings, *(cell for row in section.rows for cell in row)):
            for form in (page, plain):
                assert re.sub(r"\s+", "", text) in form, text
        # on the terminal a long cell's lines stand beside those of its neighbours
        for text in (section.heading, *(word for row in section.rows for cell in row for word in cell.split())):
            assert re.sub(r"\s+", "", text) in words, text
    for form in (words, page, plain):
        for said in ("90%70%60%", "6.67%", "1.60x", "53%", "305MiB", "9,000MiBofmemory", "0f0f0f0f0f0f", "notpossible"):
            assert said in form, said
        assert "published,anothermachine:CPM.cu,JetsonAGXOrin" in form


def test_sections_say_only_what_is_known() -> None:
    single = case_result(512, (0.4, [0.01]))
    assert [section.identity for section in sections(sample_report(cases=(single,), ledger=()))] == ["first-tokens"]
    lost = replace(full_report(), roofline=Roofline(None, problem="No roofline: no room."))
    assert "No roofline: no room." in printed(lost) and "No roofline: no room." in render_html(lost)


def test_speed_over_batch_has_a_plot_where_batches_were_measured() -> None:
    found = plots(render_html(full_report()))
    assert len(found) == 5
    (batch,) = [plot for plot in found if "over batch" in (plot.findtext("title") or "")]
    assert [of_class(batch, name)[0].text for name in ("x", "y")] == [
        "Batch (sequences decoded together, log2 scale)",
        "Decode speed of all (tok/s)",
    ]
    assert "128 tokens each, 4 sequences: 200 tok/s" in (batch.findtext("desc") or "")


def test_a_plot_of_latencies_has_as_many_curves_as_can_be_told_apart() -> None:
    cases = tuple(case_result(2**e, (1.0, [0.02] * 5), (1.0, [0.02] * 5)) for e in range(7, 20))
    latency = plots(render_html(sample_report(cases=cases, peers=())))[2]
    names = re.findall(r"([\d,]+) tokens: p50", latency.findtext("desc") or "")
    assert len(names) == 6 and (names[0], names[-1]) == ("128", "524,288")


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*3[0-7]", printed(sample_report(), force_terminal=True))


def test_console_markup_in_names_is_not_interpreted() -> None:
    report = sample_report(engine={"model": "[red]x[/red]"}, peers=(PeerRow("[bold]y", 128, 1.0, 1.0),))
    assert "[red]x[/red]" in printed(report) and "[bold]y" in printed(report)


def test_markdown_tables_keep_their_columns() -> None:
    said = markdown(sample_report(peers=(PeerRow("a|b*c", 128, 200.0, 50.0),)))
    tables = [block.splitlines() for block in said.split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [4, 3, 4, 4, 8]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1
    assert r"a\|b\*c" in said and "no device was used" in said
    assert re.search(r"\| \d+ \(\d+ to \d+\) \|", tables[0][2]), "a median has its spread in brackets"
    assert [table[1].count(":---") for table in tables] == [0, 1, 0, 0, 1], "names are to the left"


# ---- HTML --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(reports())
def test_any_report_is_a_well_formed_page_of_its_own(report: Report) -> None:
    page = render_html(report)
    parsed = Page(page)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "iframe", "img", "object", "embed"}
    assert not [a for _, attrs in parsed.elements for a in attrs if a.startswith("on")]
    assert parsed.attribute("href") == ["data:,"] and not parsed.attribute("src")
    assert "http://" not in page and "https://" not in page and "url(" not in page and "@import" not in page
    ids = set(parsed.attribute("id"))
    for reference in parsed.attribute("aria-labelledby"):
        assert set(reference.split()) <= ids
    shown = "".join(parsed.texts)
    for said in (report.engine["model"], report.machine.cpu_model, *(peer.name for peer in report.peers)):
        assert said in shown
    for plot in plots(page):
        places = [value for element in plot.iter() for key, value in element.items() if key != "class"]
        assert not any(re.search("nan|inf", place) for place in places)


def test_text_from_outside_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&"
    report = sample_report(
        machine=replace(HERE, cpu_model=evil, accelerator=evil, packages={evil: evil}),
        engine={"model": evil, evil: evil, "target": evil},
        peers=(PeerRow(evil, 2048, 100.0, 10.0),),
    )
    parsed = Page(render_html(report))
    assert "script" not in {tag for tag, _ in parsed.elements}
    assert "".join(parsed.texts).count(evil) >= 8


def test_the_page_is_readable_with_a_screen_reader_and_keyboard() -> None:
    parsed = Page(render_html(sample_report()))
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("h1") == 1 and tags.count("caption") == tags.count("table") == 6
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in parsed.elements if tag == "th")
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in pairwise(levels))
    regions = [attrs for _, attrs in parsed.elements if attrs.get("role") == "region"]
    assert regions and all(r["tabindex"] == "0" and ("aria-label" in r or "aria-labelledby" in r) for r in regions)
    assert dict(parsed.elements)["html"] == {"lang": "en"}


def test_every_plot_has_a_title_a_description_and_axis_titles_with_units() -> None:
    found = plots(render_html(sample_report()))
    titles = []
    for plot in found:
        assert plot.get("role") == "img" and plot.findtext("title")
        assert re.search(r"\d", plot.findtext("desc") or "")
        (x,), (y,) = of_class(plot, "x"), of_class(plot, "y")
        titles.append((x.text or "", y.text or ""))
    assert [y for _, y in titles] == [
        "Prefill speed (tok/s)",
        "Decode speed (tok/s)",
        "Inter-token latency (ms)",
        "Resident memory (GiB)",
    ]
    assert all("prompt tokens" in x for x, _ in (titles[0], titles[1], titles[3])) and "ercentile" in titles[2][0]


def test_headline_figures_and_ratios_are_on_the_page() -> None:
    shown = re.sub(r"\s+", " ", " ".join(Page(render_html(sample_report())).texts))
    for said in (
        "Measured on this machine",
        "ONNX Runtime CPU; no device was used.",
        "251 tok/s",
        "at 128 tokens",
    ):
        assert said in shown
    for figure in ("500 MiB", "1.76 GiB at 2,048", "1.10×", "0.80×", "246–256"):
        assert figure in shown
    rows = compare_peers(sample_report())
    assert rows[0].prefill_ratio == pytest.approx((2048 / 8.0 + 2048 / 8.2) / 2 / 230)
    assert rows[0].decode_ratio == pytest.approx((1 / 0.020 + 1 / 0.022) / 2 / 60)
    assert rows[1].prefill_ratio is None and rows[1].decode_ratio is None


@pytest.mark.parametrize(
    "cases",
    [
        (case_result(300, (0.4, [])),),
        (case_result(512, (0.4, [0.01])),),
        (case_result(512, (0.4, [0.01, 0.01]), (0.4, [0.01, 0.01])),),
        (case_result(1, (0.0, [0.0]), (0.0, [0.0])),),
        tuple(case_result(2**e, (1.0, [0.02] * 5), (1.0, [0.02] * 5)) for e in range(7, 20)),
    ],
)
def test_degenerate_reports_still_render(cases: tuple[CaseResult, ...]) -> None:
    report = sample_report(cases=cases, peers=())
    assert len(plots(render_html(report))) == 4
    assert len(Page(render_html(report)).elements) > 50
    assert printed(report) and markdown(report) and from_dict(json.loads(to_json(report))) == report
