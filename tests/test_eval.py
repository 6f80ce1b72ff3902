"""`edge eval`: replies are scored as RULER does, a haystack is computed once, the report says what happened."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_engine.checkpoint import Checkpoint, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.cli.app import run_command
from edge.config import SparseConfig
from edge.engine import TokenEvent, open_engine
from edge.eval.languages import ENGLISH
from edge.eval.report import Answer, EvalReport, percent, results, wilson
from edge.eval.run import ask, find_references, measure_perplexity, prompt_encoder, run_eval
from edge.eval.tasks import HaystackPlan, make_haystacks
from edge.perplexity import perplexity
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.text import TextSettings, Tokenizer
from tests.bench_samples import HERE, Page, plots
from tests.command import edge
from tests.eval_samples import PAIR, recall_tokenizer, settings_of
from tests.synthetic import tiny_config, write_hf_checkpoint

# ---- scoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "references", "found"),
    [
        (" 1234567.", ["1234567"], [True]),
        ("It is 12345678", ["1234567"], [False]),
        ("x1234567", ["1234567"], [False]),
        ("**1234567**, 7654321", ["1234567", "7654321", "1111111"], [True, True, False]),
        ("vars: abcde, XYZAB", ["ABCDE", "XYZ"], [True, False]),
        ("v3 v19", ["v19", "v3", "v1"], [True, True, False]),
        ("", ["a"], [False]),
        ("a(b", ["(b"], [False]),
    ],
)
def test_references_are_found_as_whole_words(reply: str, references: list[str], found: list[bool]) -> None:
    assert list(find_references(reply, references)) == found


@pytest.mark.parametrize(
    ("successes", "number", "published"),
    # Newcombe 1998, table I, method 3
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_intervals_match_the_published_ones(successes: int, number: int, published: tuple[float, float]) -> None:
    assert wilson(successes / number, number) == pytest.approx(published, abs=6e-5)
    low, high = wilson(1 - successes / number, number)
    assert (1 - high, 1 - low) == pytest.approx(published, abs=6e-5)


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_wilson_intervals_hold_the_mean(mean: float, number: int) -> None:
    low, high = wilson(mean, number)
    assert 0 <= low <= mean + 1e-11 and mean - 1e-11 <= high <= 1
    assert wilson(0.0, number)[0] == 0 and wilson(1.0, number)[1] == 1


def test_a_hundred_percent_means_every_one() -> None:
    assert [percent(x) for x in (0.0, 0.001, 0.994, 0.999, 1.0, None)] == ["0", "1", "99", "99", "100", "-"]


# ---- asking -------------------------------------------------------------------------------------------------------


@dataclass
class ShortSightedSession:
    """Reads the prompt and answers rightly, but knows only the first half of the haystack."""

    tokenizer: Tokenizer
    closed: bool = False

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[TokenEvent]:
        assert params.temperature == 0
        if progress is not None:
            progress(len(prompt_ids), len(prompt_ids))
        message = self.tokenizer.decode(prompt_ids)
        key = re.search(r"What is the special magic number for (\S+) mentioned", message)
        haystack = message[message.index("afterwards.\n") : message.rindex("What is")]
        assert key is not None
        values = [m[2] for m in PAIR.finditer(haystack) if m[1] == key[1] and m.start() < len(haystack) / 2]
        for token in self.tokenizer.encode(" ".join(values) or "none", add_bos=False):
            yield TokenEvent(token, None)
        yield TokenEvent(self.tokenizer.encode("0", add_bos=False)[0], "stop")  # no part of the reply

    def close(self) -> None:
        self.closed = True


@dataclass
class ShortSightedEngine:
    tokenizer: Tokenizer
    sessions: list[ShortSightedSession]

    def open_session(self) -> ShortSightedSession:
        self.sessions.append(ShortSightedSession(self.tokenizer))
        return self.sessions[-1]


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Path) -> Tokenizer:
    engine = open_engine(tiny_bundle, EngineOptions(context=64))
    return Tokenizer.load(tiny_bundle, TextSettings.from_dict(engine.bundle.manifest.text or {}))


def test_scores_by_depth_show_where_a_model_is_blind(tokenizer: Tokenizer) -> None:
    plan = HaystackPlan((3000, 4000), depths=4, samples=8, questions_per_haystack=4)
    encode = prompt_encoder(tokenizer, chat=True)
    engine = ShortSightedEngine(tokenizer, [])
    told: list[tuple[int, int, str]] = []
    haystacks = list(make_haystacks("niah_single", ENGLISH, encode, plan))
    answers = ask(engine, haystacks, encode, tokenizer.decode, lambda *call: told.append(call))

    rows = results(EvalReport(settings_of(plan), HERE, {}, answers))
    assert [(row.length, row.questions, row.score) for row in rows] == [(3000, 8, 0.5), (4000, 8, 0.5)]
    for row in rows:
        assert [(cell.score, cell.count) for cell in row.cells] == [(1.0, 2), (1.0, 2), (0.0, 2), (0.0, 2)]
        assert row.interval == wilson(0.5, 8)
    assert [answer.prefill for answer in answers] == [True, False, False, False] * 4
    assert len(engine.sessions) == 4 and all(session.closed for session in engine.sessions)
    done = [call[0] for call in told]
    assert done == sorted(done) and done[-1] == told[0][1]


def test_a_score_counts_the_references_found() -> None:
    def answer(depths: tuple[float, ...], found: tuple[bool, ...], prefill: bool, seconds: float) -> Answer:
        references = tuple("abcd"[: len(found)])
        return Answer("niah_multivalue", 100, 0, "key", references, depths, found, "", 80, prefill, seconds)

    plan = HaystackPlan((100,), depths=2, samples=2)
    first = answer((0.1, 0.3, 0.6, 1.0), (True, True, True, False), True, 2.0)
    second = answer((0.2, 0.4, 0.5, 0.9), (False,) * 4, False, 0.1)
    (row,) = results(EvalReport(settings_of(plan), HERE, {}, (first, second)))
    assert row.score == pytest.approx(0.375)
    assert [(cell.low, cell.high, cell.score, cell.count) for cell in row.cells] == [
        (0, 0.5, 0.5, 4),
        (0.5, 1, 0.25, 4),
    ]
    assert row.prefill_tok_s == 40


def test_a_haystack_is_computed_once_and_the_replies_are_those_of_a_fresh_cache(
    tiny_bundle: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(tiny_bundle, EngineOptions(context=2000))
    plan = HaystackPlan((2000,), samples=3)
    step, computed = engine.executor.step, list[int]()

    def counting(batch: Any) -> Any:
        computed.append(len(batch.input_ids))
        return step(batch)

    monkeypatch.setattr(engine.executor, "step", counting)
    report = run_eval(engine, tokenizer, settings_of(plan))
    assert sum(computed) < 2000 + 2 * 400  # three haystacks would be 6000

    encode = prompt_encoder(tokenizer, chat=True)
    (haystack,) = make_haystacks("niah_single", ENGLISH, encode, plan)
    for question, answer in zip(haystack.questions, report.answers, strict=True):
        prompt = encode(*haystack.prompt(question))
        events = list(engine.generate(prompt, SamplingParams(max_tokens=haystack.reply_tokens)))
        assert tokenizer.decode(e.token_id for e in events if e.finish_reason != "stop") == answer.reply
        assert answer.prompt_tokens == len(prompt)


def test_perplexity_is_that_of_the_library(tiny_bundle: Path) -> None:
    engine = open_engine(tiny_bundle, EngineOptions(context=64))
    ids = [(7 * i * i + i) % 300 for i in range(101)]
    for window in (2, 20, 25, 64):  # 20 and 25 leave one token for the last window
        result = measure_perplexity(engine, ids, window, "text")
        assert result.perplexity == pytest.approx(perplexity(engine, ids, window), rel=1e-9)
        assert result.scored == 101 - -(-101 // window)
        assert len(result.windows) == -(-100 // window)


# ---- the command --------------------------------------------------------------------------------------------------


def test_table_json_and_page_tell_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 4)
    tasks = "niah_single,niah_multikey,variable_tracking,perplexity"
    arguments = ["--tasks", tasks, "--lengths", "2000,1500", "--samples", 2, "--questions-per-haystack", 1]
    files = ["--html", tmp_path / "r.html", "--output", tmp_path / "r.json"]
    result = edge(
        "eval", tiny_bundle, *arguments, "--depths", 2, "--file", tmp_path / "text.txt", "--window", 50, *files
    )
    assert result.returncode == 0, result.stderr
    table = result.stdout.decode()
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["schema_version"] == 1
    assert report["settings"]["prompt"] == "chat"
    rows = report["results"]
    assert [(row["task"], row["length"]) for row in rows] == [
        (task, length) for task in tasks.split(",")[:3] for length in (1500, 2000)
    ]
    for row in rows:
        assert f"{row['task']:17} {row['length']:7,}" in table
    answers = report["answers"]
    assert len(answers) == 12
    assert {answer["score"] for answer in answers} == {0.0}  # a random model knows nothing
    assert f"Perplexity of text.txt: {report['perplexity']['perplexity']:.4f}" in table
    assert "\x1b" not in table
    assert max(map(len, table.splitlines()[3:-1])) <= 80

    page = Page((tmp_path / "r.html").read_text())
    assert not [url for url in page.attribute("src") + page.attribute("href") if url != "data:,"]
    assert f"{report['perplexity']['perplexity']:.4f}" in "".join(page.texts)
    maps = plots((tmp_path / "r.html").read_text())[:3]
    assert [len([e for e in plot.iter() if e.get("class") == "cell"]) for plot in maps] == [4, 4, 4]
    same = edge("eval", tiny_bundle, *arguments[2:], "--tasks", "niah_single", "--depths", 2, "--json")
    assert [a["reply"] for a in json.loads(same.stdout)["answers"]] == [a["reply"] for a in answers[:4]]


WRONG = {
    "unknown task": (["--tasks", "niah_triple"], 2, "choose from niah_single, niah_multikey"),
    "lengths that are none": (["--lengths", "4096,long"], 2, "no list of whole numbers"),
    "a length without a haystack": (["--lengths", "200"], 2, "200 tokens are too short for niah_single"),
    "a negative length": (["--lengths", "900,-5"], 2, "a length below 1"),
    "a length over the context": (
        ["--lengths", "2000", "--context", "1000"],
        2,
        "--lengths 2000 is over the --context",
    ),
    "a window over the context": (
        ["--tasks", "perplexity", "--file", "TEXT", "--window", "99", "--context", "9"],
        2,
        "--window 99 is over the --context of 9",
    ),
    "a length over the memory": (["--lengths", "2000", "--memory", "10MB"], 1, "--memory"),
    "no samples": (["--samples", "0"], 2, "'--samples'"),
    "no depths": (["--depths", "0"], 2, "'--depths'"),
    "no questions": (["--questions-per-haystack", "0"], 2, "'--questions-per-haystack'"),
    "perplexity of nothing": (["--tasks", "perplexity"], 2, "give --file"),
    "perplexity of one token": (["--tasks", "perplexity", "--file", "LETTER"], 2, "2 tokens or more"),
    "a text for no task": (["--tasks", "niah_single", "--file", "TEXT"], 2, "add it to --tasks"),
    "no such text": (["--tasks", "perplexity", "--file", "/nowhere"], 2, "cannot read /nowhere (No such file"),
    "a text that is none": (["--tasks", "perplexity", "--file", "BINARY"], 2, "is not UTF-8"),
    "no such haystack": (["--haystack", "/nowhere"], 2, "cannot read /nowhere"),
    "an empty haystack": (["--haystack", "EMPTY"], 2, "holds no text"),
    "unknown language": (["--language", "latin"], 2, "choose from english, recall"),
    "a task the language lacks": (["--language", "recall", "--tasks", "variable_tracking"], 2, "not available"),
    "filler for the wrong language": (["--language", "recall", "--haystack", "TEXT"], 2, "drop it"),
    "a report in no folder": (["--html", "/nowhere/r.html"], 2, "/nowhere is no folder"),
    "sparse attention of a dense bundle": (["--attention", "sparse"], 2, "dense attention only"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_sentence(
    case: str, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    contents = {"TEXT": b"Some text. " * 9, "LETTER": b"T", "BINARY": b"\xff\xfe\x00", "EMPTY": b" \n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    options, code, words = WRONG[case]
    outputs = [] if "--html" in options else ["--html", str(tmp_path / "r.html"), "--output", str(tmp_path / "r.json")]
    arguments = [str(tmp_path / option) if option in contents else option for option in options]
    result = run_command(["eval", str(tiny_bundle), *arguments, *outputs], debug=False)
    stdout, stderr = capfd.readouterr()
    assert result == code, stderr
    assert words in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == set(contents)


def test_a_vocabulary_of_the_recall_words_is_asked_in_them(tmp_path: Path) -> None:
    checkpoint = write_hf_checkpoint(tmp_path / "checkpoint", tiny_config(tie_word_embeddings=False), tokenizer=True)
    recall_tokenizer().save(str(checkpoint / "tokenizer.json"))
    bundle = export_bundle(open_checkpoint(checkpoint), tmp_path / "bundle")
    result = edge("eval", bundle, "--lengths", 500, "--samples", 3, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["settings"]["language"], report["settings"]["prompt"]) == ("recall", "raw")
    assert report["settings"]["tasks"] == ["niah_single", "niah_multikey", "niah_multivalue"]
    for answer in report["answers"]:
        words = len(answer["references"])
        assert words == (8 if answer["task"] == "niah_multivalue" else 2)
        assert answer["prompt_tokens"] + words == 500
        assert len(answer["reply"].split()) <= words


def test_sparse_attention_is_used_and_told(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=False, sparse=SparseConfig(topk=3, window_size=128, dense_len=-1))
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "checkpoint", config, tokenizer=True))
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportOptions(weights=WeightFormat("exact")))
    replies = {}
    for options in ("--attention dense", "--attention sparse", "--sparse topk=2", "--sparse topk=90"):
        arguments = ["--tasks", "niah_single", "--lengths", 1500, "--samples", 3]
        result = edge("eval", bundle, *arguments, *options.split(), "--output", tmp_path / "r.json")
        report = json.loads((tmp_path / "r.json").read_text())
        replies[options] = [answer["reply"] for answer in report["answers"]]
        topk = {"--attention dense": None, "--sparse topk=2": 2, "--sparse topk=90": 90}.get(options, 3)
        told = "dense attention" if topk is None else f"sparse attention (topk {topk}, window_size 128)"
        assert told in result.stdout.decode()
        assert (report["settings"]["sparse"] or {"topk": None})["topk"] == topk
    assert replies["--attention dense"] == replies["--sparse topk=90"]  # which selects every block
    assert len({tuple(reply) for reply in replies.values()}) == 3


def test_a_bundle_without_a_tokenizer_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "checkpoint", tiny_config()))
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    assert run_command(["eval", str(bundle), "--lengths", "600"], debug=False) == 2
    assert "holds no tokenizer" in capfd.readouterr().err


def test_stopping_leaves_one_word_and_no_report(tiny_bundle: Path, tmp_path: Path) -> None:
    code = f"""
