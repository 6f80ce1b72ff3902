"""`edge logits`: the way to compare this runtime with any other."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from edge.bundle import is_bundle, open_bundle
from edge.cli import options as opt
from edge.cli.console import note, progress_bar
from edge.errors import EdgeError, UsageError


def logits(
    model: Annotated[Path, typer.Argument(metavar="CHECKPOINT_OR_BUNDLE", help="A checkpoint is exported first.")],
    ids_file: Annotated[Path, typer.Option(help=".npy file with one sequence of token ids.")],
    out: Annotated[Path, typer.Option(help=".npy file to write: float32 [last, vocabulary].")],
    last: Annotated[int, typer.Option(min=1, help="How many of the last positions.")] = 1,
    attention: Annotated[str, typer.Option(help="dense (sparse comes with InfLLM-V2).")] = "dense",
    exact: Annotated[bool, typer.Option(help="Unquantised weights, float32 everywhere.")] = False,
    context: opt.Context = None,
    memory: opt.Memory = None,
    threads: opt.Threads = None,
    chunk: opt.Chunk = 512,
) -> None:
    """Write the logits after each of the last tokens of a sequence. A checkpoint needs no tokenizer here.

    Example:

      edge logits MiniCPM4-0.5B --ids-file ids.npy --last 16 --out logits.npy --exact
    """
    if attention != "dense":
        raise UsageError(f"--attention {attention} is not available; this version computes dense attention only")
    ids = opt.load_ids(ids_file)
    if last > len(ids):
        raise UsageError(f"--last {last} exceeds the {len(ids)} ids of {ids_file}; ask for at most {len(ids)}")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out.absolute().parent} does not exist; create it or choose another --out")
    with _as_bundle(model, exact) as bundle:
        engine = opt.load_engine(bundle, context or len(ids), memory, threads, chunk)
        values = engine.logits(ids, last)
    _save(out, values)
    note(f"{out}: logits {values.shape[0]} x {values.shape[1]}")


@contextlib.contextmanager
def _as_bundle(model: Path, exact: bool) -> Iterator[Path]:
    """The bundle itself, or a temporary one made from the checkpoint."""
    if is_bundle(model):
        kind = open_bundle(model, verify=False).manifest.weights["kind"]
        if exact and kind != "exact":
            raise UsageError(f"{model} holds {kind} weights, so --exact needs the checkpoint it was made from")
        yield model
        return
    from build_engine.checkpoint import open_checkpoint
    from build_engine.export import ExportOptions, export_bundle
    from build_engine.formats import choose_format

    checkpoint = open_checkpoint(model)
    with tempfile.TemporaryDirectory(prefix="edge-logits-") as folder, progress_bar("exporting") as progress:
        weights = choose_format(checkpoint, "onnxruntime", "exact" if exact else "w4a16")
        options = ExportOptions(weights=weights)
        yield export_bundle(checkpoint, Path(folder) / "bundle", options, progress)


def _save(path: Path, values: np.ndarray) -> None:
    """Write beside and rename, so that a full disk leaves no half file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.save(file, values)
        partial.replace(path)
    except OSError as error:
        raise EdgeError(f"cannot write {path} ({error.strerror}); choose another --out") from None
    finally:
        partial.unlink(missing_ok=True)
