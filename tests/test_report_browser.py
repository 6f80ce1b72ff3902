"""The HTML report in a real browser: it renders, its plots have size, and nothing is fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edge.bench.html import render_html
from edge.bench.report import Report, write_text
from tests.bench_samples import full_report, sample_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1180,2400"),
]
# Appended to a copy of the page: writes what the layout engine computed into the document, for --dump-dom.
PROBE = """
<script>
const boxes = [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect());
const lost = [...document.querySelectorAll('svg text')].filter(t => t.getBoundingClientRect().width === 0).length;
const requests = performance.getEntriesByType('resource').length;
document.title = 'plots ' + boxes.filter(b => b.width > 300 && b.height > 150).length + ' lost ' + lost +
  ' requests ' + requests + ' overflow ' + (document.documentElement.scrollWidth > window.innerWidth);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize(("report", "count"), [(sample_report(), 4), (full_report(), 5)], ids=["plain", "full"])
def test_report_renders_in_a_browser(report: Report, count: int, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_text(page, render_html(report) + PROBE)
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search("<title>(.*?)</title>", dom)
    assert title is not None
    assert title[1] == f"plots {count} lost 0 requests 0 overflow false"
