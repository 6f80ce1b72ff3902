"""The command as a stranger meets it: in a process of its own, judged by its exit code and its words."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge.cli.options import parse_size
from edge.errors import UsageError
from tests.synthetic import tiny_config, write_hf_checkpoint

EDGE = [sys.executable, "-m", "edge"]


def edge(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [*EDGE, *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "80", **environment}
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a tokenizer."""
    return write_hf_checkpoint(tmp_path_factory.mktemp("cli") / "checkpoint", tiny_config())


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.arange(20))
    return tmp_path / "ids.npy"


def test_export_run_bench_and_logits_agree_on_a_bundle(checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    source = tiny_bundle.parent / "checkpoint"
    exported = edge("export", source, "--out", tmp_path / "bundle", "--weights", "exact", "--json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["weights"]["description"] == "exact"
    answer = edge("run", tmp_path / "bundle", "--prompt", "hello", "--max-tokens", 8)
    as_json = edge("run", tmp_path / "bundle", "--max-tokens", 8, "--json", stdin=b"hello")
    assert answer.returncode == as_json.returncode == 0, as_json.stderr
    assert json.loads(as_json.stdout)["text"] == answer.stdout.decode().removesuffix("\n")
    report = edge("bench", tmp_path / "bundle", "--contexts", "16", "--new-tokens", 4, "--repeat", 1, "--json")
    assert json.loads(report.stdout)["cases"][0]["case"] == {"prompt_tokens": 16, "new_tokens": 4}


WRONG = {
    "nothing": ([], 2, ""),
    "unknown command": (["fly"], 2, "No such command"),
    "unknown option": (["run", "BUNDLE", "--wings"], 2, "No such option"),
    "missing option": (["export", "CHECKPOINT"], 2, "--out"),
    "not a number": (["run", "BUNDLE", "--prompt", "x", "--top-k", "many"], 2, "--top-k"),
    "no such checkpoint": (["export", "/nowhere", "--out", "OUT"], 2, "/nowhere does not exist"),
    "no such bundle": (["run", "/nowhere", "--prompt", "x"], 2, "not a folder"),
    "a checkpoint where a bundle belongs": (["run", "CHECKPOINT", "--prompt", "x"], 2, "edge export"),
    "a bundle where a checkpoint belongs": (["export", "BUNDLE", "--out", "OUT"], 2, "config.json"),
    "empty prompt": (["run", "BUNDLE", "--prompt", "  "], 2, "the prompt is empty"),
    "two prompts": (["run", "BUNDLE", "--prompt", "x", "--file", "IDS"], 2, "choose one"),
    "a folder as prompt": (["run", "BUNDLE", "--file", "/"], 2, "cannot read /"),
    "a prompt that is no text": (["run", "BUNDLE", "--file", "BINARY"], 2, "not UTF-8"),
    "negative temperature": (["run", "BUNDLE", "--prompt", "x", "--temperature", "-1"], 2, "temperature is -1"),
    "no size": (["run", "BUNDLE", "--prompt", "x", "--memory", "lots"], 2, "is no size"),
    "too little memory": (["run", "BUNDLE", "--prompt", "x", "--memory", "10MB"], 1, "raise --memory"),
    "too long a prompt": (["run", "BUNDLE", "--prompt", "long " * 300, "--context", "64"], 1, "limited to 64"),
    "unknown weights": (["export", "CHECKPOINT", "--out", "OUT", "--weights", "w3"], 2, "choose exact or w4a16"),
    "unknown target": (["export", "CHECKPOINT", "--out", "OUT", "--target", "abacus"], 2, "onnxruntime or rtx"),
    "existing out": (["export", "CHECKPOINT", "--out", "BUNDLE"], 2, "--overwrite"),
    "no tokenizer": (["run", "PLAIN", "--prompt", "x"], 2, "holds no tokenizer"),
    "ids that are no npy": (["logits", "BUNDLE", "--ids-file", "BINARY", "--out", "OUT"], 2, "no readable .npy"),
    "no ids file": (["logits", "BUNDLE", "--ids-file", "/nowhere", "--out", "OUT"], 2, "does not exist"),
    "float ids": (["logits", "BUNDLE", "--ids-file", "FLOATS", "--out", "OUT"], 2, "whole numbers"),
    "two rows of ids": (["logits", "BUNDLE", "--ids-file", "TABLE", "--out", "OUT"], 2, "one sequence"),
    "pickled ids": (["logits", "BUNDLE", "--ids-file", "PICKLE", "--out", "OUT"], 2, "no readable .npy"),
    "ids out of range": (["logits", "BUNDLE", "--ids-file", "HUGE", "--out", "OUT"], 2, "token id 999999"),
    "more rows than ids": (["logits", "BUNDLE", "--ids-file", "IDS", "--last", "99", "--out", "OUT"], 2, "at most 20"),
    "out in no folder": (["logits", "BUNDLE", "--ids-file", "IDS", "--out", "/nowhere/x"], 2, "does not exist"),
    "sparse attention": (
        ["logits", "BUNDLE", "--ids-file", "IDS", "--out", "OUT", "--attention", "sparse"],
        2,
        "dense attention only",
    ),
    "odd contexts": (["bench", "BUNDLE", "--contexts", "1,two"], 2, "no list of whole numbers"),
    "context over the limit": (["bench", "BUNDLE", "--contexts", "512", "--context", "64"], 1, "64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_sentence(case: str, checkpoint: Path, tiny_bundle: Path, tmp_path: Path, ids: Path) -> None:
    arguments, code, words = WRONG[case]
    files = {"BINARY": b"\xff\xfe\x00", "FLOATS": np.ones(3), "TABLE": np.ones((2, 3), int)}
    files |= {"PICKLE": np.array([{}, None], dtype=object), "HUGE": np.array([1, 999999])}
    places = {"BUNDLE": tiny_bundle, "CHECKPOINT": checkpoint, "OUT": tmp_path / "out", "IDS": ids}
    for name, content in files.items():
        places[name] = tmp_path / f"{name.lower()}.npy"
        if isinstance(content, bytes):
            places[name].write_bytes(content)
        else:
            np.save(places[name], content, allow_pickle=True)
    if "PLAIN" in arguments:
        places["PLAIN"] = tmp_path / "plain"
        assert edge("export", checkpoint, "--out", places["PLAIN"]).returncode == 0
    result = edge(*(places.get(a, a) for a in arguments))
    stderr = result.stderr.decode()
    assert result.returncode == code, stderr
    assert "Traceback" not in stderr
    if arguments:
        assert words in stderr
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1
        assert result.stdout == b""
    assert not (tmp_path / "out").exists()


def test_debug_shows_where(tmp_path: Path) -> None:
    assert b"Traceback" in edge("run", tmp_path, "--prompt", "x", "--debug").stderr


@pytest.mark.parametrize("command", ["", "export", "build", "run", "chat", "logits", "bench"])
@pytest.mark.parametrize("columns", ["80", "40"])
def test_help_fits_the_terminal(command: str, columns: str) -> None:
    result = edge(*command.split(), "--help", COLUMNS=columns, NO_COLOR="1", TERM="dumb")
    text = result.stdout.decode()
    assert result.returncode == 0
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= int(columns)
    assert not command or "edge " + command in text.split("Usage:")[1].split("\n", 1)[1]  # an example


def test_a_question_can_come_from_a_file_or_a_pipe(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("hello")
    same = [
        edge("run", tiny_bundle, "--prompt", "hello", "--max-tokens", 4),
        edge("run", tiny_bundle, "--file", tmp_path / "q.txt", "--max-tokens", 4),
        edge("run", tiny_bundle, "--max-tokens", 4, stdin=b"hello"),
    ]
    assert len({result.stdout for result in same}) == 1
    assert {result.returncode for result in same} == {0}


def test_a_closed_pipe_is_no_drama(tiny_bundle: Path) -> None:
    command = [*EDGE, "run", str(tiny_bundle), "--prompt", "hello", "--max-tokens", "400"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    stderr = process.stderr.read().decode()
    process.wait(60)
    assert "Traceback" not in stderr
    assert "Exception" not in stderr


def test_text_streams_and_ctrl_c_ends_it(tiny_bundle: Path) -> None:
    command = [*EDGE, "run", str(tiny_bundle), "--prompt", "hi", "--max-tokens", "100000", "--context", "200000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)  # the reply is far from its end
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.decode().endswith("interrupted\n")


def test_a_context_beyond_the_training_length_is_noted(tiny_bundle: Path) -> None:
    result = edge("run", tiny_bundle, "--prompt", "hi", "--max-tokens", 1, "--context", 9999)
    assert result.returncode == 0
    assert b"a context of 9999 tokens exceeds the " in result.stderr


def test_it_works_without_a_home_or_a_writable_folder(tiny_bundle: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "HOME"}
    command = [*EDGE, "run", str(tiny_bundle), "--prompt", "hi", "--max-tokens", "3"]
    result = subprocess.run(command, cwd="/proc", env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr


def read_until(terminal: int, pattern: str, seconds: float = 60) -> str:
    """What the terminal shows until the pattern appears."""
    shown, deadline = "", time.monotonic() + seconds
    while not re.search(pattern, shown):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {pattern!r} in {shown!r}"
        shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


def test_a_chat_in_a_terminal(tiny_bundle: Path) -> None:
    terminal, child_end = pty.openpty()
    command = [*EDGE, "chat", str(tiny_bundle), "--max-tokens", "5"]
    process = subprocess.Popen(command, stdin=child_end, stdout=child_end, stderr=child_end, start_new_session=True)
    os.close(child_end)
    try:
        read_until(terminal, "> $")
        counts = []
        for line in ("hello there", "and again", "/reset", "hello there"):
            os.write(terminal, line.encode() + b"\n")
            shown = read_until(terminal, r"prompt tokens(.|\s)*> $" if line[0] != "/" else r"reset(.|\s)*> $")
            counts += re.findall(r"(\d+) prompt tokens", shown)
        assert int(counts[0]) < int(counts[1])
        assert counts[2] == counts[0]
        os.write(terminal, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(terminal)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("900MB", 900_000_000), ("1.5g", 1_500_000_000), ("512", 512), (" 2 KiB ", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "GiB", "4 TB", "4GiBs", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_logits_of_a_full_disk_leave_no_half_file(tiny_bundle: Path, ids: Path, tmp_path: Path) -> None:
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)); sys.argv[0] = 'edge'; "
    code += "from edge.cli import main; main()"
    out = tmp_path / "logits.npy"
    arguments = ["logits", str(tiny_bundle), "--ids-file", str(ids), "--last", "20", "--out", str(out)]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: cannot write {out}")
    assert {p.name for p in tmp_path.iterdir()} == {"ids.npy"}


def test_a_damaged_bundle_is_named_by_the_command(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "model.onnx").write_bytes(b"no graph")
    result = edge("run", bundle, "--prompt", "x")
    assert result.returncode == 1
    assert b"model.onnx is damaged" in result.stderr
