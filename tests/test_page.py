"""The server's own page in a real browser, against a real `edge serve`: what a user sees, hears and may press."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM, Browser, browsing, write_png
from tests.page_scripts import CONTRAST, FIRST_ANSWER_LATE, SPY, WITNESS
from tests.scripted_model import ASKED, write_scripted_bundle
from tests.test_serve_command import started

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")

THOUGHT = "The user looks for a fox."
# What a model, or whoever wrote into its prompt, might try.
MARKUP = "<b>bold</b><img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
SENTENCES = (" Here it is. ", "It jumps. ")
# It thinks, answers, and then never stops by itself.
SCRIPT = dict(pairwise([ASKED, "<think>", THOUGHT, "</think>", MARKUP, *SENTENCES, SENTENCES[0]]))
REPLY = "article.assistant:last-of-type"
DONE = f"document.querySelector('{REPLY} .note')?.textContent && !document.querySelector('#send').hidden"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_bundle(tmp_path_factory.mktemp("scripted"), SCRIPT, context=4096)


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    with started(bundle, context=4096) as (_, port):
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Browser]:
    """A fresh page: nothing said, greedy replies of 12 tokens."""
    browser.resize(1280, 800)
    browser.prefer(color_scheme="light")
    browser.open(url)
    browser.run("sessionStorage.clear(); localStorage.clear()")
    choose(browser, temperature=0, max_tokens=12)
    browser.open(url)
    browser.wait_for("document.querySelector('#model').textContent")
    browser.run(SPY)
    browser.problems.clear()
    yield browser
    assert browser.problems == []


def choose(browser: Browser, **settings: object) -> None:
    """Settings, as the page keeps them; they count when it is opened again."""
    browser.run(f"localStorage.setItem('minicpm-edge settings', {json.dumps(json.dumps(settings))})")


def say(browser: Browser, text: str) -> None:
    browser.run("document.querySelector('#message').focus()")
    browser.type(text)
    browser.press("Enter")


def fetched(url: str, key: str | None = None) -> Any:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
        return response.read().decode()


def test_a_reply_streams_in_and_stays_text(page: Browser) -> None:
    page.click("#settings summary")
    page.click("[name=system]")
    page.type("You watch animals.")
    page.click("[name=max_tokens]")
    page.run("document.activeElement.select()")
    page.type("20")
    page.click("#message")
    page.type("Where is")
    page.press("Enter", shift=True)
    page.type("the <i>fox</i>?")
    page.press("Enter")
    page.wait_for(DONE)
    assert page.run("window.sent") == [
        {
            "messages": [
                {"role": "system", "content": "You watch animals."},
                {"role": "user", "content": "Where is\nthe <i>fox</i>?"},
            ],
            "temperature": 0,
            "max_tokens": 20,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    wanted = MARKUP + "".join(SENTENCES[i % 2] for i in range(16))
    assert page.run(f"document.querySelector('{REPLY} > .said').textContent") == wanted
    assert page.run("window.lengths.size") > 8, "the reply did not come bit by bit"
    assert page.run("document.querySelectorAll('article :is(b, i, img, script)').length") == 0
    assert "taken" not in page.run("document.title") and page.text("article.user .said").endswith("<i>fox</i>?")
    assert not page.run(f"document.querySelector('{REPLY} details').open")
    assert page.run(f"document.querySelector('{REPLY} details p').textContent") == THOUGHT
    assert "20 tokens" in page.text(f"{REPLY} .note") and "cut off" in page.text(f"{REPLY} .note")
    spoken = page.run("[...document.querySelectorAll('#spoken p')].map(p => p.textContent)")
    assert spoken[-1] == "The reply is complete." and any(MARKUP in text for text in spoken)
    assert page.run("document.querySelector('#spoken').ariaLive") == "polite"


def test_the_conversation_goes_on_and_outlives_a_reload(page: Browser, url: str) -> None:
    say(page, "One")
    page.wait_for(DONE)
    first = page.run(f"document.querySelector('{REPLY} > .said').textContent")
    page.open(url)
    page.wait_for("document.querySelectorAll('article').length === 2")
    page.run(SPY)
    say(page, "Two")
    page.wait_for("document.querySelectorAll('article').length === 4 && " + DONE)
    roles = [(m["role"], m["content"]) for m in page.run("window.sent")[0]["messages"]]
    assert roles == [("user", "One"), ("assistant", first), ("user", "Two")]
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    page.click(f"{REPLY} button")
    assert page.wait_for("window.copied") == first
    page.click("#copy-all")
    assert page.wait_for("window.copied.startsWith('You: One') && window.copied").count("You: ") == 2
    page.run("navigator.clipboard.writeText = () => Promise.reject()")
    page.run("document.execCommand = (what) => { window.copied = [what, document.activeElement.value]; return true }")
    page.click("article.user button")
    assert page.wait_for("Array.isArray(window.copied) && window.copied") == ["copy", "One"]
    page.click("#new")
    assert page.run("document.querySelectorAll('article').length") == 0
    page.open(url)
    assert page.run("document.querySelectorAll('article').length") == 0
    assert page.run("document.querySelector('[name=max_tokens]').value") == "12", "the settings are gone"


def test_stop_ends_the_reply_here_and_on_the_server(page: Browser, url: str) -> None:
    choose(page, temperature=0)
    page.open(url)
    ended = _aborted(url)
    say(page, "Count")
    page.wait_for(f"document.querySelector('{REPLY} > .said')?.textContent.length > 200")
    page.click("#stop")
    page.wait_for(f"document.querySelector('{REPLY} .note')?.textContent === 'stopped'")
    kept = page.run(f"document.querySelector('{REPLY} > .said').textContent")
    end = time.monotonic() + 20
    while json.loads(fetched(url + "stats"))["pages"]["used"] or _aborted(url) == ended:
        assert time.monotonic() < end, "the server goes on"
        time.sleep(0.1)
    assert len(kept) < 10000 and page.run("document.activeElement.id") == "message"
    say(page, "Count again")
    page.wait_for("document.querySelectorAll('article').length === 4 && !document.querySelector('#stop').hidden")
    page.press("Escape")
    page.wait_for("!document.querySelector('#send').hidden")
    # A reply of which nothing came is undone; of this one something may have come.
    assert page.run("document.querySelectorAll('article').length + document.querySelector('#message').value.length") > 3


def _aborted(url: str) -> float:
    lines = [line for line in fetched(url + "metrics").splitlines() if line.startswith("edge_requests_total")]
    return sum(float(line.split()[-1]) for line in lines if 'finish_reason="abort"' in line)


@contextmanager
def others_busy(url: str) -> Iterator[None]:
    """Requests of somebody else, one after the other, until the block ends."""
    body = json.dumps({"prompt": "a", "n": 2, "max_tokens": 2000, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}v1/completions", body, {"Content-Type": "application/json"})
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            urllib.request.urlopen(request, timeout=60).read()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        done.set()
        asking.join()


def test_charts_show_what_stats_says(page: Browser, url: str) -> None:
    choose(page, temperature=0, max_tokens=4000)
    page.open(url)
    page.run(SPY)
    page.run(WITNESS)
    say(page, "Run")
    with others_busy(url):  # one reply of a tiny model is over before the page looks
        page.wait_for("saw.running && saw.described && saw.rate > 1")
    page.press("Escape")
    page.wait_for("document.querySelectorAll('#figures figure')[2].querySelector('strong').textContent === '0'")
    figures = page.run("""[...document.querySelectorAll("#figures figure:not([hidden])")].map((figure) => ({
      heading: figure.querySelector("figcaption").innerText, text: figure.querySelector("desc").textContent,
      title: figure.querySelector("title").textContent, paths: figure.querySelectorAll("path, rect").length,
      labels: [...figure.querySelectorAll("svg text")].map((text) => text.textContent),
      lost: [...figure.querySelectorAll("svg text")].filter((text) => {
        const box = text.getBoundingClientRect(), all = figure.getBoundingClientRect();
        return box.left < all.left - 1 || box.right > all.right + 1 || !box.width;
      }).length,
    }))""")
    assert [f["title"].split(",")[0] for f in figures[:4]] == ["Decode", "Prefill", "KV cache", "Load"]
    assert all(f["paths"] and f["text"] and f["labels"] and not f["lost"] for f in figures), figures
    assert all("seconds" in f["labels"] and "now" in f["labels"] for f in figures[:4])
    stats = json.loads(fetched(url + "stats"))
    assert f"cached: {stats['pages']['cached']} now" in figures[2]["text"]
    memory = figures[4]
    for line in stats["memory"]["lines"]:
        if line["where"] == "memory" and line["planned"]:
            assert line["name"] in memory["labels"] and f"{line['name']}: " in memory["text"]
    planned = next(line["planned"] for line in stats["memory"]["lines"] if line["name"] == "kv cache")
    assert any(label.endswith(f"of {planned / 2**20:g} MiB") for label in memory["labels"])
    page.run("document.querySelector('#tables').parentElement.open = true")
    assert str(stats["tokens"]["reply"]) in page.wait_for("document.querySelector('#tables').innerText").replace(
        ",", ""
    )


def test_nobody_looks_nobody_asks(page: Browser) -> None:
    page.wait_for("window.polls > 1")
    for hide, show in (
        ("document.querySelector('#toggle').click()",) * 2,
        (_visible(False), _visible(True)),
    ):
        page.run(hide)
        time.sleep(0.3)
        before = page.run("window.polls")
        time.sleep(2.2)
        assert page.run("window.polls") == before
        page.run(show)
        page.wait_for(f"window.polls > {before}")


def _visible(is_visible: bool) -> str:
    hidden = json.dumps(not is_visible)
    return (
        f"Object.defineProperty(document, 'hidden', {{value: {hidden}, configurable: true}});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )


def test_the_keyboard_is_enough(page: Browser) -> None:
    page.run("document.activeElement.blur()")
    page.press("Tab")
    assert page.run("document.activeElement.className") == "skip"
    page.press("Enter")
    page.press("Tab")  # from the field that the link leads to
    page.press("Tab", shift=True)
    assert page.run("document.activeElement.id") == "message"
    page.type("Hello")
    page.press("Tab")
    assert page.run("document.activeElement.id") == "send"
    page.press(" ")
    page.wait_for(DONE)
    assert page.run("document.activeElement.id") == "message"
    page.run("document.activeElement.blur(); document.querySelectorAll('details').forEach(d => d.open = true)")
    reached = set()
    for _ in range(60):
        page.press("Tab")
        seen = page.run("""(() => {
          const e = document.activeElement, style = getComputedStyle(e);
          if (!e.dataset.seen) e.dataset.seen = Math.random();
          const outline = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
          return [e.dataset.seen, e.tagName, outline];
        })()""")
        assert seen[2] or seen[1] == "BODY", seen
        reached.add(seen[0])
    missed = page.run("""[...document.querySelectorAll("a, button, input, select, textarea, summary, [tabindex]")]
      .filter(e => e.checkVisibility() && !e.dataset.seen).map(e => e.outerHTML)""")
    assert missed == [] and len(reached) > 20


def test_a_screen_reader_finds_its_way(page: Browser) -> None:
    say(page, "Hello")
    page.wait_for(DONE)
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for("document.querySelectorAll('#tables table').length")
    found = page.accessibility()
    roles = {role for role, _ in found}
    assert {"banner", "main", "complementary", "region", "article", "status", "table"} <= roles
    for role in ("button", "textbox", "spinbutton", "combobox", "image", "link", "DisclosureTriangle"):
        names = [name for r, name in found if r == role]
        assert all(names), (role, names)
    assert (
        ("group", "Conversation") in found
        and ("button", "Send") in found
        and ("textbox", "Message") in found
        and ("heading", "Decode") in found
    )
    assert page.run("document.documentElement.lang") == "en"
    levels = page.run("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_both_schemes_and_fits_a_phone(page: Browser, scheme: str) -> None:
    page.prefer(color_scheme=scheme)
    say(page, "Hello " + "x" * 300)
    page.wait_for(DONE)
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.run("document.querySelector('#error').textContent = 'Something went wrong.'")
    page.run("document.querySelector('#key-form').hidden = false")
    page.wait_for("document.querySelectorAll('#tables table').length")
    lowest, text, count = page.run(CONTRAST)
    assert lowest >= 4.5 and count > 60, (lowest, text, count)
    is_dark = page.run("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]) < 128")
    assert is_dark == (scheme == "dark")
    for width in (360, 700, 1000, 1600):
        page.resize(width, 740)
        page.run("new Promise(requestAnimationFrame)")
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), f"{width} px are too few"
        assert page.run("document.querySelector('#send').getBoundingClientRect().right <= innerWidth")


def test_nothing_moves_for_those_who_want_it_so(page: Browser, url: str) -> None:
    choose(page, temperature=0)
    for preference, moving in (("no-preference", 1), ("reduce", 0)):
        page.prefer(reduced_motion=preference)
        page.open(url)
        say(page, "Go")
        page.wait_for(f"document.querySelector('{REPLY} > .said')?.textContent.length > 100")
        assert page.run("document.getAnimations({subtree: true}).length") == moving
        page.click("#new")
        page.wait_for("!document.querySelector('#send').hidden")


def test_refusals_are_one_sentence_and_lose_nothing(page: Browser, url: str) -> None:
    choose(page, max_tokens=100000)
    page.open(url)
    say(page, "Keep me")
    page.wait_for("document.querySelector('#error').textContent")
    assert "the context is limited to 4096" in page.text("#error") and page.text("#error").endswith(".")
    assert page.run("document.querySelector('#message').value") == "Keep me"
    assert page.run("document.querySelectorAll('article').length") == 0
    assert page.run("document.querySelector('#error').getAttribute('role')") == "alert"
    choose(page, temperature=-1)
    page.open(url)
    say(page, "Keep me")
    assert page.run("document.querySelector('#settings').open && document.activeElement.name") == "temperature"
    page.problems[:] = [problem for problem in page.problems if "status of 400" not in problem]


def test_a_key_is_asked_for_and_a_server_that_ends_is_noticed(bundle: Path, browser: Browser) -> None:
    # Room for a reply that is not over before the server is stopped.
    with started(bundle, "--api-key", "sésame", context=4096) as (process, port):
        url = f"http://127.0.0.1:{port}/"
        with urllib.request.urlopen(url, timeout=30) as response:
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        browser.resize(1280, 800)
        browser.addresses.clear()
        browser.open(url)
        browser.wait_for("!document.querySelector('#key-form').hidden && document.activeElement.id === 'key'")
        assert "key is missing or wrong" in browser.text("#error")
        browser.run(FIRST_ANSWER_LATE)
        for key in ("wrong", "sésame"):
            browser.run("document.querySelector('#key').value = ''; document.querySelector('#key').focus()")
            browser.type(key)
            browser.press("Enter")
        browser.wait_for("document.activeElement.id === 'message'")
        browser.run("window.letThrough()")  # the refusal of the first key, when the second has been taken
        assert browser.run("document.querySelector('#key-form').hidden && document.activeElement.id === 'message'")
        assert not browser.text("#error")
        browser.wait_for("document.querySelector('#figures strong').textContent !== '–'")
        browser.run("document.querySelector('[name=temperature]').value = 0")
        say(browser, "Hello")
        browser.wait_for(f"document.querySelector('{REPLY} > .said')?.textContent.length > 100")
        process.kill()
        browser.wait_for("document.querySelector('#error').textContent")
        assert browser.text("#error") == "The reply broke off; the server may have been stopped."
        assert browser.text(f"{REPLY} .note") == "broken off"
        say(browser, "Still there?")
        browser.wait_for("document.querySelector('#error').textContent.startsWith('The server does not answer')")
        assert {address.split("?")[0].rsplit("/", 1)[0] + "/" for address in browser.addresses} <= {
            url,
            url + "v1/",
            url + "v1/chat/",
        }
        browser.problems.clear()


QUESTIONS = ("Why is the sky blue? Answer in two sentences.", "And at sunset?")


def take_screenshots(browser: Browser, bundle: Path, folder: Path, questions: Sequence[str] = QUESTIONS) -> None:
    """serve-light.png and serve-dark.png of a chat, in the folder."""
    with started(bundle, "--speculative", "lookup", "--memory", "1GiB", context=1024) as (_, port):
        url = f"http://127.0.0.1:{port}/"
        browser.resize(1280, 920)
        browser.open(url)
        choose(browser, temperature=0, max_tokens=80)
        browser.open(url)
        browser.wait_for("document.querySelector('#model').textContent")
        for number, question in enumerate(questions, 1):
            say(browser, question)
            browser.wait_for(f"document.querySelectorAll('article').length === {2 * number} && {DONE}", 120)
            time.sleep(2)
        # Until memory has been measured after the last reply.
        age = "(await (await fetch('stats')).json()).memory.age"
        browser.wait_for(f"(async () => {age} > 4.5)()")
        browser.wait_for(f"(async () => {age} < 2)()")
        for scheme in ("light", "dark"):
            browser.prefer(color_scheme=scheme)
            file, pixels = folder / f"serve-{scheme}.png", browser.screenshot()
            assert (pixels.mean() < 128) == (scheme == "dark") and pixels.std() > 5
            write_png(pixels, file)
            assert 10_000 < file.stat().st_size < 150_000


def test_screenshots(browser: Browser, tmp_path: Path, bundle: Path, request: pytest.FixtureRequest) -> None:
    """With EDGE_SCREENSHOTS=FOLDER those of the documentation, of a real model, are put into that folder."""
    folder = os.environ.get("EDGE_SCREENSHOTS")
    if folder is None:
        take_screenshots(browser, bundle, tmp_path, ["Hello"])
        return
    from build_engine.export import ExportOptions, export_bundle

    made = export_bundle(request.getfixturevalue("smollm2"), tmp_path / "SmolLM2-135M", ExportOptions())
    take_screenshots(browser, made, Path(folder))
