"""`edge bench compare` and `edge bench --peer` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge.bench.compare.comparison import (
    load_sides,
)
from edge.bench.report import to_json as report_json
from edge.cli.app import run_command
from tests import peer_samples
from tests.bench_samples import pair, sample_report


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Reports old, new, and slow (new's inverse: old's cases with new's name), and a peer's results."""
    forth = pair()
    places = {}
    for side in forth.sides:
        (tmp_path / f"{side.name}.json").write_text(report_json(side.first), encoding="utf-8")
        places[side.name] = str(tmp_path / f"{side.name}.json")
    places["peer"] = str(tmp_path / "llama.csv")
    Path(places["peer"]).write_text(peer_samples.LLAMA_CSV, encoding="utf-8")
    return places


def edge(*words: str) -> int:
    return run_command(["bench", *words], debug=False)


def test_compare_prints_and_writes_every_form(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = {name: str(tmp_path / name) for name in ("c.html", "c.md", "c.json")}
    options = ["--html", forms["c.html"], "--markdown", forms["c.md"], "--output", forms["c.json"]]
    assert edge("compare", files["old"], f"fresh={files['new']}", "--peer", f"rival={files['peer']}", *options) == 0
    said = capsys.readouterr().out
    assert "fresh against old" in said and "faster" in said and "rival" in said
    assert "fresh against old" in Path(forms["c.html"]).read_text() and "rival" in Path(forms["c.md"]).read_text()
    assert edge("compare", files["old"], f"fresh={files['new']}", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["rows"] == json.loads(Path(forms["c.json"]).read_text())["rows"]


def test_fail_if_slower_decides_the_exit_code(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert edge("compare", files["old"], files["new"], "--fail-if-slower", "0") == 0
    assert edge("compare", files["new"], files["old"], "--fail-if-slower", "30") == 0
    capsys.readouterr()
    assert edge("compare", files["new"], files["old"], "--fail-if-slower", "20") == 1
    out, err = capsys.readouterr()
    assert "old against new" in out, "the table is printed before it fails"
    assert err.startswith("error: slower by more than 20 %: old at decode of 128+61 (0.750, ")


def test_runs_joined_by_commas_are_one_side(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = files["old"], files["new"]
    assert edge("compare", f"before={old},{old},{old}", f"after={new},{new}", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert [side["runs"] for side in values["sides"]] == [3, 2]
    assert {tuple(row["samples"]) for row in values["rows"]} == {(3, 2)}


WRONG = {
    "nothing": ([], 2, "Missing argument"),
    "one report": (["OLD"], 2, "there is nothing to compare with"),
    "one report twice": (["OLD", "OLD"], 2, "two sides are named"),
    "no file": (["OLD", "/nowhere.json"], 1, "cannot read the report /nowhere.json"),
    "no report": (["OLD", "PEER"], 1, "is not a benchmark report"),
    "no peer": (["OLD", "NEW", "--peer", "/nowhere"], 1, "cannot read the result /nowhere"),
    "html in no folder": (["OLD", "NEW", "--html", "/nowhere/x.html"], 2, "/nowhere is no folder"),
    "a share below 0": (["OLD", "NEW", "--fail-if-slower", "-1"], 2, "--fail-if-slower"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_sentence(
    case: str, files: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, code, words = WRONG[case]
    places = {name.upper(): path for name, path in files.items()}
    assert edge("compare", *(places.get(word, word) for word in arguments)) == code
    out, err = capsys.readouterr()
    assert words in err and err.startswith("error: ") and err.count("\n") == 1 and out == ""


def test_names_are_file_names_or_as_much_of_the_path_as_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("orin/report.json", "rtx/report.json", "a=b.json"):
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).write_text(report_json(sample_report()), encoding="utf-8")
    assert [side.name for side in load_sides(["orin/report.json", "rtx/report.json"])] == ["orin/report", "rtx/report"]
    assert [side.name for side in load_sides(["a=b.json", "x = y=orin/report.json"][:1])] == ["a=b"]
    assert [side.name for side in load_sides(["x=a=b.json", "rtx/report.json"])] == ["x", "report"]


def test_bench_is_still_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options in any place, a folder named compare by ./compare; its help shows both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compare").mkdir()
    for words in (["./compare", "--repeat", "1"], ["--repeat", "1", "./compare"]):
        assert edge(*words) == 2
        assert "compare has no manifest.json" in capsys.readouterr().err
    assert edge("one", "two") == 2
    assert "unexpected extra argument" in capsys.readouterr().err
    assert edge() == 2
    assert "no bundle to measure" in capsys.readouterr().err
    assert edge("--help") == 0
    said = capsys.readouterr().out
    assert (
        "--contexts" in said
        and "compare" in said.split("Commands")[1]
        and "Usage: edge bench [OPTIONS] [BUNDLE]" in said
    )
    assert edge("compare", "--help") == 0
    assert "Usage: edge bench compare [OPTIONS]" in capsys.readouterr().out


def test_a_bundles_report_holds_its_peers(
    tiny_bundle: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_bundle), "--contexts", "16", "--new-tokens", "4", "--repeat", "1", "--peer", files["peer"]]
    assert edge(*words, "--peer", f"mine={files['old']}", "--json") == 0
    peers = json.loads(capsys.readouterr().out)["peers"]
    assert {peer["name"] for peer in peers} == {"llama.cpp qwen2 7B Q4_K - Medium", "mine"}
    assert peers[0]["source"].endswith("llama.csv")
    assert edge(str(tiny_bundle), "--peer", "/nowhere") == 1


def test_an_option_that_differs_is_named(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reports as they are written; prompts are the same, so nothing warns of them."""
    files = [str(tmp_path / f"chunk{chunk}.json") for chunk in (8, 16)]
    for file, chunk in zip(files, ("8", "16"), strict=True):
        words = ["--contexts", "16,24", "--new-tokens", "4", "--repeat", "2", "--no-gate", "--chunk", chunk]
        assert edge(str(tiny_bundle), *words, "--output", file) == 0
    capsys.readouterr()
    assert edge("compare", *files, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert {"name": "engine: chunk", "values": ["8 tokens", "16 tokens"]} in values["differences"]
    assert not [said for said in values["warnings"] if "prompts" in said]
    assert len(values["rows"]) == 4 and all(row["p"] is not None for row in values["rows"])
    changed = json.loads(Path(files[1]).read_text())
    changed["cases"][0]["prompts_sha256"] = "0" * 64
    Path(files[1]).write_text(json.dumps(changed))
    assert edge("compare", *files, "--json") == 0
    warning = "chunk16 read other prompts than chunk8 at 16+4: not comparable."
    assert warning in json.loads(capsys.readouterr().out)["warnings"]
