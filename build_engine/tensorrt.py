"""Bundle -> TensorRT engine in the bundle's folder `engines` (edge/engine_file.py).

The bundle's own files stay as they are. The compiler runs in a child process, see build_engine/tensorrt_compile.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from build_engine.lowering import Progress
from build_engine.tensorrt_child import compile_in_child
from build_engine.tensorrt_compile import Request
from build_engine.tensorrt_memory import estimate_memory, graph_sizes, refuse_beyond
from build_engine.tensorrt_profiles import BuildOptions, build_profiles
from edge.bundle import GRAPH, Bundle, hash_file, open_bundle
from edge.cuda import Device, open_device
from edge.engine_file import EngineFile, Measured, Recipe, engine_path, plugin_hash, read_engine, this_platform
from edge.errors import EdgeError, UsageError
from edge.tensorrt import TARGETS, Flavour, compute_capabilities, load_flavour
from plugins.build.cache import cache_folder
from plugins.launch import module_file

DEFAULTS = BuildOptions()


@dataclass(frozen=True)
class BuildReport:
    """An engine and where it comes from. cached: it was there already; notes: what the user should know."""

    engine: EngineFile
    cached: bool
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The engine's file."""
        return self.engine.path

    @property
    def recipe(self) -> Recipe:
        """What decided it."""
        return self.engine.recipe

    @property
    def measured(self) -> Measured:
        """What came out."""
        return self.engine.measured

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"path": str(self.path), "cached": self.cached, "notes": list(self.notes), **self.engine.to_dict()}

    def describe(self) -> str:
        """A few lines for the person at the terminal."""
        m, recipe = self.measured, self.recipe
        made = "unchanged since an earlier build" if self.cached else f"built in {m.seconds:.0f} s"
        what = "plugins" if recipe.plugins else "functions"
        line = (
            f"{self.path}: {m.bytes / 2**20:.0f} MiB with {what} for {', '.join(recipe.compute_capabilities)}, {made} "
            f"(peak memory {m.peak_rss_bytes / 2**30:.1f} GiB)"
        )
        where = f"driver {recipe.driver}" if recipe.driver else "no GPU"
        return "\n".join((line, f"built here ({where}): the engine has not been run", *self.notes))


def build_engine(
    bundle_path: Path,
    options: BuildOptions = DEFAULTS,
    progress: Progress = lambda done, total, name: None,
) -> BuildReport:
    """Compile the bundle's graph, or find the engine of the same key. Whatever stops it leaves no file behind."""
    bundle = open_bundle(bundle_path)
    _check(bundle, options)
    flavour = load_flavour(bundle.manifest.target)
    device = open_device() if flavour.needs_gpu else None
    notes = _notes(bundle, options)
    recipe = _recipe(bundle, options, flavour, device)
    path = engine_path(bundle.path, recipe)
    earlier = read_engine(path)
    if earlier is not None and earlier.recipe == recipe and earlier.is_intact():
        return BuildReport(earlier, cached=True, notes=notes)
    _refuse_without_memory(bundle, options, recipe, flavour, device)
    with _partial_engine(path) as partial:
        request = _request(bundle, recipe, partial, flavour, device)
        del device  # its context would stay beside the compiler's
        start = time.perf_counter()
        compiled = compile_in_child(request, options.memory, progress)
        seconds = round(time.perf_counter() - start, 3)
        size = partial.stat().st_size
        peaks = (compiled.peak_rss_bytes, compiled.peak_anonymous_bytes)
        engine = EngineFile(path, recipe, Measured(hash_file(partial), size, seconds, *peaks))
        _publish(engine, partial)
    return BuildReport(engine, cached=False, notes=(*notes, *compiled.notes))


def _check(bundle: Bundle, options: BuildOptions) -> None:
    exported_for = bundle.manifest.target
    if exported_for not in TARGETS or options.target not in (None, exported_for):
        raise UsageError(
            f"{bundle.path} was exported for {exported_for}; export the checkpoint again with "
            f"--target {options.target or TARGETS[0]} and build that bundle"
        )
    limit = bundle.manifest.limits["max_context"]
    if options.max_context is not None and options.max_context > limit:
        raise UsageError(
            f"--max-context {options.max_context} exceeds the model's limit of {limit} tokens; ask for less"
        )


def _notes(bundle: Bundle, options: BuildOptions) -> tuple[str, ...]:
    if options.plugins and not _has_kernels(bundle):
        return ("the bundle has no kernels for a model of its sizes: the engine has functions instead of plugins",)
    return ()


def _has_kernels(bundle: Bundle) -> bool:
    return any(name.endswith(".cubin") for name in bundle.manifest.files)


