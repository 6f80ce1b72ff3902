"""deploy/ against a board on loopback: a real sshd, rsync, venv and pip, and all of `edge` from the wheel.

The tests share the board and go on from what the one before left there, as pushes do; the first installs everything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import hash_file
from edge.cli.app import run_command
from tests.docs_blocks import ROOT, blocks
from tests.loopback_board import MISSING, LoopbackBoard, build_wheel, loopback_board
from tests.synthetic import tiny_config, write_hf_checkpoint

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}")
Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackBoard]:
    with loopback_board(tmp_path_factory.mktemp("board")) as board:
        yield board


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With golden tokens of its own."""
    copy = tmp_path_factory.mktemp("recorded") / "bundle"
    shutil.copytree(tiny_bundle, copy)
    assert run_command(["selftest", str(copy), "--record"], debug=True) == 0
    return copy


@pytest.fixture(scope="module")
def push(board: LoopbackBoard, wheel: Path) -> Push:
    """A push; --context makes a release of its own of the same bundle."""

    def run(bundle: Path, *options: object) -> subprocess.CompletedProcess[str]:
        return board.deploy("push", "board", bundle, "--wheel", wheel, *options)

    return run


@pytest.fixture(scope="module")
def installed(board: LoopbackBoard, bundle: Path, push: Push) -> str:
    """The first push -> its release."""
    done = push(bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    assert board.active is not None
    return board.active


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def sent(done: subprocess.CompletedProcess[str]) -> float:
    """MiB that a push says it has sent."""
    match = re.search(r"transfer: ([\d.]+) (KiB|MiB) sent", done.stdout)
    assert match, done.stdout + done.stderr
    return float(match[1]) / (1024 if match[2] == "KiB" else 1)


def wheel_of(board: LoopbackBoard) -> Path:
    """The wheel that is installed there."""
    (wheel,) = board.folder.glob("wheels/*/*.whl")
    return wheel


# ---- a release ---------------------------------------------------------------------------------------------------


def test_from_a_bundle_to_a_release_that_was_proved(
    board: LoopbackBoard, bundle: Path, push: Push, installed: str
) -> None:
    current = board.folder / "current"
    for file in bundle.iterdir():
        assert hash_file(current / "bundle" / file.name) == hash_file(file)
    python = current / "venv" / "bin" / "python"
    code = "import edge, plugins, onnxruntime; print(edge.__file__, plugins.__file__)"
    for path in subprocess.check_output([python, "-c", code], text=True, cwd="/", env={}).split():
        assert Path(path).resolve().is_relative_to((current / "venv").resolve())
    assert "include-system-site-packages = true" in (current / "venv" / "pyvenv.cfg").read_text()
    assert not (board.folder / "staging").exists() and not board.processes("sh -c")

    logged = (board.folder / "logs" / "doctor.log").stat().st_mtime_ns
    again = push(bundle)
    assert (
        again.returncode == 0
        and f"already active: {json.loads((bundle / 'manifest.json').read_text())['name']}" in (again.stdout)
    )
    assert (board.folder / "logs" / "doctor.log").stat().st_mtime_ns == logged and board.active == installed


def test_another_release_shares_files_and_one_can_go_back(
    board: LoopbackBoard, bundle: Path, push: Push, installed: str
) -> None:
    second = push(bundle, "--context", 512)
    assert second.returncode == 0, second.stdout + second.stderr
    steps = [line for line in second.stdout.splitlines() if line.startswith("[")]
    assert [line[:7] for line in steps] == [f"[{i:2}/10]" for i in range(1, 11)]
    assert "as it was" in second.stdout and "golden tokens right" in second.stdout and sent(second) < 0.05
    assert "\x1b" not in second.stdout
    assert board.active not in (None, installed)
    weights = [board.folder / "releases" / id / "bundle" / "model.weights" for id in (installed, str(board.active))]
    assert weights[0].samefile(weights[1])

    back = board.deploy("push", "--rollback", "board")
    assert back.returncode == 0 and f"active again: release {installed}" in back.stdout and board.active == installed
    none = board.deploy("push", "--rollback", "board")
    assert none.returncode == 1 and "no earlier release" in none.stderr and board.active == installed


def test_wrong_tokens_leave_the_active_release_as_it_is(
    board: LoopbackBoard, bundle: Path, push: Push, installed: str, tmp_path: Path
) -> None:
    active = board.active
    tampered = tmp_path / "tampered"
    shutil.copytree(bundle, tampered)
    golden = json.loads((tampered / "golden.json").read_text())
    golden["tokens"][1] ^= 1
    (tampered / "golden.json").write_text(json.dumps(golden))
    failed = push(tampered)
    assert failed.returncode == 1 and re.search(r"error: selftest: .*golden token 2 of", failed.stderr), failed.stderr
    assert board.active == active and "Traceback" not in failed.stderr


def test_a_build_that_fails_leaves_the_active_release_as_it_is(
    board: LoopbackBoard, push: Push, installed: str, tmp_path: Path
) -> None:
    active, house = board.active, tmp_path / "wheelhouse"
    write_hf_checkpoint(tmp_path / "checkpoint", tiny_config(), tokenizer=True)
    options = ExportOptions("tensorrt", WeightFormat("w4a16", 32, symmetric=True, head="exact", linear="native"))
    made = export_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    house.mkdir()
    shutil.copy(wheel_of(board), house)
    failed = push(made, "--force", "--wheelhouse", house)
    assert failed.returncode == 1 and re.search(r"error: engine: .*TensorRT", failed.stderr), failed.stderr
    assert "problem: bundle:" in failed.stdout and board.active == active
    assert [path.name for path in (board.folder / "wheelhouse").iterdir()] == [wheel_of(board).name]


# ---- what interrupts a transfer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 MiB of random weights, which no compression makes smaller."""
    folder = tmp_path_factory.mktemp("large")
    config = tiny_config(vocab_size=40000, tie_word_embeddings=False)
    write_hf_checkpoint(folder / "checkpoint", config, dtype="float32", tokenizer=True)
    options = ExportOptions(weights=WeightFormat("exact"))
    return export_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle", options)


def test_cut_interrupted_and_locked_transfers_go_on_where_they_stopped(
    board: LoopbackBoard, large: Path, wheel: Path, push: Push, installed: str
) -> None:
    active, total = board.active, sum(path.stat().st_size for path in large.iterdir()) / 2**20

    def staged() -> float:
        return sum(path.stat().st_size for path in board.folder.glob("staging/*/bundle/*")) / 2**20

    slow = (large, "--wheel", wheel, "--bwlimit", 2000)
    first = board.start("push", "board", *slow)
    wait_for(lambda: staged() > 2)
    second = push(large)  # while the first has the board
    assert second.returncode == 1 and re.search(r"in use by \S+@\S+; wait", second.stderr), second.stderr
    board.kill("rsync --server")
    out, err = first.communicate(timeout=60)
    assert first.returncode == 1 and "push again" in err, out + err
    kept = staged()
    assert 2 < kept < total - 4

    interrupted = board.start("push", "board", *slow)
    wait_for(lambda: staged() > kept + 1)
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130 and "Traceback" not in err and "interrupted" in err
    kept = staged()
    wait_for(lambda: not board.processes("rsync --server"))

    lost = board.start("push", "board", *slow)
    wait_for(lambda: staged() > kept + 1)
    lost.kill()  # it cannot say goodbye: the board finds out by itself
    lost.communicate()
    wait_for(lambda: not board.processes("edge-deploy"))
    kept = staged()
    assert board.active == active

    done = push(large)
    assert done.returncode == 0, done.stdout + done.stderr
    # Two are kept; the one that was gone back from is not among them.
    assert {path.name for path in (board.folder / "releases").iterdir()} == {installed, board.active}
    assert sent(done) < total - kept + 1 and hash_file(board.folder / "current/bundle/model.weights") == hash_file(
        large / "model.weights"
    )


def test_a_file_that_came_wrong_is_sent_again(board: LoopbackBoard, bundle: Path, push: Push, installed: str) -> None:
    """What a disk or an earlier transfer spoilt has the right size, and rsync sees no reason to touch it."""
    first = board.start("push", "board", bundle, "--wheel", wheel_of(board), "--context", 700)
    staged = list[Path]()
    wait_for(lambda: staged.extend(board.folder.glob("staging/*/bundle/model.weights")) or staged)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    (weights,) = set(board.folder.glob("staging/*/bundle/model.weights"))
    data, stamp = bytearray((bundle / weights.name).read_bytes()), (bundle / weights.name).stat()
    data[1000] ^= 1
    weights.unlink()  # it may be a link
    weights.write_bytes(data)
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    done = push(bundle, "--context", 700)
    assert done.returncode == 0 and sent(done) > 0.1, done.stdout + done.stderr
    assert hash_file(board.folder / "current/bundle/model.weights") == hash_file(bundle / "model.weights")


def test_a_lock_that_was_left_behind_is_taken_over(
    board: LoopbackBoard, bundle: Path, push: Push, installed: str
) -> None:
    """Of a laptop that vanished: its session hangs on, but no line came for a minute."""
    hold = 'exec 9>>"$1"; flock 9; echo held; read -r line'
    command = ["sh", "-c", hold, "edge-deploy", board.folder / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as left:
        assert left.stdout is not None and left.stdout.readline()
        holder = board.folder / "lock.holder"
        holder.write_text(f"pid {left.pid}\nwho someone@gone\n")
        refused = push(bundle, "--context", 700)
        assert refused.returncode == 1 and "in use by someone@gone" in refused.stderr and left.poll() is None
        os.utime(holder, (time.time() - 90,) * 2)
        assert "already active" in push(bundle, "--context", 700).stdout
        assert left.wait(10) == -signal.SIGTERM


@pytest.fixture
def small_disk(board: LoopbackBoard) -> Iterator[Path]:
    """A disk of 2 MiB on the board."""
    place = board.home / "small"
    place.mkdir(exist_ok=True)
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place]).returncode:
        pytest.skip("only root may mount a disk that is too small")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_before_and_during_the_transfer(
    board: LoopbackBoard, small_disk: Path, large: Path, push: Push
) -> None:
    refused = push(large, "--dir", small_disk)
    assert refused.returncode == 1 and re.search(
        r"check: the board's disk has 2\.0 MiB free and \d+\.\d MiB are needed \(bundle \d\d\.\d MiB, packages",
        refused.stderr,
    ), refused.stderr
    assert {path.name for path in small_disk.iterdir()} <= {"lock", "lock.holder"}

    (board.commands / "df").write_text("#!/bin/sh\nprintf 'head\\n/dev/x 9 9 99999999 1%% /\\n'\n")  # others fill it
    (board.commands / "df").chmod(0o755)
    try:
        failed = push(large, "--dir", small_disk)
    finally:
        (board.commands / "df").unlink()
    assert failed.returncode == 1 and "transfer: the disk of board is full" in failed.stderr, failed.stderr
    assert not (small_disk / "current").exists()


