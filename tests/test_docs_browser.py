"""The guide in headless Chromium, opened as files: nothing overflows, nothing is fetched, pictures and search work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser, browsing

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
ROOT = Path(__file__).parent.parent
# What sticks out to the right of the window, unless something around it scrolls.
STICKING_OUT = """[...document.querySelectorAll('.md-content *')].filter((element) => {
  if (element.getBoundingClientRect().right <= innerWidth + 1 || !element.getBoundingClientRect().width) return false;
  for (let at = element; at !== document.body; at = at.parentElement) {
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(at).overflowX)) return false;
  }
  return true;
}).map((element) => element.outerHTML.slice(0, 120))"""
LUMINANCE = """(() => {
  const [r, g, b] = getComputedStyle(document.querySelector('SELECTOR')).PROPERTY.match(/[0-9.]+/g).map(Number);
  return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
})()"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("width", [1280, 400])
def test_pages_fit_and_ask_nobody(site: Path, browser: Browser, width: int) -> None:
    browser.resize(width, 900)
    for page in sorted(set(site.glob("*.html")) - {site / "404.html"}):
        browser.addresses.clear()
        browser.open(page.as_uri())
        browser.wait_for(f"location.pathname.endsWith('/{page.name}') && document.readyState === 'complete'")
        assert browser.run(STICKING_OUT) == [], page.name
        assert browser.run("document.documentElement.scrollWidth") <= width, page.name
        broken = "[...document.images].filter((i) => !i.complete || !i.naturalWidth).map((i) => i.src)"
        assert browser.run(broken) == [], page.name
        assert all(address.startswith(("file:", "data:", "about:", "blob:")) for address in browser.addresses)
    assert not browser.problems


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_followed_and_can_be_read(site: Path, browser: Browser, scheme: str) -> None:
    browser.prefer(color_scheme=scheme)
    browser.resize(1280, 900)
    browser.open((site / "how-it-works.html").as_uri())
    browser.wait_for(f"document.body.dataset.mdColorScheme === '{'default' if scheme == 'light' else 'slate'}'")
    ink = browser.run(LUMINANCE.replace("SELECTOR", ".md-content p").replace("PROPERTY", "color"))
    paper = browser.run(LUMINANCE.replace("SELECTOR", "body").replace("PROPERTY", "backgroundColor"))
    assert (ink < 0.5 < paper) if scheme == "light" else (paper < 0.3 < ink)
    browser.run("document.querySelector('img[src$=\"pipeline.svg\"]').scrollIntoView({block: 'center'})")
    left, top = browser.run(
        "(({x, y}) => [x, y])(document.querySelector('img[src$=\"pipeline.svg\"]').getBoundingClientRect())"
    )
    corner = browser.screenshot()[int(top) + 10, int(left) + 10].mean() / 255
    assert corner > 0.9 if scheme == "light" else corner < 0.2, "the picture is of the other scheme"


def test_search_finds_without_a_server(site: Path, browser: Browser) -> None:
    browser.resize(1280, 900)
    browser.open((site / "index.html").as_uri())
    browser.wait_for("document.querySelector('.md-search__input') !== null")
    browser.click(".md-search__input")
    browser.type("tegra234")
    browser.press(" ")  # the field asks when a key goes up
    browser.wait_for("document.querySelector('.md-search-result__link') !== null", 60)
    assert "doctor.html" in browser.run("document.querySelector('.md-search-result__link').href")
    assert not browser.problems
