"""deploy/push to a board without a network or packages: a folder of wheels, fetched as the guide says, is enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.loopback_board import MISSING, build_wheel, loopback_board


@pytest.mark.long
@pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}")
def test_a_wheelhouse_is_all_that_a_bare_board_needs(tiny_bundle: Path, tmp_path: Path) -> None:
    wheel, house = build_wheel(tmp_path / "wheel"), tmp_path / "wheelhouse"
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", house, "--only-binary=:all:"]
    subprocess.run([*fetch, f"{wheel}[serve]"], check=True, capture_output=True)
    with loopback_board(tmp_path / "board", bare=True) as board:
        refused = board.deploy("push", "board", tiny_bundle, "--wheel", wheel)
        assert refused.returncode == 1 and "a board without a network needs --wheelhouse" in refused.stderr
        assert board.active is None
        done = board.deploy("push", "board", tiny_bundle, "--wheel", wheel, "--wheelhouse", house)
        assert done.returncode == 0, done.stdout + done.stderr
        assert board.active is not None
        (venv,) = board.folder.glob("venvs/*")
        python = [venv / "bin" / "python", "-I", "-c"]
        place = "import onnxruntime, numpy, fastapi; print(onnxruntime.__file__, numpy.__file__, fastapi.__file__)"
        found = subprocess.run([*python, place], check=True, capture_output=True, text=True).stdout.split()
        assert len(found) == 3 and all(path.startswith(str(venv)) for path in found), found
