"""`edge quantize` as a stranger meets it: in a process of its own, judged by its exit code and its words."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from build_engine.checkpoint import open_checkpoint
from tests.command import edge
from tests.synthetic import tiny_config, write_hf_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_checkpoint(tmp_path_factory.mktemp("quantize") / "checkpoint", tiny_config(), tokenizer=True)


def test_quantize_export_run(checkpoint: Path, tmp_path: Path) -> None:
    """In two sentences of the README; the table fits a terminal of 80 columns."""
    made = edge("quantize", checkpoint, "--out", tmp_path / "int4", "--samples", 4, "--length", 64)
    assert made.returncode == 0, made.stderr
    lines = made.stdout.decode().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].strip() == "relative error of the outputs, round-to-nearest / pgptq, percent"
    assert lines[1].split() == ["layer", "q", "k", "v", "o", "gate", "up", "down", "s"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "mean"]
    for cell in lines[4].split()[1:8]:
        before, after = map(float, cell.split("/"))
        assert after < before
    assert b"int4 by pgptq in groups of 64, 4 sequences of 64 tokens" in made.stderr
    exported = edge("export", tmp_path / "int4", "--out", tmp_path / "bundle")
    assert exported.returncode == 0, exported.stderr
    answer = edge("run", tmp_path / "bundle", "--prompt", "hello", "--max-tokens", 4)
    assert answer.returncode == 0, answer.stderr


def test_json_is_the_report(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The fox jumps over the dog. " * 50)
    options = ("--method", "gptq", "--calibration", tmp_path / "text.txt", "--samples", 3, "--length", 32)
    made = edge("quantize", checkpoint, "--out", tmp_path / "out", *options, "--group-size", 32, "--json")
    assert made.returncode == 0, made.stderr
    printed = json.loads(made.stdout)
    assert printed.pop("checkpoint") == str(tmp_path / "out")
    assert printed == json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert (printed["method"], printed["sequences"], printed["length"], printed["skip_tokens"]) == ("gptq", 3, 32, 0)
    assert len(printed["linears"]) == 14


def test_rounding_shows_errors_of_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    made = edge("quantize", checkpoint, "--out", tmp_path / "out", "--method", "rtn")
    assert made.returncode == 0, made.stderr
    assert made.stdout.decode().splitlines()[0].strip() == "relative error of the weights, percent"


WRONG = {
    "no out": (["CHECKPOINT"], 2, "--out"),
    "no checkpoint": (["/nowhere", "--out", "OUT"], 2, "/nowhere does not exist"),
    "unknown method": (["CHECKPOINT", "--out", "OUT", "--method", "awq"], 2, "choose one of pgptq, gptq, rtn"),
    "group size": (["CHECKPOINT", "--out", "OUT", "--group-size", "48"], 2, "(32, 64, 128)"),
    "a group too large": (["CHECKPOINT", "--out", "OUT", "--group-size", "128"], 1, "choose a smaller --group-size"),
    "skipping in gptq": (["CHECKPOINT", "--out", "OUT", "--method", "gptq", "--skip-tokens", "4"], 2, "--method pgptq"),
    "no group": (["CHECKPOINT", "--out", "OUT", "--group-size", "0"], 2, "group size 0 is not offered"),
    "damping in rtn": (["CHECKPOINT", "--out", "OUT", "--method", "rtn", "--damping", "0.1"], 2, "drop --damping"),
    "samples in rtn": (["CHECKPOINT", "--out", "OUT", "--method", "rtn", "--samples", "8"], 2, "drop --samples"),
    "beyond the model": (["CHECKPOINT", "--out", "OUT", "--length", "9999"], 2, "--length 9999 is beyond the"),
    "a prefix in gptq": (["CHECKPOINT", "--out", "OUT", "--method", "gptq", "--prefix", "omit"], 2, "--method pgptq"),
    "unknown prefix": (["CHECKPOINT", "--out", "OUT", "--prefix", "drop"], 2, "choose scale or omit"),
    "text for rtn": (["CHECKPOINT", "--out", "OUT", "--method", "rtn", "--calibration", "TEXT"], 2, "drop --calib"),
    "no text": (["CHECKPOINT", "--out", "OUT", "--calibration", "/nowhere"], 2, "cannot read /nowhere"),
    "no UTF-8": (["CHECKPOINT", "--out", "OUT", "--calibration", "BINARY"], 2, "not UTF-8"),
    "an empty text": (["CHECKPOINT", "--out", "OUT", "--calibration", "EMPTY"], 2, "holds no tokens"),
    "no size": (["CHECKPOINT", "--out", "OUT", "--memory", "lots"], 2, "is no size"),
    "too little memory": (["CHECKPOINT", "--out", "OUT", "--memory", "10MB"], 1, "raise --memory or lower --length"),
    "too little for rtn": (["CHECKPOINT", "--out", "OUT", "--memory", "1MB", "--method", "rtn"], 1, "raise --memory"),
    "damping": (["CHECKPOINT", "--out", "OUT", "--damping", "2"], 2, "--damping is 2.0"),
    "out in no folder": (["CHECKPOINT", "--out", "/nowhere/out"], 2, "/nowhere is no folder"),
    "out where nobody writes": (
        ["CHECKPOINT", "--out", "/proc/out", "--method", "rtn"],
        1,
        "writing /proc/out.partial",
    ),
    "an existing folder": (["CHECKPOINT", "--out", "FOLDER", "--overwrite"], 2, "not written by edge quantize"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_sentence(name: str, checkpoint: Path, tmp_path: Path) -> None:
    arguments, exit_code, words = WRONG[name]
    places = {"CHECKPOINT": checkpoint, "OUT": tmp_path / "out", "FOLDER": tmp_path}
    for place, content in {"TEXT": b"text", "BINARY": b"\xff\xfe\x00", "EMPTY": b""}.items():
        places[place] = tmp_path / place.lower()
        places[place].write_bytes(content)
    result = edge("quantize", *(places.get(argument, argument) for argument in arguments))
    assert result.returncode == exit_code, result.stderr
    assert words in result.stderr.decode()
    assert result.stderr.decode().startswith("error: ")
    assert result.stderr.count(b"\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_a_short_text_is_noted(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The fox jumps over the dog.")
    made = edge("quantize", checkpoint, "--out", tmp_path / "out", "--calibration", tmp_path / "text.txt")
    assert made.returncode == 0, made.stderr
    assert b"tokens of calibration text are few for layers of 128 inputs" in made.stderr
    assert b"give --calibration a text of 1024 tokens or more" in made.stderr


def quantize_process(out: Path, checkpoint: Path, patch: str) -> subprocess.Popen[str]:
    """The command in a process that runs `patch` first; `stop()` there is Ctrl-C."""
    arguments = ["edge", "quantize", str(checkpoint), "--out", str(out), "--samples", "40", "--length", "32"]
    code = f"""
