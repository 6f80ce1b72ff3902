"""`edge quantize`: a checkpoint becomes a GPTQ int4 checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.table import Table

from edge.cli import options as opt
from edge.cli.console import note, out, print_json, progress_bar
from edge.cli.generate import read_text
from edge.errors import UsageError

if TYPE_CHECKING:
    from build_engine.checkpoint import Checkpoint
    from build_engine.quantizer.report import LinearReport, QuantizationReport

_SKIP_TOKENS = 4
_SAMPLES, _LENGTH = 128, 512
_DAMPING = 0.01
# GPTQ fitted to fewer follows the text more than the language.
_TOKENS_AN_INPUT = 8


CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Hugging Face folder (safetensors) or .gguf file.")
]
Method = Annotated[
    str, typer.Option(metavar="rtn|gptq|pgptq", help="Rounding, GPTQ, or GPTQ that is not led by the first tokens.")
]
GroupSize = Annotated[
    int | None, typer.Option(help="Weights that share a scale. Default: the largest of 128, 64, 32 that divides.")
]
Calibration = Annotated[
    Path | None, typer.Option(help="UTF-8 text as your users write and read it. Default: a small mixed sample.")
]
Samples = Annotated[
    int | None, typer.Option(min=1, max=2**16, help=f"Most sequences to take from the text. Default: {_SAMPLES}.")
]
Length = Annotated[int | None, typer.Option(min=2, max=2**20, help=f"Tokens of a sequence. Default: {_LENGTH}.")]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Limit, as 8GiB or 900MB. Default: 90 % of what is free.")
]
SkipTokens = Annotated[
    int | None, typer.Option(help=f"First positions that pgptq does not count like others. Default: {_SKIP_TOKENS}.")
]
Prefix = Annotated[
    str | None,
    typer.Option(
        metavar="scale|omit", help="Bring them down to the size of other tokens (default), or leave them out."
    ),
]
Damping = Annotated[
    float | None,
    typer.Option(help=f"Share of the Hessian's mean diagonal that is added to it. Default: {_DAMPING}."),
]
Resume = Annotated[bool, typer.Option(help="Go on with an interrupted run, if there is one.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an earlier result, and drop an interrupted run.")]


def quantize(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    method: Method = "pgptq",
    group_size: GroupSize = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    memory: Memory = None,
    skip_tokens: SkipTokens = None,
    prefix: Prefix = None,
    damping: Damping = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Round the linear layers of a checkpoint to int4 and write a GPTQ checkpoint, which `edge export` reads.

    GPTQ measures what every layer reads on a calibration text and rounds so that its output changes least. It works
    layer by layer within --memory, and after Ctrl-C --resume goes on where it stopped.

    Examples:

      edge quantize MiniCPM4-0.5B --out MiniCPM4-0.5B-GPTQ --calibration my-text.txt

      edge quantize MiniCPM4-8B --out MiniCPM4-8B-GPTQ --calibration my-text.txt --memory 12GiB --resume

      edge quantize model.gguf --out model-rtn --method rtn --group-size 64
    """
    from build_engine.checkpoint import open_checkpoint
    from build_engine.quantizer.place import check_place, partial_path
    from build_engine.quantizer.run import QuantizeOptions, quantize_checkpoint

    fitting = {"--calibration": calibration, "--samples": samples, "--length": length, "--damping": damping}
    _refuse_ignored(method, fitting, {"--skip-tokens": skip_tokens, "--prefix": prefix})
    source = open_checkpoint(checkpoint)
    group = _group_size(source) if group_size is None else group_size
    skipped = _SKIP_TOKENS if skip_tokens is None else skip_tokens
    options = QuantizeOptions(method, group, skipped, prefix or "scale", _DAMPING if damping is None else damping)
    limit = None if memory is None else opt.parse_size(memory)
    check_place(out, overwrite)  # before the text is read
    length = length or min(_LENGTH, source.config.max_position_embeddings)
    sequences = None if method == "rtn" else _sequences(source, calibration, samples or _SAMPLES, length)
    try:
        with progress_bar("quantising", quiet=json) as progress:
            report = quantize_checkpoint(
                source, out, options, sequences, memory=limit, resume=resume, overwrite=overwrite, progress=progress
            )
    except KeyboardInterrupt:
        if partial_path(out).is_dir():
            note(f"{partial_path(out)} keeps the finished layers; the same command with --resume goes on from there")
        raise
    _print(report, out, as_json=json)


