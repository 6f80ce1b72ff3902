"""deploy/ without a board: which wheel fits, what a board must have, inventories, the unit, and wrong use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
ORIN = """arch aarch64
user nvidia
disk_kb 10485760
memory_kb 32000000
available_kb 20000000
rsync yes
l4t # R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan 8 01:49:37 UTC 2025
python /usr/bin/python3 3.10
current 0123456789ab
has aa
has bb
staged 1024 fedcba987654
venv 0123-serve
unit system
"""


@pytest.fixture(scope="module")
def remote() -> Iterator[SimpleNamespace]:
    """The package of deploy/, as its scripts import it."""
    sys.path.insert(0, str(DEPLOY))
    try:
        from remote import board, content, errors, service, target
    finally:
        sys.path.remove(str(DEPLOY))
    yield SimpleNamespace(board=board, content=content, errors=errors, service=service, target=target)


def deploy(command: str, *words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-S", str(DEPLOY / command), *map(str, words)]  # -S: no package that is installed
    return subprocess.run(line, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("name", "architecture", "python", "fit"),
    [
        ("minicpm_edge-0.1.0-py3-none-any.whl", "aarch64", "3.10", True),
        ("minicpm_edge-0.1.0-py3-none-linux_aarch64.whl", "aarch64", "3.12", True),
        ("minicpm_edge-0.1.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "x86_64", "3.13", True),
        ("minicpm_edge-0.1.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "aarch64", "3.13", False),
        ("minicpm_edge-0.1.0-cp311-cp311-linux_x86_64.whl", "x86_64", "3.11", True),
        ("minicpm_edge-0.1.0-cp311-cp311-linux_x86_64.whl", "x86_64", "3.10", False),
        ("minicpm_edge-0.1.0-py3-none-macosx_11_0_aarch64.whl", "aarch64", "3.10", False),
    ],
)
def test_which_wheels_fit(name: str, architecture: str, python: str, fit: bool, remote: SimpleNamespace) -> None:
    assert remote.content.fits(name, architecture, python) is fit


def test_facts_of_a_board(remote: SimpleNamespace) -> None:
    board = remote.board.read_board(ORIN)
    assert (board.architecture, board.l4t, board.python, board.python_version) == (
        *("aarch64", "36.4.3"),
        *("/usr/bin/python3", "3.10"),
    )
    assert board.disk == 10 << 30 and board.has == {"aa", "bb"} and board.staged == {"fedcba987654": 1 << 20}
    assert board.unit == "system" and not board.is_root and board.current == "0123456789ab"
    assert "L4T 36.4.3, Python 3.10" in board.describe()
    remote.board.check_board(board, "jetson")


def test_a_jetpack_that_is_too_old_is_told_before_anything_is_sent(remote: SimpleNamespace) -> None:
    board = remote.board.read_board(ORIN.replace("REVISION: 4.3", "REVISION: 3.0"))
    with pytest.raises(remote.errors.DeployError, match=r"Jetson Linux 36\.3\.0, whose TensorRT .* JetPack 6\.2"):
        remote.board.check_board(board, "jetson")
    remote.board.check_board(board, "onnxruntime")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("old_python 3.8", "its Python 3.8 is not; JetPack 6.2 has 3.10"),
        ("bare_python 3.10", "sudo apt install python3.10-venv"),
        ("", "the board has none"),
    ],
)
def test_a_board_without_python(line: str, words: str, remote: SimpleNamespace) -> None:
    board = remote.board.read_board(ORIN.replace("python /usr/bin/python3 3.10", line))
    with pytest.raises(remote.errors.DeployError, match=words):
        remote.board.check_board(board, "onnxruntime")


def test_room_is_counted_before_anything_is_sent(remote: SimpleNamespace) -> None:
    board = remote.board.read_board(ORIN)
    entry = remote.content.FileEntry
    files = {"model.weights": entry("cc", 4 << 30), "model.onnx": entry("aa", 1 << 20), "manifest.json": entry("dd", 0)}
    bundle = remote.content.Bundle(Path("b"), "m", "jetson", "k", True, files)

    def check(board: object, release: str = "new", new_venv: bool = True) -> list[str]:
        return list(remote.board.check_room(board, bundle, release, 10 << 20, 0, new_venv=new_venv))

    with pytest.raises(remote.errors.DeployError, match=r"10\.0 GiB free and 12\.4 GiB are needed \(bundle 4\.0 GiB"):
        check(board)
    assert check(replace(board, disk=13 << 30)) == []
    needed = (4 << 30) + (8 << 30) + (10 << 20) + (16 << 20)  # 4 of weights, 8 for the engine, wheel, margin
    assert check(replace(board, disk=needed), new_venv=False) == []
    with pytest.raises(remote.errors.DeployError):
        check(replace(board, disk=needed - 1), new_venv=False)
    begun = replace(board, disk=needed - (3 << 30), staged={"new": 3 << 30})
    assert check(begun, new_venv=False) == []
    active = replace(board, has=frozenset({"aa", "cc", "dd"}), disk=27 << 20)
    assert check(active, new_venv=False) == []
    with pytest.raises(remote.errors.DeployError, match=r"weights have 4\.0 GiB and the board has 2\.0 GiB"):
        check(replace(board, disk=1 << 40, memory=2 << 30))
    (warning,) = check(replace(board, disk=1 << 40, available=1 << 30))
    assert "only 1.0 GiB" in warning


def test_the_release_is_named_by_its_content(remote: SimpleNamespace, tiny_bundle: Path, tmp_path: Path) -> None:
    content, wheel = remote.content, tmp_path / "minicpm_edge-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"one")
    bundle = content.read_bundle(tiny_bundle)
    assert bundle.has_text and not bundle.needs_engine and bundle.extras == "serve"
    first = content.Content(bundle, wheel, content.Settings())
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_bundle, copy)
    assert content.Content(content.read_bundle(copy), wheel, content.Settings()).id == first.id
    (copy / "golden.json").write_text("{}")
    others = [
        content.Content(content.read_bundle(copy), wheel, content.Settings()).id,
        content.Content(bundle, wheel, content.Settings(serve=("--port", "1"))).id,
        content.Content(bundle, wheel, content.Settings(build=("--batch", "1"))).id,
    ]
    wheel.write_bytes(b"two")
    others.append(content.Content(bundle, wheel, content.Settings()).id)
    assert len({first.id, *others}) == 5
    assert sorted(line.split("  bundle/")[1] for line in first.sums.splitlines()) == sorted(
        path.name for path in tiny_bundle.iterdir()
    )


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ((), "http://127.0.0.1:8000/ready"),
        (("--host", "0.0.0.0", "--port=9"), "http://127.0.0.1:9/ready"),
        (("--port", "80", "--host=::1"), "http://[::1]:80/ready"),
        (("--host", "10.0.0.7"), "http://10.0.0.7:8000/ready"),
    ],
)
def test_where_a_server_says_that_it_is_ready(options: tuple[str, ...], url: str, remote: SimpleNamespace) -> None:
    assert remote.content.Settings(serve=options).ready_url == url


def test_a_damaged_bundle_is_not_sent(remote: SimpleNamespace, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"x")
    said = deploy("push", "host", copy)
    assert said.returncode == 1 and "model.onnx has" in said.stderr and "export the bundle again" in said.stderr
    (copy / "manifest.json").write_text(json.dumps({"files": {}}))
    assert deploy("push", "host", copy).returncode == 2
    missing = deploy("push", "host", tmp_path)
    assert missing.returncode == 2 and "is no bundle (it has no manifest.json)" in missing.stderr


# ---- the unit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["user", "system"])
def test_the_unit_is_one_that_systemd_takes(scope: str, remote: SimpleNamespace, tmp_path: Path) -> None:
    command = tmp_path / "current/venv/bin/edge"
    command.parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    text = remote.service.render_unit(scope, str(tmp_path), "root", "90%")
    assert "@" not in text and "#" not in text
    assert ("ProtectSystem=strict" in text) == ("User=root" in text) == (scope == "system")
    assert "Type=notify" in text and "MemoryMax=90%" in text and "NoNewPrivileges=yes" in text
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here to judge it")
    unit = tmp_path / "edge-serve.service"
    unit.write_text(text)
    judged = subprocess.run(["systemd-analyze", "verify", f"--{scope}", unit], capture_output=True, text=True)
    complaints = [line for line in (judged.stdout + judged.stderr).splitlines() if "edge-serve" in line]
    assert not complaints


# ---- wrong use ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("boards = 3", "must have tables"),
        ("[boards.a]\nhost = 'h'\n[board.b]\nhost = 'h'", "must have tables"),
        ("[boards.a]\nport = 3", "a has port, which is not one of"),
        ("[boards.a]\ndir = 'x'", "a has no host"),
        ("[boards.a]\nhost = ['x']", "write a text or a number"),
        ("[boards.a", "is no TOML"),
    ],
)
def test_wrong_inventories(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "boards.toml").write_text(text)
    said = deploy("push", "--inventory", tmp_path / "boards.toml", "bundle")
    assert said.returncode == 2 and words in said.stderr and "Traceback" not in said.stderr


def test_the_example_inventory_is_one(remote: SimpleNamespace) -> None:
    entries = remote.target.read_inventory(DEPLOY / "boards.example.toml")
    assert [entry.name for entry in entries] == ["lab", "robot-7", "pc"]
    assert "--serve=--host 0.0.0.0 --port 8000" in entries[1].options() and "--bwlimit=4096" in entries[1].options()
    assert entries[2].values["bundle"] == str(DEPLOY / "bundle-rtx")


@pytest.mark.parametrize("folder", ["/", "..", "a/../b", "a b", "~root/x", "$HOME", "-x"])
def test_folders_that_are_not_taken(folder: str, remote: SimpleNamespace) -> None:
    with pytest.raises(remote.errors.UsageError, match="cannot be used"):
        remote.target.folder_of(folder)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("push",), 2, "give [USER@]HOST and BUNDLE"),
        (("push", "host"), 2, "give [USER@]HOST and BUNDLE"),
        (("logs", "a b"), 2, "is no host"),
        (("remove", "-oProxyCommand=x"), 2, ""),
        (("logs", "no-such-host.invalid"), 1, "no-such-host.invalid cannot be reached"),
        (("logs", "127.0.0.1", "--ssh-port", "1"), 1, "no ssh server listens there"),
    ],
)
@pytest.mark.skipif(shutil.which("ssh") is None or shutil.which("rsync") is None, reason="ssh or rsync not installed")
def test_wrong_use_is_one_sentence(words: tuple[str, ...], code: int, sentence: str) -> None:
    said = deploy(*words)
    assert said.returncode == code and sentence in said.stderr and "Traceback" not in said.stderr


@pytest.mark.parametrize("command", ["push", "bench", "logs", "remove"])
def test_help_has_examples(command: str) -> None:
    said = deploy(command, "--help")
    assert said.returncode == 0 and f"deploy/{command} nvidia@orin.local" in said.stdout


@pytest.mark.skipif(shutil.which("dash") is None, reason="no dash here, the strictest sh")
def test_scripts_of_the_board_are_posix() -> None:
    common = (DEPLOY / "board" / "common.sh").read_text()
    for script in (DEPLOY / "board").glob("*.sh"):
        subprocess.run(["dash", "-n"], input=common + script.read_text(), text=True, check=True)


def test_files_and_functions_stay_short() -> None:
    from tests.test_architecture import test_files_and_functions_stay_short as check

    for path in (DEPLOY / "remote").glob("*.py"):
        check(path)
