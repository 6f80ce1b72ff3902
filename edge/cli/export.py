"""`edge export` and `edge build`: the host's commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge.bundle import is_bundle, open_bundle
from edge.cli.console import note, print_json, progress_bar
from edge.cli.options import Json, parse_sparse
from edge.config import ModelConfig
from edge.errors import UsageError

CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Hugging Face folder (safetensors) or .gguf file.")
]


def export(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    weights: Annotated[str, typer.Option(help="exact (the checkpoint's values) or w4a16 (int4).")] = "w4a16",
    target: Annotated[str, typer.Option(help="onnxruntime (CPU) or rtx (TensorRT-RTX).")] = "onnxruntime",
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share an int4 scale: 32, 64 or 128. Default: by the checkpoint.")
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="int4 around zero (faster, all TensorRT knows) or from a minimum (follows 4-bit GGUF exactly). "
            "Default: by the checkpoint.",
        ),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="Format of the output head: exact, int8 or int4. Default: int8, exact for rtx.")
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help="Type of the KV cache: float32, float16 or bfloat16. Default: by the weights.")
    ] = None,
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

      edge export MiniCPM4-8B --out bundle-128k --attention sparse --rope 128k
    """
    from build_engine.checkpoint import open_checkpoint
    from build_engine.export import ExportOptions, export_bundle
    from build_engine.formats import choose_format
    from build_engine.long_context import LongContext

    if is_bundle(checkpoint):
        raise UsageError(f"{checkpoint} is a bundle already; run it, or export the checkpoint it was made from")
    long_context = LongContext(attention or "model", parse_sparse(sparse), rope or "model")
    source = open_checkpoint(checkpoint)
    chosen = choose_format(source, target, weights, group_size, symmetric, head)
    with progress_bar("exporting", quiet=json) as progress:
        options = ExportOptions(target, chosen, overwrite, long_context, kv)
        bundle = export_bundle(source, out, options, progress)
    report_bundle(bundle, as_json=json)


def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle exported with --target rtx.")],
    target: Annotated[str, typer.Option(help="rtx (TensorRT-RTX; needs no GPU to build).")] = "rtx",
    max_context: Annotated[int | None, typer.Option(min=1, help="Longest context. Default: the model's.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Most prompt tokens a step.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Most sequences a decode step.")] = 8,
    json: Json = False,
) -> None:
    """Compile a bundle's graph into a TensorRT engine with a prefill and a decode profile.

    Examples:

      edge export MiniCPM4-0.5B --out bundle-rtx --target rtx --symmetric

      edge build bundle-rtx --target rtx
    """
    from build_engine.tensorrt import BuildOptions, build_engine

    options = BuildOptions(target, max_context, chunk, batch)
    with progress_bar("building", quiet=json) as progress:
        report = build_engine(bundle, options, progress)
    if json:
        print_json(report.to_dict())
    else:
        note(report.describe())


def _attention(config: ModelConfig) -> str:
    if config.sparse is None:
        return "dense attention"
    return (
        f"sparse attention of {config.sparse.selected_blocks} blocks from {max(config.sparse.dense_len, 0)} tokens on"
    )


def report_bundle(path: Path, *, as_json: bool) -> None:
    """What was written, in a line or as JSON."""
    manifest = open_bundle(path, verify=False).manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    if as_json:
        print_json({"bundle": str(path), "bytes": size, "key": manifest.key, "weights": manifest.weights})
        return
    what = f"{manifest.weights['description']}, {_attention(manifest.model)}"
    note(f"{path}: {manifest.name} for {manifest.target}, {what}, {size / 2**20:.0f} MiB")
