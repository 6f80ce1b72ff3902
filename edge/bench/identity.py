"""What exactly was measured: hashes of bundle, engine and sources, by which reports can be told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import edge
import plugins
from edge.bundle import hash_file
from edge.doctor import jetson
from edge.doctor.machine import COMMANDS, Output, gather, run_command
from edge.engine import Engine
from edge.engine_file import plugin_hash, read_engines

SOURCES = (".py", ".cu", ".cuh", ".h", ".cpp")  # of which a result may depend
NO_POWER_MODE = "none: no Jetson"


@dataclass(frozen=True)
class Identity:
    """bundle: the key that covers all of it; files: sha256 of each of its files, checked when it was opened. engine: of
    its TensorRT engine: file, key, sha256, tensorrt, driver; empty on the CPU. operators: sha256 of the CPU kernels'
    library, "" without. plugins, sources: sha256 of the plugins' Python sources that an engine depends on, and of all
    sources of this version, which a version number alone would not tell apart. power_mode: of a Jetson.
    """

    bundle: str
    files: dict[str, str]
    engine: dict[str, str]
    operators: str
    plugins: str
    version: str
    sources: str
    power_mode: str


def identify(engine: Engine) -> Identity:
    """Of an open engine; reads no weights."""
    manifest = engine.bundle.manifest
    return Identity(
        bundle=manifest.key,
        files={name: entry.sha256 for name, entry in manifest.files.items()},
        engine=_engine_facts(engine),
        operators=_operators_hash(engine),
        plugins=plugin_hash(),
        version=version("minicpm-edge"),
        sources=sources_hash([Path(edge.__file__).parent, Path(plugins.__file__).parent]),
        power_mode=power_mode(),
    )


def sources_hash(roots: Iterable[Path]) -> str:
    """sha256 over all sources below some packages, each with its path and length."""
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(path for path in root.rglob("*") if path.suffix in SOURCES):
            data = path.read_bytes()
            name = path.relative_to(root.parent).as_posix()
            digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def power_mode(root: Path = Path("/")) -> str:
    """As nvpmodel says; reads the few facts that `edge doctor` judges it by, and starts none of its probes."""
    machine = gather(root, _ask_nvpmodel)
    if not jetson.is_jetson(machine):
        return NO_POWER_MODE
    mode = jetson.power_mode(machine)
    return "unknown" if mode is None else mode.name


def _ask_nvpmodel(command: Sequence[str]) -> Output:
    return run_command(command) if tuple(command) == COMMANDS["nvpmodel"] else Output(None, "")


def _engine_facts(engine: Engine) -> dict[str, str]:
    key = engine.describe().get("engine")
    found = next((file for file in read_engines(engine.bundle) if file.recipe.key == key), None)
    if found is None:
        return {}
    return {
        "file": found.path.name,
        "key": found.recipe.key,
        "sha256": found.measured.sha256,
        "tensorrt": found.recipe.tensorrt,
        "driver": found.recipe.driver,
    }


def _operators_hash(engine: Engine) -> str:
    if engine.bundle.manifest.target != "onnxruntime":
        return ""
    from plugins.ort.library import find_library

    path = find_library()
    return "" if path is None else hash_file(path)