def _recipe(bundle: Bundle, options: BuildOptions, flavour: Flavour, device: Device | None) -> Recipe:
    plugins = options.plugins and _has_kernels(bundle)
    if device is None:
        capabilities = options.compute_capabilities
        offered = compute_capabilities(flavour)
        for name in capabilities:
            if name not in offered:
                raise UsageError(f"{flavour.name} does not compile for {name!r}; choose from {', '.join(offered)}")
    else:
        capabilities = (device.architecture.replace("_", ""),)
    if plugins:
        for name in capabilities:
            _kernels(bundle, name)
    limit = bundle.manifest.limits["max_context"]
    return Recipe(
        bundle=bundle.manifest.key,
        target=bundle.manifest.target,
        tensorrt=flavour.name,
        platform=this_platform(),
        compute_capabilities=capabilities,
        driver="" if device is None else ".".join(map(str, device.driver_version)),
        plugins=plugin_hash() if plugins else "",
        profiles=build_profiles(
            bundle.config,
            replace(options, max_context=options.max_context or limit),
            bundle.manifest.types["kv"],
        ),
    )


def _kernels(bundle: Bundle, capability: str) -> Path:
    """The bundle's machine code for 'sm87'; EdgeError if it has none."""
    name = module_file(capability.replace("sm", "sm_"))
    if name not in bundle.manifest.files:
        there = ", ".join(sorted(other for other in bundle.manifest.files if other.endswith(".cubin")))
        raise EdgeError(
            f"{bundle.path} has no kernels for {capability}, only {there}; export the checkpoint with the --target of "
            "that GPU, or build with --functions"
        )
    return bundle.file(name)


def _refuse_without_memory(
    bundle: Bundle, options: BuildOptions, recipe: Recipe, flavour: Flavour, device: Device | None
) -> None:
    sizes = graph_sizes(bundle.file(GRAPH))
    needed = estimate_memory(
        sizes,
        plugins=bool(recipe.plugins),
        streams=flavour.streams,
        shares_gpu=device is not None and device.is_integrated,
    )
    remedy = ""
    if not recipe.plugins and _has_kernels(bundle):
        remedy = ", build without --functions"
    elif bundle.manifest.weights["kind"] in ("exact", "fp16"):
        remedy = ", export with --weights w4a16"
    elif sizes.int4:
        remedy = ", export with --linear packed"
    refuse_beyond(needed, options.memory, bundle.path, remedy)


def _request(bundle: Bundle, recipe: Recipe, engine: Path, flavour: Flavour, device: Device | None) -> Request:
    kernels = timings = ""
    if device is not None:
        if recipe.plugins:
            kernels = str(_kernels(bundle, recipe.compute_capabilities[0]))
        key = json.dumps([flavour.name, device.name, device.architecture, recipe.driver])
        timings = str(cache_folder("timing") / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.cache")
    return Request(
        target=recipe.target,
        onnx=str(bundle.file(GRAPH)),
        engine=str(engine),
        profiles=[profile.shapes for profile in recipe.profiles],
        compute_capabilities=list(recipe.compute_capabilities),
        plugins=bool(recipe.plugins),
        kernels=kernels,
        timing_cache=timings,
    )


@contextmanager
def _partial_engine(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, held under the bundle's lock; it and an empty folder are removed at the end."""
    folder, partial = path.parent, path.parent / f".{path.name}.partial"
    lock = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise EdgeError(f"another build is writing in {folder}; wait for it to end") from None
    try:  # before the folder is made: Ctrl-C may come right after
        _make_partial(partial)
        yield partial
    finally:
        with suppress(OSError):  # the folder is no folder, or not empty: it holds engines
            partial.unlink(missing_ok=True)
            folder.rmdir()
        os.close(lock)


def _make_partial(partial: Path) -> None:
    folder = partial.parent
    try:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".*.partial"):  # of a build that was killed
            leftover.unlink()
        partial.touch()
    except OSError as error:
        raise EdgeError(
            f"cannot write in {folder} ({error.strerror}); copy the bundle to a folder that can be written"
        ) from None


def _publish(engine: EngineFile, partial: Path) -> None:
    """Rename both files into place, the .json last: an engine counts only with it."""
    path = engine.path
    partial_json = partial.with_suffix(".json.partial")
    try:
        partial_json.write_text(json.dumps(engine.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
        os.replace(partial_json, path.with_suffix(".json"))
    except OSError as error:
        raise EdgeError(f"writing {path} failed: {error.strerror}; free space there and build again") from None
    finally:
        partial_json.unlink(missing_ok=True)
