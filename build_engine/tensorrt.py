"""Bundle -> TensorRT engine: `<bundle>/engines/<target>-<key>.engine` and a .json that tells how it was made.

The bundle's own files stay as they are. The compiler runs in a child process, see build_engine/tensorrt_compile.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from build_engine.lowering import Progress
from build_engine.tensorrt_compile import PROGRESS_TOTAL, Request, Shape
from build_engine.tensorrt_flavour import Flavour, load_flavour
from edge.bundle import GRAPH, Bundle, hash_file, open_bundle
from edge.config import ModelConfig
from edge.errors import EdgeError, UsageError
from edge.kv_cache import pages_for, pool_shapes

SCHEMA_VERSION = 1  # raised when a recipe comes to mean another engine
ENGINES = "engines"
TYPICAL_CONTEXT = 4096  # tokens; the length that shapes are tuned for


@dataclass(frozen=True)
class BuildOptions:
    """What `edge build` decides. max_context in tokens (None: the model's); chunk: prompt tokens a step;
    batch: sequences a decode step; compute capabilities: the GPUs the engine is compiled for (RTX 30, 40, 50)."""

    target: str = "rtx"
    max_context: int | None = None
    chunk: int = 512
    batch: int = 8
    compute_capabilities: tuple[str, ...] = ("sm86", "sm89", "sm120")

    def __post_init__(self) -> None:
        for name in ("max_context", "chunk", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


@dataclass(frozen=True)
class Profile:
    """Shapes an engine accepts: {input: (min, opt, max)}."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class Recipe:
    """All that decides what an engine computes and accepts. `bundle`: its key; `platform` as 'linux-x86_64'."""

    bundle: str
    target: str
    tensorrt: str
    platform: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]

    @property
    def key(self) -> str:
        """sha256 over all of it."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Measured:
    """What a finished build knows about its engine; peak_rss_bytes is the compiling process's."""

    sha256: str
    bytes: int
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class BuildReport:
    """An engine and where it comes from; `cached`: it was there already."""

    path: Path
    recipe: Recipe
    measured: Measured
    cached: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"path": str(self.path), "cached": self.cached, **_contents(self.path, self.recipe, self.measured)}

    def describe(self) -> str:
        """Two lines for the person at the terminal."""
        m = self.measured
        made = "unchanged since an earlier build" if self.cached else f"built in {m.seconds:.0f} s"
        return (
            f"{self.path}: {m.bytes / 2**20:.0f} MiB for {', '.join(self.recipe.compute_capabilities)}, {made} "
            f"(peak memory {m.peak_rss_bytes / 2**30:.1f} GiB)\n"
            "built here (no GPU): the engine has not been run"
        )


def build_engine(
    bundle_path: Path,
    options: BuildOptions = BuildOptions(),
    progress: Progress = lambda done, total, name: None,
) -> BuildReport:
    """Compile the bundle's graph, or find the engine of the same key. Whatever stops it leaves no file behind."""
    flavour = load_flavour(options.target)
    bundle = open_bundle(bundle_path)
    _check(bundle, options, flavour)
    limit = bundle.manifest.limits["max_context"]
    recipe = Recipe(
        bundle=bundle.manifest.key,
        target=options.target,
        tensorrt=flavour.name,
        platform=f"{platform.system()}-{platform.machine()}".lower(),
        compute_capabilities=options.compute_capabilities,
        profiles=build_profiles(bundle.config, replace(options, max_context=options.max_context or limit)),
    )
    path = bundle.path / ENGINES / f"{options.target}-{recipe.key[:12]}.engine"
    if (cached := _read_cached(path, recipe)) is not None:
        return BuildReport(path, recipe, cached, cached=True)
    with _partial_engine(path) as partial:
        request = Request(
            target=options.target,
            onnx=str(bundle.file(GRAPH)),
            engine=str(partial),
            profiles=[profile.shapes for profile in recipe.profiles],
            compute_capabilities=list(options.compute_capabilities),
        )
        start = time.perf_counter()
        peak = _compile_in_child(request, progress)
        seconds = time.perf_counter() - start
        measured = Measured(hash_file(partial), partial.stat().st_size, round(seconds, 3), peak)
        _publish(path, recipe, measured, partial)
    return BuildReport(path, recipe, measured, cached=False)


def build_profiles(config: ModelConfig, options: BuildOptions) -> tuple[Profile, Profile]:
    """Prefill: one sequence, up to `chunk` tokens. Decode: up to `batch` sequences of one token.

    The inputs are those of graph.graph_inputs. In both the KV pool may have from one page to those of `batch`
    sequences of `max_context` tokens.
    """
    context = options.max_context or config.max_position_embeddings
    chunk = min(options.chunk, context)
    pages = (1, pages_for(min(TYPICAL_CONTEXT, context)), pages_for(context))
    pool_pages = (1, pages[1], pages[2] * options.batch)
    one, batch = (1, 1, 1), (1, 1, options.batch)
    return (
        _profile("prefill", config, (1, chunk, chunk), one, (1, 1, chunk), pages, pool_pages),
        _profile("decode", config, batch, batch, batch, pages, pool_pages),
    )


Range = tuple[int, int, int]  # min, opt, max


