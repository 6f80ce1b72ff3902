"""What a board has, and whether that is enough: asked before anything is transferred."""

from __future__ import annotations

from dataclasses import dataclass

from .content import MANIFEST, Bundle
from .errors import DeployError
from .terminal import size

VENV_BYTES = 400 << 20  # numpy, onnx, onnxruntime and the server's packages
_MARGIN = 16 << 20
PYTHONS = "3.10 to 3.13"
OLDEST_L4T = (36, 4)  # of JetPack 6.1, as in edge/doctor/jetson.py


@dataclass(frozen=True)
class Board:
    """Facts that board/check.sh printed. python: its path, None if there is none to use. Sizes in bytes.

    has: sha256 of the active release's files; staged: bytes of releases that were begun, by ID.
    """

    architecture: str
    user: str
    disk: int
    memory: int
    available: int
    python: str | None
    python_version: str
    old_python: str | None
    bare_python: str | None
    has_rsync: bool
    l4t: str | None
    current: str | None
    venvs: frozenset[str]
    has: frozenset[str]
    staged: dict[str, int]
    is_root: bool
    unit: str

    def describe(self) -> str:
        """In one line."""
        jetpack = f", L4T {self.l4t}" if self.l4t else ""
        return (
            f"{self.architecture}{jetpack}, Python {self.python_version}, {size(self.disk)} disk and "
            f"{size(self.available)} memory free"
        )


def read_board(lines: str) -> Board:
    """From check.sh's lines."""
    pairs = [line.partition(" ")[::2] for line in lines.splitlines()]
    one = dict(pairs)
    path, _, version = one.get("python", "").partition(" ")
    l4t = one.get("l4t", "").replace("# ", "").split(" (release), REVISION: ")
    return Board(
        architecture=one["arch"],
        user=one["user"],
        disk=int(one["disk_kb"]) << 10,
        memory=int(one["memory_kb"]) << 10,
        available=int(one["available_kb"]) << 10,
        python=path or None,
        python_version=version,
        old_python=one.get("old_python"),
        bare_python=one.get("bare_python"),
        has_rsync="rsync" in one,
        l4t=".".join(part.split(",")[0].removeprefix("R") for part in l4t) or None,
        current=one.get("current"),
        venvs=frozenset(value for name, value in pairs if name == "venv"),
        has=frozenset(value for name, value in pairs if name == "has"),
        staged={value.partition(" ")[2]: int(value.split()[0]) << 10 for name, value in pairs if name == "staged"},
        is_root="root" in one,
        unit=one.get("unit", ""),
    )


def check_board(board: Board, target: str) -> None:
    """DeployError if the board lacks what a release for that target needs; edge doctor looks closer, on the board."""
    if target == "jetson" and board.l4t and tuple(map(int, board.l4t.split(".")[:2])) < OLDEST_L4T:
        raise DeployError(
            f"the board has Jetson Linux {board.l4t}, whose TensorRT is older than 10.3; update it to JetPack 6.2"
        )
    if not board.has_rsync:
        raise DeployError("the board has no rsync; run there: sudo apt install rsync")
    if board.python is not None:
        return
    if board.bare_python:
        package = f"python{board.bare_python}-venv"
        raise DeployError(f"the board's Python {board.bare_python} has no venv; run there: sudo apt install {package}")
    there = f"its Python {board.old_python} is not" if board.old_python else "the board has none"
    raise DeployError(f"Python {PYTHONS} is needed and {there}; JetPack 6.2 has 3.10, 7.2 has 3.12")


def check_room(board: Board, bundle: Bundle, release: str, wheel: int, wheelhouse: int, *, new_venv: bool) -> list[str]:
    """Warnings; DeployError with numbers if disk or memory are too small. wheel, wheelhouse: bytes that are to come."""
    missing = sum(entry.bytes for entry in bundle.files.values() if entry.sha256 not in board.has)
    is_new = bundle.files[MANIFEST].sha256 not in board.has  # else the active release has an engine of it
    parts = {
        "bundle": max(0, missing - board.staged.get(release, 0)),
        "packages": wheel + (VENV_BYTES + wheelhouse if new_venv else 0),
        "engine": 2 * bundle.weights if bundle.needs_engine and is_new else 0,
    }
    needed = sum(parts.values()) + _MARGIN
    if needed > board.disk:
        listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
        raise DeployError(
            f"the board's disk has {size(board.disk)} free and {size(needed)} are needed ({listed}, rest "
            f"{size(_MARGIN)}); make room, or choose another disk with --dir"
        )
    if bundle.weights > board.memory:
        raise DeployError(
            f"the weights have {size(bundle.weights)} and the board has {size(board.memory)} of memory; use a smaller "
            "model, or export with fewer bits"
        )
    if bundle.weights > board.available:
        free = size(board.available)
        return [f"only {free} of memory are free for {size(bundle.weights)} of weights; close other programs"]
    return []