# ---- the server --------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


RESTART = "systemctl --user restart edge-serve.service"


def test_a_server_that_does_not_become_ready_is_rolled_back(
    board: LoopbackBoard, bundle: Path, push: Push, installed: str
) -> None:
    port = free_port()
    served = push(bundle, "--service", "user", "--context", 256, "--serve", f"--port {port} --drain 1")
    assert served.returncode == 0 and f"http://127.0.0.1:{port}/ready" in served.stdout, served.stdout + served.stderr
    assert any(line.startswith("loginctl enable-linger") for line in board.said())
    active = board.active
    answer = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10).read())
    assert answer["status"] == "ok"

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        failed = push(bundle, "--context", 256, "--serve", f"--port {taken.getsockname()[1]}", "--ready", 60)
    assert failed.returncode == 1, failed.stdout
    assert "cannot be listened on" in failed.stderr and "the release before it is active again" in failed.stderr
    assert board.active == active
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10).status == 200

    # Ctrl-C while the new release's server starts: the board itself goes back, though nobody waits for it any more.
    restarts = board.said().count(RESTART)
    interrupted = board.start(
        "push", "board", bundle, "--wheel", wheel_of(board), "--serve", f"--port {port} --drain 0"
    )
    wait_for(lambda: board.said().count(RESTART) > restarts, 300)
    interrupted.send_signal(signal.SIGINT)
    interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    wait_for(lambda: board.said().count(RESTART) == restarts + 2 and not board.processes("edge-deploy"))
    assert board.active == active
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10).status == 200

    logs = board.deploy("logs", "board", "-n", "100")
    assert logs.returncode == 0 and '"event": "serving"' in logs.stdout and "cannot be listened on" in logs.stdout
    follow = board.start("logs", "board", "-f", "-n", "1")
    assert follow.stdout is not None and follow.stdout.readline()
    with (board.home / "journal").open("a") as journal:
        journal.write("something new\n")
    assert any("something new" in line for line in iter(follow.stdout.readline, ""))
    follow.send_signal(signal.SIGINT)
    assert follow.wait(60) == 130
    wait_for(lambda: not board.processes("tail -n"))


