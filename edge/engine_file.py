"""Engine files of a bundle: `<bundle>/engines/<target>-<key>.engine` and a .json that tells how each was made.

The vocabulary that build_engine/tensorrt.py writes and the executor reads; nothing here needs TensorRT.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import plugins
from edge.bundle import Bundle, hash_file
from edge.errors import EdgeError

SCHEMA_VERSION = 2  # raised when a recipe comes to mean another engine
ENGINES = "engines"
_PLUGIN_SOURCES = ("launch.py", "plugin.py", "tensorrt.py", "*/trt.py", "*/launch.py")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Shapes an engine accepts: {input: (min, opt, max)}."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class Recipe:
    """All that decides what an engine computes and accepts.

    bundle: its key, which covers weights and kernels; platform: as 'linux-x86_64'; compute_capabilities: as 'sm86';
    driver: of the GPU it was built on, as '12.6', "" if it needed none; plugins: `plugin_hash`, "" for functions.
    """

    bundle: str
    target: str
    tensorrt: str
    platform: str
    compute_capabilities: tuple[str, ...]
    driver: str
    plugins: str
    profiles: tuple[Profile, ...]

    @property
    def key(self) -> str:
        """sha256 over all of it."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Measured:
    """What a finished build knows about its engine. Of the compiling process: peak_rss_bytes is what was resident,
    mapped weights included; peak_anonymous_bytes (sampled) what could not be dropped."""

    sha256: str
    bytes: int
    seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int


@dataclass(frozen=True)
class EngineFile:
    """An engine, how it was made and what came out."""

    path: Path
    recipe: Recipe
    measured: Measured

    def to_dict(self) -> dict[str, Any]:
        """The values of the .json beside the engine."""
        return {
            "schema_version": SCHEMA_VERSION,
            "engine": self.path.name,
            "key": self.recipe.key,
            "tools": {"minicpm-edge": version("minicpm-edge")},
            **asdict(self.measured),
            **asdict(self.recipe),
        }

    def is_intact(self) -> bool:
        """Whether the engine still has the bytes that were built; reads all of it."""
        try:
            return self.path.stat().st_size == self.measured.bytes and hash_file(self.path) == self.measured.sha256
        except OSError:
            return False


def this_platform() -> str:
    """As 'linux-x86_64': engines run on no other."""
    return f"{platform.system()}-{platform.machine()}".lower()


def plugin_hash() -> str:
    """sha256 over the plugins' Python sources: scratch sizes and attributes that they gave an engine are part of it."""
    root = Path(plugins.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _PLUGIN_SOURCES for path in root.glob(pattern)):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def engine_path(bundle: Path, recipe: Recipe) -> Path:
    """Where the engine of a recipe lies."""
    return bundle / ENGINES / f"{recipe.target}-{recipe.key[:12]}.engine"


def read_engine(path: Path) -> EngineFile | None:
    """What the .json beside an engine says; None if there is none, or no sound one of this schema."""
    try:
        values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        measured = Measured(**{field.name: values[field.name] for field in fields(Measured)})
        recipe = _recipe({field.name: values[field.name] for field in fields(Recipe)})
        sound = values["key"] == recipe.key and values["engine"] == path.name
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return EngineFile(path, recipe, measured) if sound else None


def _recipe(values: dict[str, Any]) -> Recipe:
    profiles = tuple(
        Profile(profile["name"], {name: _bounds(bounds) for name, bounds in profile["shapes"].items()})
        for profile in values["profiles"]
    )
    capabilities = tuple(values["compute_capabilities"])
    return Recipe(**{**values, "compute_capabilities": capabilities, "profiles": profiles})


def _bounds(bounds: Any) -> tuple[Shape, Shape, Shape]:
    smallest, typical, largest = (tuple(shape) for shape in bounds)
    return smallest, typical, largest


def read_engines(bundle: Bundle) -> list[EngineFile]:
    """The bundle's engines with a sound .json, newest first; whether their bytes are is not checked."""
    folder = bundle.path / ENGINES
    found = [engine for path in folder.glob("*.engine") if (engine := read_engine(path)) is not None]
    return sorted(found, key=lambda engine: (_built_at(engine.path), engine.path.name), reverse=True)


def _built_at(path: Path) -> int:
    try:
        return path.with_suffix(".json").stat().st_mtime_ns
    except OSError:
        return 0


def choose_engine(bundle: Bundle, *, tensorrt: str, architecture: str) -> EngineFile:
    """The newest intact engine for this TensorRT ('TensorRT 10.3.0') and GPU ('sm_87'); functions only without plugins.

    Another driver is no reason against one: TensorRT itself knows which it takes. EdgeError says why none fits.
    """
    reasons = []
    for engine in sorted(read_engines(bundle), key=lambda engine: engine.recipe.plugins == ""):
        reason = _unfit(engine, bundle, tensorrt, architecture)
        if reason is None and not engine.is_intact():
            reason = "is damaged"
        if reason is None:
            return engine
        reasons.append(f"{engine.path.name} {reason}")
    there = "; ".join(reasons) or "there is none yet"
    raise EdgeError(
        f"{bundle.path} has no engine for {tensorrt} on {architecture} ({there}); run: "
        f"edge build {bundle.path} --target {bundle.manifest.target}"
    )


def _unfit(engine: EngineFile, bundle: Bundle, tensorrt: str, architecture: str) -> str | None:
    """Why an engine is not the one to run; None if it is."""
    recipe = engine.recipe
    if recipe.bundle != bundle.manifest.key:
        return "was built from another export"
    if recipe.tensorrt != tensorrt:
        return f"was built by {recipe.tensorrt}"
    if recipe.platform != this_platform():
        return f"is for {recipe.platform}"
    if architecture.replace("_", "") not in recipe.compute_capabilities:
        return f"is for {', '.join(recipe.compute_capabilities)}"
    if recipe.plugins not in ("", plugin_hash()):
        return "was built with other plugins than this version's"
    return None
