"""A bundle's engine opened on the emulated driver, with the stand-in where TensorRT would run it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from build_engine.checkpoint import Checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.tensorrt import BuildOptions, build_profiles
from edge.bundle import GRAPH, Bundle, hash_file, open_bundle
from edge.config import ModelConfig
from edge.cuda import open_device
from edge.engine import Engine
from edge.engine_file import EngineFile, Measured, Recipe, engine_path, plugin_hash, this_platform
from edge.executors.tensorrt_open import open_executor
from edge.plan import EngineOptions
from edge.tensorrt import Flavour
from plugins.build.registry import kernels_for
from plugins.launch import Kernel
from tests.engine_stand_in import NAME, Api, write_engine

PACKED = WeightFormat("w4a16", 64, symmetric=True, head="int8", linear="packed")
BUILD = BuildOptions(max_context=512, chunk=64, batch=4)
OPTIONS = EngineOptions(context=512, chunk=64)


def device_bundle(checkpoint: Checkpoint, out: Path, target: str = "rtx", kv: str = "float16") -> Bundle:
    """Exported with int4 plugins, and what the stand-in takes for its engine beside it."""
    return open_bundle(export_bundle(checkpoint, out, ExportOptions(target, PACKED, kv=kv)))


def kernels_of(config: ModelConfig, kv_element: str = "half") -> list[Kernel]:
    """All kernels of a `device_bundle`."""
    return kernels_for(config, "half", kv_element, (4, 64), (8, 64))


def engine_file(bundle: Bundle, build: BuildOptions = BUILD) -> EngineFile:
    """The stand-in's engine."""
    path = bundle.path / "engines" / "stand-in.engine"
    path.parent.mkdir(exist_ok=True)
    profiles = build_profiles(bundle.config, build, bundle.manifest.types["kv"])
    write_engine(bundle.file(GRAPH), profiles, path)
    recipe = Recipe(bundle.manifest.key, bundle.manifest.target, NAME, "any", (), "", plugin_hash(), profiles)
    return EngineFile(path, recipe, Measured("", path.stat().st_size, 0, 0, 0))


def publish_engine(bundle: Bundle, architecture: str) -> Path:
    """The stand-in's engine as `edge build` would leave a real one, to be found by the commands."""
    file = engine_file(bundle)
    recipe = replace(file.recipe, platform=this_platform(), compute_capabilities=(architecture.replace("_", ""),))
    path = engine_path(bundle.path, recipe)
    file.path.rename(path)
    published = EngineFile(path, recipe, replace(file.measured, sha256=hash_file(path)))
    path.with_suffix(".json").write_text(json.dumps(published.to_dict()))
    return path


def open_on_device(
    bundle: Bundle, options: EngineOptions = OPTIONS, api: Any = None, build: BuildOptions = BUILD
) -> Engine:
    """The engine over the device that is current."""
    flavour = Flavour(NAME, api or Api())
    executor, plan, chunk = open_executor(bundle, options, open_device(), flavour, engine_file(bundle, build))
    return Engine(bundle, executor, plan, chunk)
