"""Checkpoint -> bundle, written beside its destination and renamed at the end, under a lock."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import onnx
from onnx import helper

from build_engine.checkpoint import Checkpoint
from build_engine.formats import Target, WeightFormat, make_target
from build_engine.graph import build_graph
from build_engine.lowering import Progress, lower
from build_engine.weights_file import WeightsFile
from edge.bundle import (
    CHAT_TEMPLATE,
    GRAPH,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    FileEntry,
    Manifest,
    hash_file,
    is_bundle,
)
from edge.errors import EdgeError, UsageError


@dataclass(frozen=True)
class ExportOptions:
    """What `edge export` decides."""

    target: str = "onnxruntime"
    weights: WeightFormat = field(default_factory=WeightFormat)
    overwrite: bool = False


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    options: ExportOptions = ExportOptions(),
    progress: Progress = lambda done, total, name: None,
) -> Path:
    """Write the bundle `out`. Whatever stops it leaves `out` as it was, and nothing that passes for a bundle."""
    target = make_target(options.target, options.weights)
    head_dim = checkpoint.config.head_dim
    if target.name == "onnxruntime" and (head_dim % 16 or head_dim > 1024):
        raise EdgeError(
            f"{checkpoint.path}: head_dim is {head_dim}, but the CPU attention kernel needs a multiple of 16 up to "
            "1024; choose another model"
        )
    if out.exists() and not options.overwrite:
        raise UsageError(f"{out} already exists; choose another --out or add --overwrite")
    if out.exists() and not is_bundle(out):
        raise UsageError(f"{out} exists and is not a bundle, so --overwrite will not replace it; choose another --out")
    with _staging_folder(out) as staging, _disk_errors(out):
        _write_files(checkpoint, staging, target, options, progress)
        _replace(staging, out)
    return out


def _write_files(
    checkpoint: Checkpoint, folder: Path, target: Target, options: ExportOptions, progress: Progress
) -> None:
    graph = build_graph(checkpoint.config, target.types)
    files: dict[str, FileEntry] = {}
    with WeightsFile(folder / WEIGHTS) as weights:
        model = lower(graph, checkpoint, target, options.weights, weights, progress)
        files[WEIGHTS] = FileEntry(weights.sha256, weights.bytes_written)
    texts = {}
    if checkpoint.text is not None:
        texts[TOKENIZER] = checkpoint.text.tokenizer_json
        if checkpoint.text.chat_template is not None:
            texts[CHAT_TEMPLATE] = checkpoint.text.chat_template
    (folder / GRAPH).write_bytes(model.SerializeToString())
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in (GRAPH, *texts):
        path = folder / name
        files[name] = FileEntry(hash_file(path), path.stat().st_size)
    manifest = _manifest(checkpoint, target, options, files)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _manifest(checkpoint: Checkpoint, target: Target, options: ExportOptions, files: dict[str, FileEntry]) -> Manifest:
    text = checkpoint.text
    settings = ("add_bos", "bos_token", "eos_token")
    return Manifest(
        name=checkpoint.path.name,
        model=checkpoint.config,
        weights={**asdict(options.weights), "description": options.weights.describe()},
        target=target.name,
        types={
            "activation": helper.tensor_dtype_to_np_dtype(target.types.activation).name,
            "kv": helper.tensor_dtype_to_np_dtype(target.types.kv).name,
        },
        limits={"max_context": checkpoint.config.max_position_embeddings},
        text=None if text is None else {name: getattr(text, name) for name in settings},
        generation=checkpoint.generation,
        files=files,
        tools={"minicpm-edge": version("minicpm-edge"), "onnx": onnx.__version__},
    )


@contextmanager
def _staging_folder(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out`, held under a lock and removed if it was not renamed away."""
    parent = out.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{parent} does not exist; create it or choose another --out")
    prefix = f".{out.name}.partial-"
    try:
        lock = (parent / f".{out.name}.lock").open("w")
    except OSError as error:
        raise EdgeError(f"cannot write in {parent} ({error.strerror}); choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EdgeError(f"another export is writing {out}; wait for it or choose another --out") from None
        for leftover in parent.glob(f"{prefix}*"):  # of an export that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        staging.chmod(0o755)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        free = shutil.disk_usage(out.absolute().parent).free
        raise EdgeError(
            f"writing {out} failed: {error.strerror} ({free / 2**20:.0f} MiB free); free space or choose another --out"
        ) from None


def _replace(staging: Path, out: Path) -> None:
    """Put the finished folder in place; an old bundle is moved aside first, so `out` is always one or the other."""
    _sync(staging)
    if not out.exists():
        os.rename(staging, out)
        return
    old = staging.with_name(f"{staging.name}-old")
    os.rename(out, old)
    os.rename(staging, out)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush every file, so that a power cut after the rename cannot leave a hole."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