def _profile(
    name: str, config: ModelConfig, tokens: Range, sequences: Range, rows: Range, pages: Range, pool_pages: Range
) -> Profile:
    def shapes(*dimensions: Range) -> tuple[Shape, Shape, Shape]:
        smallest, typical, largest = zip(*dimensions, strict=True)
        return smallest, typical, largest

    inputs = {
        "input_ids": shapes(tokens),
        "positions": shapes(tokens),
        "query_start": shapes((sequences[0] + 1, sequences[1] + 1, sequences[2] + 1)),
        "page_table": shapes(sequences, pages),
        "logits_rows": shapes(rows),
    }
    if config.switches_on_length:
        inputs["switch_length"] = shapes(sequences)
    for pool, page in pool_shapes(config).items():
        for layer in range(config.num_hidden_layers):
            inputs[f"{pool}.{layer}"] = shapes(pool_pages, *((size,) * 3 for size in page))
    return Profile(name, inputs)


def _check(bundle: Bundle, options: BuildOptions, flavour: Flavour) -> None:
    exported_for = bundle.manifest.target
    if exported_for != options.target:
        raise UsageError(
            f"{bundle.path} was exported for {exported_for}; export the checkpoint again with "
            f"--target {options.target} and build that bundle"
        )
    limit = bundle.manifest.limits["max_context"]
    if options.max_context is not None and options.max_context > limit:
        raise UsageError(
            f"--max-context {options.max_context} exceeds the model's limit of {limit} tokens; ask for less"
        )
    offered = [name.lower() for name in flavour.api.ComputeCapability.__members__ if name.startswith("SM")]
    for name in options.compute_capabilities:
        if name not in offered:
            raise UsageError(f"{flavour.name} does not compile for {name!r}; choose from {', '.join(offered)}")


def _contents(path: Path, recipe: Recipe, measured: Measured) -> dict[str, Any]:
    """The values of the .json beside the engine."""
    return {
        "schema_version": SCHEMA_VERSION,
        "engine": path.name,
        "key": recipe.key,
        "tools": {"minicpm-edge": version("minicpm-edge")},
        **asdict(measured),
        **asdict(recipe),
    }


def _read_cached(path: Path, recipe: Recipe) -> Measured | None:
    """What an earlier build of the same recipe measured, if engine and .json are there and undamaged."""
    try:
        values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        measured = Measured(**{field.name: values[field.name] for field in fields(Measured)})
        intact = values["key"] == recipe.key and hash_file(path) == measured.sha256
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return measured if intact else None


@contextmanager
def _partial_engine(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, held under the bundle's lock; it and an empty folder are removed at the end."""
    folder = path.parent
    bundle = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(bundle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".*.partial"):  # of a build that was killed
            leftover.unlink()
        partial = folder / f".{path.name}.partial"
        partial.touch()
    except BlockingIOError:
        os.close(bundle)
        raise EdgeError(f"another build is writing in {folder}; wait for it to end") from None
    except OSError as error:
        os.close(bundle)
        raise EdgeError(
            f"cannot write in {folder} ({error.strerror}); copy the bundle to a folder that can be written"
        ) from None
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: it holds engines
            folder.rmdir()
        os.close(bundle)


def _publish(path: Path, recipe: Recipe, measured: Measured, partial: Path) -> None:
    """Rename both files into place, the .json last: an engine counts only with it."""
    partial_json = partial.with_suffix(".json.partial")
    try:
        contents = json.dumps(_contents(path, recipe, measured), indent=1)
        partial_json.write_text(contents + "\n", encoding="utf-8")
        os.replace(partial, path)
        os.replace(partial_json, path.with_suffix(".json"))
    except OSError as error:
        raise EdgeError(f"writing {path} failed: {error.strerror}; free space there and build again") from None
    finally:
        partial_json.unlink(missing_ok=True)


def _compile_in_child(request: Request, progress: Progress) -> int:
    """Run tensorrt_compile.main -> its peak memory in bytes. An exception here, such as Ctrl-C, ends the child."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from build_engine.tensorrt_compile import main; main()"
    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            start_new_session=True,  # the terminal's Ctrl-C comes here only
            text=True,
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            with suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(json.dumps(asdict(request)))
            peak = _listen(child.stdout, progress)
            child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if peak is None:
            raise EdgeError(f"building {request.onnx} failed: TensorRT {_cause_of_death(child.returncode, noise)}")
        return peak


def _listen(messages: IO[str], progress: Progress) -> int | None:
    """Pass progress on until the result: peak memory in bytes, an EdgeError, or None if the child died."""
    for line in messages:
        message = json.loads(line)
        if "error" in message:
            raise EdgeError(message["error"])
        if "peak_rss_bytes" in message:
            return int(message["peak_rss_bytes"])
        progress(message["progress"], PROGRESS_TOTAL, message["name"])
    return None


def _cause_of_death(returncode: int, noise: IO[bytes]) -> str:
    if returncode == -signal.SIGKILL:
        return "was killed, most likely for lack of memory; close other programs or build on a larger machine"
    noise.seek(0)
    words = noise.read().decode(errors="replace").strip().splitlines()
    cause = f"ended with {signal.Signals(-returncode).name if returncode < 0 else f'exit code {returncode}'}"
    return f"{cause}: {words[-1]}" if words else cause