# ---- measuring ---------------------------------------------------------------------------------------------------


def clocks(board: LoopbackBoard) -> tuple[str, str]:
    return (board.home / "clock-state").read_text().strip(), (board.home / "power-mode").read_text().strip()


SHORT = ("--contexts", "16", "--new-tokens", "2", "--repeat", "1")


def test_bench_brings_reports_and_gives_clocks_back(board: LoopbackBoard, installed: str, tmp_path: Path) -> None:
    before = len(board.said())
    done = board.deploy("bench", "board", "--reports", tmp_path, "--power-mode", "0", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "power mode 0, for this run instead of 2" in done.stdout and "clocks locked" in done.stdout
    stem = f"{board.folder}/clocks.conf"
    wanted = ["nvpmodel -m 0", f"jetson_clocks --store {stem}", "jetson_clocks ", "nvpmodel -m 2"]
    assert board.said()[before:] == [*wanted, f"jetson_clocks --restore {stem}"] and clocks(board) == ("free", "2")
    files = {path.suffix: path for path in tmp_path.iterdir() if "conditions" not in path.name}
    assert files.keys() == {".html", ".md", ".json"} and all(
        re.match(r"board-\d{8}-\d{6}\.", p.name) for p in files.values()
    )
    assert json.loads(files[".json"].read_text())["cases"] and "- clocks locked" in files[".md"].read_text()
    assert "<li>clocks locked by jetson_clocks</li>" in files[".html"].read_text()
    assert not list((board.folder / "reports").iterdir())


def test_bench_says_why_clocks_are_not_held(board: LoopbackBoard, installed: str, tmp_path: Path) -> None:
    (board.home / "asks-for-password").touch()
    try:
        done = board.deploy("bench", "board", "--reports", tmp_path, "--power-mode", "0", *SHORT)
    finally:
        (board.home / "asks-for-password").unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "power mode 2, not 0: sudo: a password is required" in done.stdout
    assert "clocks not locked: sudo: a password is required" in done.stdout and clocks(board) == ("free", "2")
    (conditions,) = tmp_path.glob("*.conditions.json")
    assert "clocks not locked: sudo: a password is required" in json.loads(conditions.read_text())["conditions"]


def test_clocks_come_back_after_a_failure_and_after_a_kill(
    board: LoopbackBoard, installed: str, tmp_path: Path
) -> None:
    failed = board.deploy("bench", "board", "--reports", tmp_path, "--power-mode", "0", "--contexts", "0")
    assert failed.returncode == 2 and "below 1" in failed.stderr and clocks(board) == ("free", "2")
    running = board.start("bench", "board", "--reports", tmp_path, "--power-mode", "0", *SHORT[:-1], "1000000")
    wait_for(lambda: clocks(board) == ("locked", "0") and board.processes("edge bench"))
    running.kill()
    running.communicate()
    wait_for(lambda: clocks(board) == ("free", "2"))
    wait_for(lambda: not board.processes("edge bench"))

    # The board's own shell may be killed, too: the next command that measures finds what it left.
    running = board.start("bench", "board", "--reports", tmp_path, "--power-mode", "0", *SHORT[:-1], "1000000")
    wait_for(lambda: clocks(board) == ("locked", "0") and board.processes("edge bench"))
    board.kill("edge-deploy")
    board.kill("edge bench")
    running.communicate(timeout=60)
    assert clocks(board) == ("locked", "0")
    done = board.deploy("bench", "board", "--reports", tmp_path, *SHORT)
    assert "an earlier run's clocks were set back first" in done.stdout and clocks(board) == ("free", "2")


# ---- as the guide says it ----------------------------------------------------------------------------------------


def test_the_quick_starts_lines_for_a_board_work_as_typed(
    board: LoopbackBoard, bundle: Path, wheel: Path, installed: str, tmp_path: Path
) -> None:
    """But for the bundle, which is one for the CPU, and the key, which the board has already."""
    (lines,) = (b.text for b in blocks(ROOT / "docs" / "quickstart.md") if "deploy/push" in b.text)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    shutil.copytree(bundle, tmp_path / "bundle-jetson")
    (tmp_path / "dist").mkdir()
    shutil.copy(wheel, tmp_path / "dist")
    for name, text in {"ssh": f'exec {shutil.which("ssh")} -F {board.config} "$@"', "ssh-copy-id": "exit 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    short = {"USER@HOST": "board", "deploy/bench board": f"deploy/bench board {' '.join(SHORT)}"}
    for old, new in short.items():
        lines = lines.replace(old, new)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", lines], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "active: " in done.stdout and list((tmp_path / "reports").glob("board-*.html"))


# ---- many boards, and none ---------------------------------------------------------------------------------------


def test_an_inventory_is_pushed_in_parallel_and_says_who_failed(
    board: LoopbackBoard, bundle: Path, wheel: Path, installed: str, tmp_path: Path
) -> None:
    (tmp_path / "boards.toml").write_text(
        f'[defaults]\nssh_config = "{board.config}"\nwheel = "{wheel}"\n'
        '[boards.lab]\nhost = "board"\ncontext = 800\n'
        '[boards.robot]\nhost = "nobody-there@board"\n'
        '[boards.unused]\nhost = "board"\ndir = "elsewhere"\n'
    )
    active = board.active
    done = board.deploy("push", "--inventory", tmp_path / "boards.toml", "lab", "robot", bundle)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("lab   | [10/10]") for line in lines) and "unused" not in done.stdout
    assert re.match(r"lab    ok      +\d+ s  active: ", lines[-2])
    assert re.match(r"robot  failed  +\d+ s  nobody-there@board cannot be reached: .*ssh-copy-id", lines[-1])
    assert board.active != active
    wrong = board.deploy("push", "--inventory", tmp_path / "boards.toml", "lba", "lab", bundle)
    assert wrong.returncode == 2 and "no board lba" in wrong.stderr


def test_remove_lists_asks_and_deletes(board: LoopbackBoard, installed: str) -> None:
    asked = board.deploy("remove", "board")
    assert asked.returncode == 1 and "give --yes" in asked.stderr and f"{board.folder}/releases (" in asked.stdout
    assert board.active is not None
    (board.folder / "notes.txt").write_text("mine")
    removed = board.deploy("remove", "board", "--yes")
    assert removed.returncode == 0 and "the user unit edge-serve.service" in removed.stdout, removed.stderr
    assert "left:" in removed.stdout and [path.name for path in board.folder.iterdir()] == ["notes.txt"]
    assert not list(board.home.glob(".config/systemd/user/*")) and not (board.home / "service.pid").exists()
    again = board.deploy("logs", "board")
    assert again.returncode == 1 and "nothing was pushed there" in again.stderr
