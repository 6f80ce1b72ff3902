"""Checkpoint -> bundle, written beside its destination and renamed at the end, under a lock."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import onnx
from onnx import helper

from build_engine.checkpoint import Checkpoint
from build_engine.draft_export import DraftExport, draft_kernels, draft_section, lower_draft, vocab_file
from build_engine.formats import Target, WeightFormat, make_target, plugin_kernels
from build_engine.graph import build_graph
from build_engine.long_context import LongContext, apply_long_context, max_context
from build_engine.lowering import Progress, describe_weights, lower
from build_engine.weights_file import WeightsFile
from edge.bundle import (
    CHAT_TEMPLATE,
    DRAFT_GRAPH,
    DRAFT_VOCAB,
    GRAPH,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    FileEntry,
    Manifest,
    is_bundle,
)
from edge.config import ModelConfig
from edge.errors import EdgeError, UsageError
from plugins.build.embed import TARGETS, kernel_modules

OLD = "-old"  # ends the name of a bundle that is being replaced


@dataclass(frozen=True)
class ExportOptions:
    """What `edge export` decides."""

    target: str = "onnxruntime"
    weights: WeightFormat = field(default_factory=WeightFormat)
    overwrite: bool = False
    long_context: LongContext = field(default_factory=LongContext)
    kv: str | None = None
    draft: DraftExport | None = None


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    options: ExportOptions = ExportOptions(),
    progress: Progress = lambda done, total, name: None,
) -> Path:
    """Write the bundle `out`. Whatever stops it leaves `out` as it was, and nothing that passes for a bundle."""
    target = make_target(options.target, options.weights, options.kv)
    checkpoint = replace(checkpoint, config=apply_long_context(checkpoint.config, options.long_context))
    head_dim = checkpoint.config.head_dim
    if target.name == "onnxruntime" and (head_dim % 16 or head_dim > 1024):
        raise EdgeError(
            f"{checkpoint.path}: head_dim is {head_dim}, but the CPU attention kernel needs a multiple of 16 up to "
            "1024; choose another model"
        )
    place = Path(os.path.realpath(out))  # a link to a bundle stays one
    check_place(out, options.overwrite)
    with _disk_errors(out), _lock(place):
        _recover(place)
        check_place(out, options.overwrite)  # again, for what was recovered or finished meanwhile
        with _staging_folder(place) as staging:
            _write_files(checkpoint, staging, target, options, progress)
            _replace(staging, place)
    return out


def check_place(out: Path, overwrite: bool) -> None:
    """UsageError unless a bundle may be written as `out`."""
    place = Path(os.path.realpath(out))
    if not place.parent.is_dir():
        raise UsageError(f"{place.parent} is no folder to write in; create it or choose another --out")
    if place.exists() and not overwrite:
        raise UsageError(f"{out} already exists; choose another --out or add --overwrite")
    if place.exists() and not is_bundle(place):
        raise UsageError(f"{out} exists and is not a bundle, so --overwrite will not replace it; choose another --out")


def _write_files(
    checkpoint: Checkpoint, folder: Path, target: Target, options: ExportOptions, progress: Progress
) -> None:
    draft = options.draft
    modules = _kernel_modules(checkpoint.config, target, options)  # first, for it may lack the compilers
    graph = build_graph(checkpoint.config, target.types, hidden=draft is not None)
    files: dict[str, FileEntry] = {}
    contents: dict[str, bytes] = {}
    section = None
    with WeightsFile(folder / WEIGHTS) as weights:
        model = lower(graph, checkpoint, target, options.weights, weights, progress)
        contents[GRAPH] = model.SerializeToString()
        if draft is not None:
            drafting = lower_draft(draft, checkpoint, options.weights, model, target, weights, progress)
            section = draft_section(draft, checkpoint, target, _embedding_type(model), drafting)
            contents[DRAFT_GRAPH] = drafting.SerializeToString()
        files[WEIGHTS] = FileEntry(weights.sha256, weights.bytes_written)
    if draft is not None and draft.ids is not None:
        contents[DRAFT_VOCAB] = vocab_file(draft.ids)
    if checkpoint.text is not None:
        contents[TOKENIZER] = checkpoint.text.tokenizer_json.encode()
        if checkpoint.text.chat_template is not None:
            contents[CHAT_TEMPLATE] = checkpoint.text.chat_template.encode()
    contents |= modules
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        files[name] = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    manifest = replace(_manifest(checkpoint, target, options, files, model), draft=section)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _kernel_modules(config: ModelConfig, target: Target, options: ExportOptions) -> dict[str, bytes]:
    """Files of machine code; none for a model of a size without kernels, whose operators run as ONNX functions.

    Functions of packed weights would unpack them to float32: they are for checks, so packed ones need their kernels.
    """
    if target.name not in TARGETS:
        return {}
    try:
        kernels = plugin_kernels(config, options.weights, target.types.names["kv"])
        if options.draft is not None:
            kernels = list(dict.fromkeys([*kernels, *draft_kernels(options.draft, config, target)]))
    except EdgeError as error:
        if options.weights.linear == "packed":
            raise EdgeError(f"--linear packed lacks kernels for this model ({error}); use --linear native") from None
        return {}
    return kernel_modules(kernels, target.name)


def _embedding_type(model: onnx.ModelProto) -> str:
    """Type of the input table's values in the file."""
    table = next(
        node.input[0] for node in model.graph.node if node.op_type == "Gather" and node.input[1] == "input_ids"
    )
    element_type = next(tensor.data_type for tensor in model.graph.initializer if tensor.name == table)
    return helper.tensor_dtype_to_np_dtype(element_type).name


