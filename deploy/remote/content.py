"""What is to be pushed: a bundle's files and the wheel that runs them, and the name that this content has."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import DeployError, UsageError

ROOT = Path(__file__).resolve().parents[2]  # of the source tree
MANIFEST, GOLDEN, WEIGHTS = "manifest.json", "golden.json", "model.weights"
CPU = "onnxruntime"
# Of the wheel, beside `serve`, by the bundle's target.
_EXTRAS = {CPU: "", "jetson": "jetson,", "rtx": "rtx,cuda,", "tensorrt": "cuda,"}


@dataclass(frozen=True)
class FileEntry:
    """A file's sha256 and size."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Bundle:
    """A bundle as its manifest describes it; its files are not read. has_text: it has a tokenizer."""

    path: Path
    name: str
    target: str
    key: str
    has_text: bool
    files: dict[str, FileEntry]

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return self.files[WEIGHTS].bytes

    @property
    def extras(self) -> str:
        """Of the wheel, as pip takes them."""
        return f"{_EXTRAS[self.target]}serve"

    @property
    def needs_engine(self) -> bool:
        """Whether a board builds an engine from it."""
        return self.target != CPU


def read_bundle(path: Path) -> Bundle:
    """UsageError if it is none; sizes are compared, contents only after they have arrived."""
    try:
        text = (path / MANIFEST).read_bytes()
        values: dict[str, Any] = json.loads(text)
        files = {name: FileEntry(entry["sha256"], entry["bytes"]) for name, entry in values["files"].items()}
        name, target, key, has_text = values["name"], values["target"], values["key"], values["text"] is not None
        if any(Path(file).name != file for file in files) or not {WEIGHTS} <= files.keys() or target not in _EXTRAS:
            raise ValueError
    except FileNotFoundError:
        raise UsageError(f"{path} is no bundle (it has no {MANIFEST}); make one with `edge export`") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path / MANIFEST} is damaged, or of another version; export the bundle again") from None
    for file, entry in files.items():
        there = (path / file).stat().st_size if (path / file).is_file() else None
        if there != entry.bytes:
            what = "is missing" if there is None else f"has {there} bytes instead of {entry.bytes}"
            raise DeployError(f"the bundle's file {path / file} {what}; export the bundle again")
    files[MANIFEST] = FileEntry(hashlib.sha256(text).hexdigest(), len(text))
    if (path / GOLDEN).is_file():
        files[GOLDEN] = entry_of(path / GOLDEN)
    return Bundle(path, name, target, key, has_text, files)


def entry_of(path: Path) -> FileEntry:
    """Read a file for its hash."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return FileEntry(digest.hexdigest(), path.stat().st_size)


def find_wheel(given: Path | None, architecture: str, python: str) -> Path:
    """The wheel for a board: the one given, else the newest of dist/ that fits, else one that is built now.

    architecture: as 'aarch64'; python: as '3.10'. One with the CPU's operators is better than one without.
    """
    if given is not None:
        if not given.is_file():
            raise UsageError(f"the wheel {given} does not exist; build wheels with: make wheels")
        if not fits(given.name, architecture, python):
            raise UsageError(
                f"{given.name} is not for Python {python} on {architecture}; build wheels with: make wheels"
            )
        return given
    folder = ROOT / "dist"
    if (found := _best(folder, architecture, python)) is not None:
        return found
    if architecture != platform.machine():
        raise DeployError(f"{folder} has no wheel for Python {python} on {architecture}; build it with: make wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode or (found := _best(folder, architecture, python)) is None:
        last = (built.stderr.strip().splitlines() or ["it is for another Python"])[-1]
        raise DeployError(f"no wheel for Python {python} could be built ({last}); try: make wheels")
    return found


def _best(folder: Path, architecture: str, python: str) -> Path | None:
    fitting = [path for path in folder.glob("minicpm_edge-*.whl") if fits(path.name, architecture, python)]
    return max(fitting, key=lambda path: (not path.stem.endswith("-any"), path.stat().st_mtime), default=None)


def fits(name: str, architecture: str, python: str) -> bool:
    """Whether a wheel's tags allow it on Linux with this processor and Python."""
    *_, pythons, _, platforms = name.removesuffix(".whl").split("-")
    ours = {"py3", f"cp{python.replace('.', '')}", f"py{python.replace('.', '')}"}
    return bool(ours & set(pythons.split("."))) and any(
        tag == "any" or (tag.endswith(f"_{architecture}") and "linux" in tag) for tag in platforms.split(".")
    )


@dataclass(frozen=True)
class Settings:
    """How the release is to run there: options of `edge build`, of `edge serve`, and of both `run` and `serve`."""

    build: tuple[str, ...] = ()
    serve: tuple[str, ...] = ()
    engine: tuple[str, ...] = ()

    @property
    def environment(self) -> str:
        """The service's environment file."""
        return f"EDGE_SERVE_OPTIONS={' '.join([*self.engine, *self.serve])}\nEDGE_READY={self.ready_url}"

    @property
    def ready_url(self) -> str:
        """Where the server says whether it is ready."""
        chosen = {"--host": "127.0.0.1", "--port": "8000"}
        words = [part for word in self.serve for part in word.split("=", 1)]
        chosen |= {name: value for name, value in pairwise(words) if name in chosen}
        host = "127.0.0.1" if chosen["--host"] in ("0.0.0.0", "::") else chosen["--host"]
        return f"http://{f'[{host}]' if ':' in host else host}:{chosen['--port']}/ready"


@dataclass(frozen=True)
class Content:
    """A release. Its `id` names all that can change what it does, so that the same content is the same release."""

    bundle: Bundle
    wheel: Path
    settings: Settings
    wheelhouse: Path | None = None
    wheel_entry: FileEntry = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "wheel_entry", entry_of(self.wheel))

    @property
    def wheel_folder(self) -> str:
        """Where the wheel lies among a board's wheels."""
        return self.wheel_entry.sha256[:12]

    @property
    def venv(self) -> str:
        """The environment's name: by the wheel and its extras."""
        return f"{self.wheel_folder}-{self.bundle.extras.replace(',', '-')}"

    @property
    def id(self) -> str:
        """12 hexadecimal digits."""
        files = {name: entry.sha256 for name, entry in self.bundle.files.items()}
        settings = [self.settings.build, self.settings.environment]
        values = json.dumps([files, self.venv, settings], sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:12]

    @property
    def sums(self) -> str:
        """The release's files as sha256sum writes them."""
        return "\n".join(f"{entry.sha256}  bundle/{name}" for name, entry in sorted(self.bundle.files.items()))
