"""The CPU kernels' tests on an emulated ARM processor: python -m tests.aarch64 --root FOLDER [pytest's arguments].

What is tested is the wheel for aarch64, as a board gets it, under QEMU's user mode. Tests come from this folder's
parent, everything else from the wheel and PyPI.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy.wheels import ROOT, build_wheel
from tests.aarch64.root import command, environment, make_root, missing_tool
from tests.synthetic import tiny_config, write_hf_checkpoint

FILES = (
    "test_block_linear.py",
    "test_tile_linear.py",
    "test_operators.py",
    "test_paged_attention.py",
    "test_infllmv2.py",
    "test_int8_cache.py",
    "test_tree_attention.py",
)


def main() -> int:
    """pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of the ARM system, made if it is not there")
    chosen, others = parser.parse_known_args()
    if (package := missing_tool()) is not None:
        print(f"the kernels' tests for ARM need the package {package}; apt-get install {package}", file=sys.stderr)
        return 1
    root = chosen.root.resolve()
    with tempfile.TemporaryDirectory() as name:
        make_root(root, build_wheel("aarch64", Path(name), {}))
    # Away from the sources, which would be imported instead of the wheel.
    shutil.rmtree(root / "work", ignore_errors=True)
    shutil.copytree(ROOT / "tests", root / "work" / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    files = [] if any(word.endswith(".py") for word in others) else [f"tests/{name}" for name in FILES]
    # Not those of the ONNX functions, which are ONNX Runtime's own operators.
    options = ["-q", "-p", "tests.aarch64.profile", "-p", "no:cacheprovider", "-k", "not function", "--durations", "5"]
    pytest = command(root, "-m", "pytest", *options, *others, *files)
    code = subprocess.run(pytest, cwd=root / "work", env=environment(root)).returncode
    return code or compare_replies(root)


def compare_replies(root: Path) -> int:
    """Export and run a small model there and here: 1, and both replies, if they differ."""
    replies = []
    with tempfile.TemporaryDirectory() as name:
        write_hf_checkpoint(Path(name, "checkpoint"), tiny_config(tie_word_embeddings=False), tokenizer=True)
        export = ["-m", "edge", "export", "checkpoint", "--out", "bundle", "--weights", "exact", "--overwrite"]
        run = ["-m", "edge", "run", "bundle", "--prompt", "the fox", "--temperature", "0", "--max-tokens", "16"]
        here = {**os.environ, "PYTHONPATH": str(ROOT)}
        for python, variables in ((command(root), environment(root)), ([sys.executable], here)):
            subprocess.run([*python, *export], cwd=name, env=variables, check=True, capture_output=True)
            done = subprocess.run([*python, *run], cwd=name, env=variables, check=True, capture_output=True)
            replies.append(done.stdout)
    same = replies[0] == replies[1]
    print("a small model, exported and run: the same reply there and here" if same else f"replies differ: {replies}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