import itertools, os, sys, time
import edge.executors.onnxruntime as o
step, count = o.OnnxRuntimeExecutor.step, itertools.count()
def stop(*arguments):
    if next(count) < 6:
        return step(*arguments)
    os.kill(os.getpid(), {int(signal.SIGINT)})
    time.sleep(10)
o.OnnxRuntimeExecutor.step = stop
sys.argv = {["edge", "eval", str(tiny_bundle), "--lengths", "2000", "--output", str(tmp_path / "r.json")]!r}
from edge.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (1, b"", b"interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("columns", ["80", "40"])
def test_help_fits_the_terminal(columns: str) -> None:
    text = edge("eval", "--help", COLUMNS=columns, NO_COLOR="1", TERM="dumb").stdout.decode()
    assert max(map(len, text.splitlines())) <= int(columns)
    assert "edge eval bundle" in " ".join(text.split())


# ---- a real model -------------------------------------------------------------------------------------------------


def test_a_real_model_finds_needles_in_a_short_text(smollm2: Checkpoint, tmp_path: Path) -> None:
    export_bundle(smollm2, tmp_path / "bundle")
    options = ["--tasks", "niah_single", "--lengths", 384, "--samples", 5, "--questions-per-haystack", 1]
    report = json.loads(edge("eval", tmp_path / "bundle", *options, "--json").stdout)
    assert report["results"][0]["score"] >= 0.8, [answer["reply"] for answer in report["answers"]]
    assert [cell["count"] for cell in report["results"][0]["cells"]] == [1] * 5
