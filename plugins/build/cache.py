"""A folder for what is slow to make again, and what it was made from."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from edge.errors import EdgeError

ROOT = Path(__file__).resolve().parents[2]  # holds plugins/; the folder that includes start from

_INCLUDE = re.compile(r'^\s*#\s*include\s+"(plugins/[^"]+)"', re.MULTILINE)


def cache_folder(kind: str) -> Path:
    """$EDGE_CACHE, else minicpm-edge in $XDG_CACHE_HOME or ~/.cache; its folder for one kind of file, created."""
    own = os.environ.get("EDGE_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = (Path(own) if own else Path(shared) / "minicpm-edge") / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgeError(
            f"the cache folder {folder} cannot be made ({error.strerror}); set EDGE_CACHE to a folder to write in"
        ) from None
    return folder


def source_files(text: str, root: Path = ROOT) -> list[Path]:
    """The files in `root` that `text` reaches by `#include "plugins/..."`, sorted; those that are missing count too."""
    found: set[Path] = set()
    texts = [text]
    while texts:
        for name in _INCLUDE.findall(texts.pop()):
            path = root / name
            if path not in found:
                found.add(path)
                if path.is_file():
                    texts.append(path.read_text(encoding="utf-8"))
    return sorted(found)


def source_key(text: str, settings: Sequence[str], root: Path = ROOT) -> str:
    """sha256 over `settings` (compiler, options), a translation unit and the contents of all files it reaches."""

    digest = hashlib.sha256()
    parts = [*settings, text]
    for path in source_files(text, root):
        parts += [str(path.relative_to(root)), path.read_text(encoding="utf-8") if path.is_file() else ""]
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file that others may read, or run, at any time: they see the old one or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.chmod(mode)
        os.replace(partial, path)
    except OSError as error:
        raise EdgeError(
            f"writing {path} failed ({error.strerror}); free space there or set EDGE_CACHE to another folder"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
