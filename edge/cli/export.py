"""`edge export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge.bundle import is_bundle, open_bundle
from edge.cli.console import note, print_json, progress_bar
from edge.cli.options import Json, parse_sparse
from edge.config import ModelConfig
from edge.errors import UsageError

if TYPE_CHECKING:
    from build_engine.checkpoint import Checkpoint
    from build_engine.ternary import Ternary

CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Hugging Face folder (safetensors), .gguf file, or selftest for the built-in small model.",
    ),
]


TargetName = Annotated[str, typer.Option(help="onnxruntime (CPU), rtx (TensorRT-RTX), tensorrt (desktop) or jetson.")]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="exact|fp16|w4a16|ternary",
        help="exact (the checkpoint's values), fp16, w4a16 (int4) or ternary (2 bits). Default: ternary if the "
        "checkpoint is, else w4a16; codes that the checkpoint has are kept as they are.",
    ),
]
Requantize = Annotated[
    str | None,
    typer.Option(
        metavar="bf16|fp32",
        help="Make ternary codes of the unquantised weights of ternary training, in this arithmetic (bf16: the "
        "training's own); a scale a row, or --group-size.",
    ),
]
Linear = Annotated[
    str | None,
    typer.Option(
        metavar="packed|native",
        help="int4 and ternary weights of TensorRT targets: packed for our kernels (the default if there are some of "
        "the model's sizes) or TensorRT's own int4.",
    ),
]
GroupSize = Annotated[
    int | None, typer.Option(help="Weights that share an int4 scale: 32, 64 or 128. Default: by the checkpoint.")
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="int4 around zero (faster, all TensorRT knows) or from a minimum (follows 4-bit GGUF exactly). "
        "Default: by the checkpoint.",
    ),
]
Head = Annotated[
    str | None,
    typer.Option(
        help="Format of the output head: exact, int8 or int4. Default: int8 if with 16 bits it would take over a tenth "
        "of the bytes; exact beside TensorRT's own int4."
    ),
]
Embedding = Annotated[
    str, typer.Option(help="Format of the input table: exact, or int8 with a scale a row (onnxruntime only).")
]

KvType = Annotated[
    str | None,
    typer.Option(
        metavar="float32|float16|bfloat16|int8",
        help="Type of the KV cache; int8 takes half the memory of 16 bits and is read faster. Default: 16 bits, but "
        "float32 beside exact weights.",
    ),
]


def export(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    weights: Weights = None,
    target: TargetName = "onnxruntime",
    linear: Linear = None,
    requantize: Requantize = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = None,
    head: Head = None,
    embedding: Embedding = "exact",
    kv: KvType = None,
    attention: Annotated[
        str | None, typer.Option(metavar="dense|sparse", help="Default: sparse if config.json has a sparse_config.")
    ] = None,
    sparse: Annotated[
        str | None, typer.Option(metavar="KEY=N,...", help="Sparse settings, named as in config.json's sparse_config.")
    ] = None,
    rope: Annotated[
        str | None, typer.Option(metavar="128k", help="Replace LongRoPE's factors by the published ones for 128K.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    json: Json = False,
) -> None:
    """Turn a checkpoint into a bundle: graph, packed weights, tokenizer, manifest.

    Examples:

      edge export MiniCPM4-0.5B --out bundle

      edge export model.Q4_1.gguf --out exact --weights exact

      edge export BitCPM4-0.5B --out bundle-2bit

      edge export MiniCPM4-8B --out bundle-128k --attention sparse --rope 128k

      edge export MiniCPM4-0.5B --out bundle-rtx --target rtx --linear packed --kv int8
    """
    from build_engine.export import ExportOptions, check_place, export_bundle
    from build_engine.formats import choose_format
    from build_engine.long_context import LongContext

    long_context = LongContext(attention or "model", parse_sparse(sparse), rope or "model")
    check_place(out, overwrite)  # before minutes of reading
    source, ternary = open_source(checkpoint), None
    if (kind := weights or best_kind(source, requantize)) == "ternary":
        ternary = _find_codes(source, requantize, group_size, quiet=json)
        source = ternary.checkpoint
    elif requantize is not None:
        raise UsageError(f"--requantize makes ternary weights, not {kind}; choose --weights ternary")
    stored_group = None if requantize is not None else group_size
    chosen = choose_format(source, target, kind, stored_group, symmetric, head, linear, embedding)
    with progress_bar("exporting", quiet=json) as progress:
        options = ExportOptions(target, chosen, overwrite, long_context, kv)
        bundle = export_bundle(source, out, options, progress)
    report_bundle(bundle, ternary, as_json=json)


def best_kind(source: Checkpoint, requantize: str | None) -> str:
    from build_engine.ternary import is_ternary

    return "ternary" if requantize is not None or is_ternary(source) else "w4a16"


def _find_codes(source: Checkpoint, arithmetic: str | None, group_size: int | None, *, quiet: bool) -> Ternary:
    """Ternary codes of all projections: those that the checkpoint has, or made in this arithmetic."""
    from build_engine.ternary import recover, requantize

    with progress_bar("reading", quiet=quiet) as progress:
        if arithmetic is None:
            return recover(source, progress)
        return requantize(source, arithmetic, group_size, progress)


def open_source(path: Path) -> Checkpoint:
    from build_engine.checkpoint import open_checkpoint
    from build_engine.selftest_model import NAME, selftest_checkpoint

    if str(path) == NAME and not path.exists():
        return selftest_checkpoint()
    if is_bundle(path):
        raise UsageError(f"{path} is a bundle already; run it, or export the checkpoint it was made from")
    return open_checkpoint(path)


def _attention(config: ModelConfig) -> str:
    if config.sparse is None:
        return "dense attention"
    return (
        f"sparse attention of {config.sparse.selected_blocks} blocks from {max(config.sparse.dense_len, 0)} tokens on"
    )


def report_bundle(path: Path, ternary: Ternary | None, *, as_json: bool) -> None:
    """What was written, in a line or as JSON, and what the ternary weights turned out to be."""
    manifest = open_bundle(path, verify=False).manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    if as_json:
        values = {"bundle": str(path), "bytes": size, "key": manifest.key, "weights": manifest.weights}
        print_json(values if ternary is None else values | {"ternary": ternary.to_dict()})
        return
    if ternary is not None:
        note(ternary.describe())
    what = f"{manifest.weights['description']}, {_attention(manifest.model)}"
    note(f"{path}: {manifest.name} for {manifest.target}, {what}, {size / 2**20:.0f} MiB")
