"""The guide as a site: it builds without a warning, needs nobody else's server, and names only what there is."""

from __future__ import annotations

import glob
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests.command import edge

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PICTURES = sorted((DOCS / "images").glob("*.svg"))
# Elements that make a browser fetch something, and the attribute that says what.
FETCHED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "image": "href",
    "use": "href",
}
NOT_FETCHED = {"canonical", "prev", "next", "edit"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does; mkdocs is strict, so a broken link or anchor fails here."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


class Resources(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in FETCHED and values.get("rel") not in NOT_FETCHED and (address := values.get(FETCHED[tag])):
            self.addresses.append(address)


def outside(text: str, suffix: str) -> list[str]:
    """Addresses of other servers that a file makes a browser fetch."""
    if suffix == ".html":
        found = Resources(text).addresses
    else:
        found = re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')]+)", text)
    return [address for address in found if re.match(r"(?:[a-z]+:)?//", address)]


def test_no_page_fetches_from_elsewhere(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".svg")]
    assert len(files) > len(PAGES)
    for path in files:
        assert not outside(path.read_text(), path.suffix), path


def test_what_is_fetched_from_elsewhere_is_noticed() -> None:
    assert outside('<link rel="stylesheet" href="https://fonts.example/a.css">', ".html")
    assert outside('<script src="//cdn.example/a.js"></script>', ".html")
    assert outside("a { background: url(http://x.example/y.png) }", ".css")
    assert not outside('<a href="https://example.org">out</a><img src="images/a.svg">', ".html")


def test_every_page_is_in_the_site_and_found_by_its_search(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    for page in PAGES:
        name = str(page.relative_to(DOCS).with_suffix(".html"))
        assert (site / name).exists()
        assert name in found, f"{name} cannot be searched"


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)
    assert {str(page.relative_to(DOCS)) for page in PAGES} <= set(_targets(settings["nav"]))


def _targets(entries: list[dict[str, object]]) -> Iterator[str]:
    for entry in entries:
        for target in entry.values():
            if isinstance(target, list):
                yield from _targets(target)
            else:
                yield str(target)


def test_the_page_of_commands_is_what_the_commands_say() -> None:
    page = runpy.run_path(str(DOCS / "site" / "commands.py"))["page"]()
    assert (DOCS / "commands.md").read_text() == page, "docs/commands.md is of another time: run `make docs`"
    assert "edge selftest" in page and "--questions-per-haystack" in page


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.name)
def test_pictures_say_in_words_what_they_show(picture: Path) -> None:
    """A title, a description, and colours for both schemes, with a background of their own."""
    text = picture.read_text()
    root = ElementTree.fromstring(text)
    names = {child.tag.rpartition("}")[2]: child for child in root}
    labels = (root.get("aria-labelledby") or "").split()
    assert labels == [names["title"].get("id"), names["desc"].get("id")]
    assert len(names["title"].text or "") > 5 and len(names["desc"].text or "") > 60
    assert "prefers-color-scheme: dark" in text and 'class="paper"' in text
    colours = re.findall(r"--(\w+): #", text)
    assert all(colours.count(name) == 2 for name in colours), "a colour is of one scheme only"
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(colours)


def test_the_picture_of_a_plan_has_the_figures_of_the_command() -> None:
    answer = edge("plan", "MiniCPM4-8B", "--device", "AGX Orin 32GB", "--context", 131072)
    rows = dict(re.findall(r"^  ([a-z][a-z ]+?) {2,}(\d+\.\d)", answer.stdout.decode(), re.MULTILINE))
    words = " ".join(ElementTree.fromstring((DOCS / "images" / "memory-plan.svg").read_text()).itertext())
    assert len(rows) == 8
    total = rows.pop("total")
    assert f"planned: {total}" in words
    for name, size in rows.items():
        assert f"{name} {size}" in words


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """`plugins/*/*.cu`, `edge/{a,b}.py`, `file.py: function` and the like; capitals stand for anything."""
    tops = "edge|plugins|build_engine|tests|bench|deploy"
    for name in re.findall(rf"`((?:{tops})/[^\s`:|]+)[^`]*`", page.read_text()):
        for path in _alternatives(re.sub(r"<\w+>|\b[A-Z]+\b", "*", name)):
            assert glob.glob(str(ROOT / path), recursive=True), f"{page.name}: {name}"


def _alternatives(name: str) -> Iterator[str]:
    if (braces := re.search(r"\{([^}]+)\}", name)) is None:
        yield name
        return
    for choice in braces[1].split(","):
        yield from _alternatives(name[: braces.start()] + choice + name[braces.end() :])
