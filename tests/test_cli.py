"""The command as a stranger meets it: in a process of its own, judged by its exit code and its words."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.export import export_bundle
from edge.cli.app import run_command
from edge.cli.options import parse_size
from edge.engine import open_engine
from edge.errors import UsageError
from edge.plan import EngineOptions
from tests.command import EDGE, edge
from tests.synthetic import tiny_config, write_hf_checkpoint


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
    report = edge(
        "bench", tmp_path / "bundle", "--contexts", "16", "--new-tokens", 4, "--repeat", 1, "--no-gate", "--json"
    )
    assert json.loads(report.stdout)["cases"][0]["case"] == {"prompt_tokens": 16, "new_tokens": 4, "batch": 1}


WRONG = {
    "unknown command": (["fly"], 2, "No such command"),
    "unknown option": (["run", "BUNDLE", "--wings"], 2, "No such option"),
    "missing option": (["export", "CHECKPOINT"], 2, "--out"),
    "not a number": (["run", "BUNDLE", "--prompt", "x", "--top-k", "many"], 2, "--top-k"),
    "no such checkpoint": (["export", "/nowhere", "--out", "OUT"], 2, "/nowhere does not exist"),
    "no such bundle": (["run", "/nowhere", "--prompt", "x"], 2, "not a folder"),
    "a checkpoint where a bundle belongs": (["run", "CHECKPOINT", "--prompt", "x"], 2, "edge export"),
    "a bundle where a checkpoint belongs": (["export", "BUNDLE", "--out", "OUT"], 2, "is a bundle already"),
    "empty prompt": (["run", "BUNDLE", "--prompt", "  "], 2, "the prompt is empty"),
    "two prompts": (["run", "BUNDLE", "--prompt", "x", "--file", "IDS"], 2, "choose one"),
    "no prompt file": (["run", "BUNDLE", "--file", "/nowhere"], 2, "cannot read /nowhere (No such file"),
    "a system message without a template": (["run", "BUNDLE", "--raw", "--system", "x", "--prompt", "x"], 2, "--raw"),
    "bytes as prompt": (["run", "BUNDLE", "--prompt", "\udcff"], 2, "surrogate"),
    "empty stop": (["run", "BUNDLE", "--prompt", "x", "--stop", ""], 2, "non-empty strings"),
    "no reply": (["run", "BUNDLE", "--prompt", "x", "--max-tokens", "0"], 2, "max_tokens is 0"),
    "negative seed": (["run", "BUNDLE", "--prompt", "x", "--seed", "-1"], 2, "seed is -1"),
    "too many threads": (["run", "BUNDLE", "--prompt", "x", "--threads", "99999"], 2, "'--threads'"),
    "no chunk": (["run", "BUNDLE", "--prompt", "x", "--chunk", "0"], 2, "'--chunk'"),
    "context beyond counting": (["run", "BUNDLE", "--prompt", "x", "--context", str(2**31)], 2, "'--context'"),
    "context beyond memory": (["run", "BUNDLE", "--prompt", "x", "--context", str(2**31 - 1)], 1, "ask for --context"),
    "a name too long": (["run", "x" * 300, "--prompt", "x"], 1, "(File name too long)"),
    "a file where a bundle belongs": (["run", "IDS", "--prompt", "x"], 2, "not a folder"),
    "a folder where a checkpoint belongs": (["export", "FOLDER", "--out", "OUT"], 2, "has no config.json"),
    "a file that is no checkpoint": (["export", "IDS", "--out", "OUT"], 2, "is not a .gguf file"),
    "a GGUF that is none": (["export", "GGUF", "--out", "OUT"], 1, "noise.gguf"),
    "a folder that is not there": (["export", "CHECKPOINT", "--out", "/nowhere/out"], 2, "/nowhere is no folder"),
    "overwriting what is no bundle": (["export", "CHECKPOINT", "--out", "FOLDER", "--overwrite"], 2, "not a bundle"),
    "group size": (["export", "CHECKPOINT", "--out", "OUT", "--group-size", "48"], 2, "(32, 64, 128)"),
    "head": (["export", "CHECKPOINT", "--out", "OUT", "--head", "fp8"], 2, "exact, int8 or int4"),
    "building a CPU bundle": (["build", "BUNDLE"], 2, "--target rtx"),
    "a folder as prompt": (["run", "BUNDLE", "--file", "/"], 2, "cannot read /"),
    "a prompt that is no text": (["run", "BUNDLE", "--file", "BINARY"], 2, "not UTF-8"),
    "negative temperature": (["run", "BUNDLE", "--prompt", "x", "--temperature", "-1"], 2, "temperature is -1"),
    "no size": (["run", "BUNDLE", "--prompt", "x", "--memory", "lots"], 2, "is no size"),
    "too little memory": (["run", "BUNDLE", "--prompt", "x", "--memory", "10MB"], 1, "give --memory"),
    "too long a prompt": (["run", "BUNDLE", "--prompt", "long " * 300, "--context", "64"], 1, "limited to 64"),
    "unknown weights": (
        ["export", "CHECKPOINT", "--out", "OUT", "--weights", "w3"],
        2,
        "choose exact, fp16, w4a16 or ternary",
    ),
    "unknown target": (["export", "CHECKPOINT", "--out", "OUT", "--target", "abacus"], 2, "rtx, tensorrt or jetson"),
    "existing out": (["export", "CHECKPOINT", "--out", "BUNDLE"], 2, "--overwrite"),
    "no tokenizer": (["run", "PLAIN", "--prompt", "x"], 2, "holds no tokenizer"),
    "ids that are no npy": (["logits", "BUNDLE", "--ids-file", "BINARY", "--out", "OUT"], 2, "no readable .npy"),
    "no ids file": (["logits", "BUNDLE", "--ids-file", "/nowhere", "--out", "OUT"], 2, "does not exist"),
    "float ids": (["logits", "BUNDLE", "--ids-file", "FLOATS", "--out", "OUT"], 2, "whole numbers"),
    "two rows of ids": (["logits", "BUNDLE", "--ids-file", "TABLE", "--out", "OUT"], 2, "one sequence"),
    "pickled ids": (["logits", "BUNDLE", "--ids-file", "PICKLE", "--out", "OUT"], 2, "no readable .npy"),
    "ids out of range": (["logits", "BUNDLE", "--ids-file", "HUGE", "--out", "OUT"], 2, "token id 999999"),
    "ids out of a checkpoint's range": (["logits", "CHECKPOINT", "--ids-file", "HUGE", "--out", "OUT"], 2, "999999"),
    "no ids": (["logits", "BUNDLE", "--ids-file", "NONE", "--out", "OUT"], 2, "holds no ids"),
    "one number": (["logits", "BUNDLE", "--ids-file", "SCALAR", "--out", "OUT"], 2, "one sequence"),
    "a text of ids": (["logits", "BUNDLE", "--ids-file", "TEXT", "--out", "OUT"], 2, "no readable .npy"),
    "an empty file of ids": (["logits", "BUNDLE", "--ids-file", "VOID", "--out", "OUT"], 2, "no readable .npy"),
    "out is a folder": (["logits", "BUNDLE", "--ids-file", "IDS", "--out", "FOLDER"], 2, "is a folder"),
    "out is a device": (["logits", "BUNDLE", "--ids-file", "IDS", "--out", "/dev/null"], 2, "a device"),
    "exact from int4": (["logits", "INT4", "--ids-file", "IDS", "--out", "OUT", "--exact"], 2, "needs the checkpoint"),
    "context under the ids": (
        ["logits", "BUNDLE", "--ids-file", "IDS", "--context", "9", "--out", "OUT"],
        1,
        "20 tokens",
    ),
    "more rows than ids": (["logits", "BUNDLE", "--ids-file", "IDS", "--last", "99", "--out", "OUT"], 2, "at most 20"),
    "out in no folder": (["logits", "BUNDLE", "--ids-file", "IDS", "--out", "/nowhere/x"], 2, "/nowhere is no folder"),
    "sparse attention": (
        ["logits", "BUNDLE", "--ids-file", "IDS", "--out", "OUT", "--attention", "sparse"],
        2,
        "dense attention only",
    ),
    "odd contexts": (["bench", "BUNDLE", "--contexts", "1,two"], 2, "no list of whole numbers"),
    "a report in no folder": (["bench", "BUNDLE", "--html", "/nowhere/r.html"], 2, "/nowhere is no folder"),
    "context over the limit": (["bench", "BUNDLE", "--contexts", "512", "--context", "64"], 1, "64"),
}


@pytest.fixture(scope="module")
def places(checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the capital words of WRONG stand for."""
    folder = tmp_path_factory.mktemp("places")
    places = {"BUNDLE": tiny_bundle, "CHECKPOINT": checkpoint, "FOLDER": folder}
    for name in ("PLAIN", "INT4"):
        places[name] = export_bundle(open_checkpoint(checkpoint), folder / name.lower())
    arrays = {"FLOATS": np.ones(3), "TABLE": np.ones((2, 3), int), "PICKLE": np.array([{}, None], dtype=object)}
    arrays |= {"HUGE": np.array([1, 999999]), "NONE": np.zeros(0, int), "SCALAR": np.array(3), "IDS": np.arange(20)}
    for name, array in arrays.items():
        places[name] = folder / f"{name.lower()}.npy"
        np.save(places[name], array, allow_pickle=True)
    for name, content in {"BINARY": b"\xff\xfe\x00", "TEXT": b"1 2 3", "VOID": b"", "GGUF": b"noise"}.items():
        places[name] = folder / ("noise.gguf" if name == "GGUF" else f"{name.lower()}.txt")
        places[name].write_bytes(content)
    return places


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_sentence(
    case: str, places: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, code, words = WRONG[case]
    result = run_command([str({**places, "OUT": tmp_path / "out"}.get(a, a)) for a in arguments], debug=False)
    stdout, stderr = capfd.readouterr()
    assert result == code, stderr
    assert words in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_command_alone_shows_the_help() -> None:
    result = edge()
    assert (result.returncode, result.stderr) == (2, b"")
    assert b"Usage: edge" in result.stdout
    assert edge("--version").stdout.split()[0] == b"minicpm-edge"


def test_debug_shows_where(tmp_path: Path) -> None:
    assert b"Traceback" in edge("run", tmp_path, "--prompt", "x", "--debug").stderr


@pytest.mark.parametrize("command", ["", "export", "build", "run", "chat", "mapreduce", "logits", "bench", "eval"])
@pytest.mark.parametrize("columns", ["80", "40"])
def test_help_fits_the_terminal(command: str, columns: str) -> None:
    result = edge(*command.split(), "--help", COLUMNS=columns, NO_COLOR="1", TERM="dumb")
    text = result.stdout.decode()
    assert result.returncode == 0
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= int(columns)
    assert not command or "edge " + command in text.split("Usage:")[1].split("\n", 1)[1]  # an example


def test_a_question_can_come_from_anywhere(tiny_bundle: Path, tmp_path: Path) -> None:
    """The line end of a file or of `echo` is no part of it, nor is the mark that some editors put first."""
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfhello\n")
    options = ("--max-tokens", 4)
    same = [
        edge("run", tiny_bundle, "--prompt", "hello", *options),
        edge("run", tiny_bundle, "--file", tmp_path / "q.txt", *options),
        edge("run", tiny_bundle, *options, stdin=b"hello\n"),
        edge("run", tiny_bundle, "--prompt", "-", *options, stdin=b"hello"),
        edge("run", tiny_bundle, "--file", "-", *options, stdin=b"hello"),
    ]
    assert len({result.stdout for result in same}) == 1
    assert {result.returncode for result in same} == {0}


def in_shell(bundle: Path, tail: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`edge run` with the shell's redirections after it."""
    command = f"{shlex.join([*EDGE, 'run', str(bundle), '--max-tokens', '30'])} {tail}"
    return subprocess.run(["sh", "-c", command], capture_output=True, env={**os.environ, **environment}, timeout=60)


@pytest.mark.parametrize("tail", ["--prompt hi >/dev/full", "--prompt hi --json >/dev/full"])
def test_output_that_cannot_be_written_is_one_sentence(tiny_bundle: Path, tail: str) -> None:
    result = in_shell(tiny_bundle, tail)
    assert result.returncode == 1
    assert result.stderr.startswith(b"error: cannot write the output (No space left on device)")
    assert result.stderr.count(b"\n") == 1


def test_a_reader_that_leaves_early_is_no_error_to_tell(tiny_bundle: Path) -> None:
    for tail in ("--prompt hi --json | :", "--prompt hi --max-tokens 400 | head -c 5"):
        result = in_shell(tiny_bundle, tail)
        assert b"error" not in result.stderr.lower()


def test_closed_streams_are_no_drama(tiny_bundle: Path) -> None:
    no_input = in_shell(tiny_bundle, "<&-")
    assert (no_input.returncode, no_input.stderr[:26]) == (2, b"error: there is no prompt;")
    assert in_shell(tiny_bundle, "--prompt hi >&-").returncode == 0
    quiet = in_shell(tiny_bundle, "--prompt hi 2>&-")
    assert quiet.returncode == 0
    assert quiet.stdout


def test_a_terminal_that_knows_few_characters_shows_others_as_question_marks(tiny_bundle: Path) -> None:
    sampled = "--prompt hi --raw --temperature 3 --seed 1"
    plain = in_shell(tiny_bundle, sampled, PYTHONIOENCODING="ascii")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.decode("ascii").count("?") > in_shell(tiny_bundle, sampled).stdout.decode().count("?")


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


PHASES = {
    "importing": """
import importlib.abc
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "edge.cli.generate":
            stop()
sys.meta_path.insert(0, Finder())
""",
    "loading": "import edge.executors.onnxruntime as o; o.OnnxRuntimeExecutor.__init__ = lambda *a, **b: stop()",
    "prefilling": "import edge.executors.onnxruntime as o; o.OnnxRuntimeExecutor.step = lambda *a: stop()",
    "decoding": """
import itertools
import edge.executors.onnxruntime as o
step, count = o.OnnxRuntimeExecutor.step, itertools.count()
o.OnnxRuntimeExecutor.step = lambda *a: stop() if next(count) == 5 else step(*a)
""",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", PHASES)
def test_stopping_is_one_word_whenever_it_comes(tiny_bundle: Path, phase: str, number: signal.Signals) -> None:
    arguments = ["edge", "run", str(tiny_bundle), "--prompt", "hi", "--max-tokens", "50"]
    code = f"""
import os, sys, time
def stop():
    os.kill(os.getpid(), {number})
    time.sleep(10)
{PHASES[phase]}
sys.argv = {arguments!r}
from edge.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (1, b"interrupted\n")
    assert bool(result.stdout) == (phase == "decoding")


def test_a_context_beyond_the_training_length_is_noted(tiny_bundle: Path) -> None:
    result = edge("run", tiny_bundle, "--prompt", "hi", "--max-tokens", 1, "--context", 9999)
    assert result.returncode == 0
    assert b"a context of 9999 tokens exceeds the " in result.stderr


def test_it_works_without_a_home_or_a_writable_folder(tiny_bundle: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "HOME"}
    command = [*EDGE, "run", str(tiny_bundle), "--prompt", "hi", "--max-tokens", "3"]
    result = subprocess.run(command, cwd="/proc", env=environment, capture_output=True)
    assert result.returncode == 0
    assert result.stderr.count(b"\n") == 1, result.stderr


def test_it_leaves_no_trace_and_calls_nobody(tiny_bundle: Path, tmp_path: Path) -> None:
    """The inference library would write a device id to the home folder and report to its maker."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    code = """
import socket, sys
def refuse(*arguments, **options):
    raise AssertionError("the network was used")
socket.socket = socket.getaddrinfo = socket.create_connection = refuse
from edge.cli import main
main()
"""
    command = [sys.executable, "-c", code, "run", str(tiny_bundle), "--prompt", "hi", "--max-tokens", "3"]
    result = subprocess.run(command, env={**environment, "HOME": str(tmp_path)}, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


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
    assert {path.name for path in tmp_path.iterdir()} == {"ids.npy"}


def test_logits_of_a_checkpoint_are_those_of_its_bundle(tiny_bundle: Path, ids: Path, tmp_path: Path) -> None:
    """Written in steps of --chunk; the bundle made for it is gone afterwards."""
    out = tmp_path / "logits.npy"
    arguments = ("--ids-file", ids, "--last", 20, "--out", out, "--chunk", 7)
    assert edge("logits", tiny_bundle.parent / "checkpoint", *arguments, "--exact").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ids.npy", "logits.npy"}
    values = np.load(out)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, open_engine(tiny_bundle, EngineOptions()).logits(range(20), 20), atol=1e-4)
    assert edge("logits", tiny_bundle, *arguments).returncode == 0
    np.testing.assert_array_equal(np.load(out), values)


def test_a_damaged_bundle_is_named_by_the_command(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "model.onnx").write_bytes(b"no graph")
    result = edge("run", bundle, "--prompt", "x")
    assert result.returncode == 1
    assert b"model.onnx is damaged" in result.stderr