import os, resource, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
def stop():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
import build_engine.quantizer.run as run
{patch}
sys.argv = {arguments!r}
from edge.cli import main
main()
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def test_ctrl_c_keeps_what_is_finished(checkpoint: Path, tmp_path: Path) -> None:
    patch = """
load = run.load_layer
run.load_layer = lambda checkpoint, index: stop() if index == 1 else load(checkpoint, index)
"""
    process = quantize_process(tmp_path / "out", checkpoint, patch)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r".*/out\.partial keeps the finished layers; .* --resume .*\ninterrupted\n", stderr)
    again = edge("quantize", checkpoint, "--out", tmp_path / "out", "--samples", 40, "--length", 32)
    assert again.returncode == 2
    assert b"add --resume" in again.stderr
    resumed = edge("quantize", checkpoint, "--out", tmp_path / "out", "--samples", 40, "--length", 32, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(("room", "is_kept"), [(1, False), (30_000, True)])
def test_a_full_disk_is_one_sentence(checkpoint: Path, tmp_path: Path, room: int, is_kept: bool) -> None:
    """A limit on the size of files fails in the same calls as a disk without space: at once, or at the embedding."""
    process = quantize_process(
        tmp_path / "out", checkpoint, f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))"
    )
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(
        r"error: writing .*/out\.partial failed \(File too large\); make room and go on with --resume", stderr
    )
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() == is_kept


def test_two_runs_do_not_share_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    patch = """
load = run.load_layer
def wait(checkpoint, index):
    print("waiting", flush=True)
    time.sleep(100)
run.load_layer = wait
"""
    process = quantize_process(tmp_path / "out", checkpoint, patch)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        second = edge("quantize", checkpoint, "--out", tmp_path / "out", "--overwrite")
        assert second.returncode == 1
        assert b"another run is writing" in second.stderr
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
