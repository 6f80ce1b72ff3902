"""`edge logits`: the way to compare this runtime with any other."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from edge.bundle import is_bundle, open_bundle
from edge.cli import options as opt
from edge.cli.console import note, progress_bar
from edge.engine import check_ids
from edge.errors import EdgeError, UsageError


def logits(
    model: Annotated[Path, typer.Argument(metavar="CHECKPOINT_OR_BUNDLE", help="A checkpoint is exported first.")],
    ids_file: Annotated[Path, typer.Option(help=".npy file with one sequence of token ids.")],
    out: Annotated[Path, typer.Option(help=".npy file to write: float32 [last, vocabulary].")],
    last: Annotated[int, typer.Option(min=1, help="How many of the last positions.")] = 1,
    attention: opt.Attention = None,
    sparse: opt.Sparse = None,
    offload: opt.Offload = None,
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
    ids = opt.load_ids(ids_file)
    if last > len(ids):
        raise UsageError(f"--last {last} exceeds the {len(ids)} ids of {ids_file}; ask for at most {len(ids)}")
    opt.check_output(out)
    with _as_bundle(model, ids, out, exact, attention) as bundle:
        wanted, rows = context or len(ids), opt.MANY_ROWS
        engine = opt.load_engine(bundle, wanted, memory, threads, chunk, attention, sparse, offload, logits_rows=rows)
        with progress_bar("computing") as progress:
            _save(out, engine.stream_logits(ids, last, progress), (last, engine.vocab_size))
    note(f"{out}: logits {last} x {engine.vocab_size}")


@contextlib.contextmanager
def _as_bundle(model: Path, ids: list[int], out: Path, exact: bool, attention: str | None) -> Iterator[Path]:
    """The bundle itself, or one made from the checkpoint for this once, beside `out` (/tmp may be memory)."""
    if is_bundle(model):
        kind = open_bundle(model, verify=False).manifest.weights["kind"]
        if exact and kind != "exact":
            raise UsageError(f"{model} holds {kind} weights, so --exact needs the checkpoint it was made from")
        yield model
        return
    from build_engine.checkpoint import open_checkpoint
    from build_engine.export import ExportOptions, export_bundle
    from build_engine.formats import choose_format
    from build_engine.long_context import LongContext
    from build_engine.ternary import is_ternary, recover

    checkpoint = open_checkpoint(model)
    check_ids(ids, checkpoint.config.vocab_size)
    kind = "exact" if exact else "ternary" if is_ternary(checkpoint) else "w4a16"
    if kind == "ternary":
        checkpoint = recover(checkpoint).checkpoint
    weights = choose_format(checkpoint, "onnxruntime", kind)
    options = ExportOptions(weights=weights, long_context=LongContext(attention or "model"))
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.bundle-", dir=out.absolute().parent) as folder:
        with progress_bar("exporting") as progress:
            bundle = export_bundle(checkpoint, Path(folder) / "bundle", options, progress)
        yield bundle


def _save(path: Path, chunks: Iterable[np.ndarray], shape: tuple[int, int]) -> None:
    """Write the rows as they come, beside, and rename: neither memory nor a full disk gets half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for rows in chunks:
                file.write(np.ascontiguousarray(rows, "<f4").data)
        partial.replace(path)
    except OSError as error:
        raise EdgeError(f"cannot write {path} ({error.strerror}); choose another --out") from None
    finally:
        partial.unlink(missing_ok=True)