def _manifest(
    checkpoint: Checkpoint, target: Target, options: ExportOptions, files: dict[str, FileEntry], model: onnx.ModelProto
) -> Manifest:
    text = checkpoint.text
    settings = ("add_bos", "bos_token", "eos_token")
    return Manifest(
        name=Path(os.path.abspath(checkpoint.path)).name,  # of "." too
        model=checkpoint.config,
        weights={
            **asdict(options.weights),
            "head_group_size": options.weights.head_group_size,
            "description": describe_weights(options.weights, checkpoint, model),
        },
        target=target.name,
        types={**target.types.names, "embedding": _embedding_type(model)},
        limits={"max_context": max_context(checkpoint.config, options.long_context)},
        text=None if text is None else {name: getattr(text, name) for name in settings},
        generation=checkpoint.generation,
        files=files,
        tools={"minicpm-edge": version("minicpm-edge"), "onnx": onnx.__version__},
    )


@contextmanager
def _lock(place: Path) -> Iterator[None]:
    """One export a place. The kernel unlocks what a killed process held; the next one removes the file."""
    path = place.with_name(f".{place.name}.lock")
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EdgeError(f"another export is writing {place}; wait for it or choose another --out") from None
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # its last owner removed it after we opened it
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextmanager
def _staging_folder(place: Path) -> Iterator[Path]:
    """A fresh folder beside `place`, removed if it was not renamed away."""
    staging = place.with_name(f"{_prefix(place)}{os.getpid()}")
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _prefix(place: Path) -> str:
    return f".{place.name}.partial-"


def _recover(place: Path) -> None:
    """Tidy up after an export that was killed; one killed between its two renames had moved the old bundle away."""
    for leftover in place.parent.glob(f"{glob.escape(_prefix(place))}*"):
        if leftover.name.endswith(OLD) and not place.exists():
            os.rename(leftover, place)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "check the folder and its permissions, or choose another --out"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(os.path.realpath(out.absolute().parent)).free
            remedy = f"{free >> 20} MiB are free: make room or choose another --out"
        raise EdgeError(f"writing {out} failed ({error.strerror}); {remedy}") from error


def _replace(staging: Path, place: Path) -> None:
    """Put the finished folder in place. An old bundle is moved aside first, and back if this is interrupted."""
    for path in (*staging.iterdir(), staging):
        _sync(path)
    if not place.exists():
        os.rename(staging, place)
    else:
        old = staging.with_name(staging.name + OLD)
        try:
            os.rename(place, old)
            os.rename(staging, place)
        finally:
            if not place.exists():
                os.rename(old, place)
            shutil.rmtree(old, ignore_errors=True)
    _sync(place.parent)


def _sync(path: Path) -> None:
    """Flush a file or folder, so that a power cut after the rename cannot leave a hole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