def _group_size(checkpoint: Checkpoint) -> int:
    """The largest group that divides every linear layer's inputs; the smallest there is if none does."""
    config = checkpoint.config
    inputs = (config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size)
    return next((size for size in (128, 64) if not any(width % size for width in inputs)), 32)


def _refuse_ignored(method: str, of_fitting: Mapping[str, object], of_pgptq: Mapping[str, object]) -> None:
    """UsageError names an option that the method does not read."""
    for name, given in of_fitting.items():
        if given is not None and method == "rtn":
            raise UsageError(f"--method rtn reads no calibration text; choose gptq or pgptq, or drop {name}")
    for name, given in of_pgptq.items():
        if given is not None and method != "pgptq":
            raise UsageError(f"{name} belongs to --method pgptq, not to {method}; leave it out")


def _sequences(checkpoint: Checkpoint, file: Path | None, samples: int, length: int) -> np.ndarray:
    """Calibration sequences from --calibration or the sample."""
    from build_engine.quantizer.calibrate import SAMPLE, calibration_sequences

    sequences = calibration_sequences(checkpoint, read_text(file or SAMPLE), samples, length)
    tokens = sequences.size
    widest = max(checkpoint.config.intermediate_size, checkpoint.config.hidden_size)
    if tokens < _TOKENS_AN_INPUT * widest:
        note(
            f"{tokens} tokens of calibration text are few for layers of {widest} inputs: GPTQ fitted to too few can "
            f"be worse than --method rtn; give --calibration a text of {_TOKENS_AN_INPUT * widest} tokens or more, as "
            "your users write and read it"
        )
    return sequences


def _print(report: QuantizationReport, folder: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"checkpoint": str(folder), **report.to_dict()})
        return
    out.print(_table(report))
    calibration = f", {report.sequences} sequences of {report.length} tokens" if report.sequences else ""
    note(
        f"{folder}: int4 by {report.method} in groups of {report.group_size}{calibration}, {report.seconds:.0f} s; "
        f"edge export {folder} --out BUNDLE makes it run"
    )


def _table(report: QuantizationReport) -> Table:
    """A row a layer, a column a linear: the error of round-to-nearest, and of the method if it is another."""
    calibrated = report.sequences > 0
    measured = "outputs, round-to-nearest / " + report.method if calibrated else "weights"
    table = Table(
        title=f"relative error of the {measured}, percent", width=80, padding=(0, 1, 0, 0), pad_edge=False, box=None
    )
    names = list(dict.fromkeys(linear.linear for linear in report.linears))
    table.add_column("layer", justify="right")
    for name in names:
        table.add_column(name.rpartition(".")[2].removesuffix("_proj"), justify="right")
    table.add_column("s", justify="right")
    rows: dict[str, list[LinearReport]] = {}
    for linear in report.linears:
        rows.setdefault(str(linear.layer), []).append(linear)
    for layer, linears in rows.items():
        seconds = sum(linear.seconds for linear in linears)
        table.add_row(layer, *(_cell([linear]) for linear in linears), f"{seconds:.1f}")
    columns = [[linear for linear in report.linears if linear.linear == name] for name in names]
    table.add_row("mean", *(_cell(column) for column in columns), f"{report.seconds:.1f}", style="bold")
    return table


def _cell(linears: list[LinearReport]) -> str:
    """Mean errors of some linears."""
    pairs = [(linear.rtn_output_error, linear.output_error) for linear in linears]
    measured = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not measured:
        return _percent(linear.weight_error for linear in linears)
    return f"{_percent(before for before, _ in measured)}/{_percent(after for _, after in measured)}"


def _percent(values: Iterable[float]) -> str:
    numbers = list(values)
    return f"{100 * sum(numbers) / len(numbers):.1f}"
