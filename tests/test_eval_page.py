"""The HTML page of `edge eval`: a cell for every depth and length, colours that can be read, nothing fetched."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from edge.eval.picture import COLOURS, colour, ink_on, render_html
from edge.eval.report import Answer, EvalReport
from edge.eval.tasks import HaystackPlan
from tests.bench_samples import HERE, Page, plots
from tests.eval_samples import settings_of
from tests.test_report_browser import CHROMIUM, FLAGS, PROBE


def sample_report(depths: int = 5) -> EvalReport:
    """Scores that fall with length; a task with a hostile name and an answer full of markup."""
    answers = tuple(
        Answer(task, length, 0, "k", ("1", "2"), (depth, depth), (length < 9000, depth < 0.5), "<b>&", 9, True, 0.1)
        for task in ("niah_single", "variable_tracking")
        for length in (4096, 8192, 16384)
        for depth in ((i + 0.5) / depths for i in range(depths - 1))
    )
    plan = HaystackPlan((4096, 8192, 16384), depths=depths)
    return EvalReport(settings_of(plan), HERE, {"model": "<i>m", "target": "onnxruntime"}, answers)


@pytest.mark.parametrize("depths", [2, 5, 60])
def test_the_page_prints_every_cell(depths: int) -> None:
    text = render_html(sample_report(depths))
    Page(text)
    assert "<i>m" not in text and "<b>&<" not in text
    first = plots(text)[0]
    tips = [e.findtext("title") for e in first.iter() if e.get("class") == "cell"]
    assert len(tips) == 3 * depths
    assert tips[0] == f"4,096 tokens, 0–{100 / depths:.3g} % deep: 100 % of 2 references found"
    assert tips[-1] is not None and tips[-1].endswith("not asked")


def test_colours_run_between_their_stops_and_letters_can_be_read_on_them() -> None:
    assert [colour(at) for at, _ in COLOURS] == [rgb for _, rgb in COLOURS]

    def luminance(rgb: tuple[int, ...]) -> float:
        parts = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for score in range(101):
        background = colour(score / 100)
        ink = tuple(bytes.fromhex(ink_on(background)[1:]))
        low, high = sorted((luminance(background), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, score  # WCAG AA


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_the_page_renders_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_html(sample_report()) + PROBE)
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search("<title>(.*?)</title>", dom)
    assert title is not None
    assert title[1] == "plots 3 lost 0 requests 0 overflow false"
