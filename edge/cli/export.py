"""`edge export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.bundle import is_bundle, open_bundle
from edge.cli.console import note, print_json, progress_bar
from edge.cli.options import Json, parse_sparse
from edge.config import ModelConfig
from edge.errors import UsageError
from edge.frequencies import read_frequencies

if TYPE_CHECKING:
    from build_engine.checkpoint import Checkpoint
    from build_engine.draft_export import DraftExport
    from build_engine.formats import WeightFormat
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
Attention = Annotated[
    str | None, typer.Option(metavar="dense|sparse", help="Default: sparse if config.json has a sparse_config.")
]
Sparse = Annotated[
    str | None, typer.Option(metavar="KEY=N,...", help="Sparse settings, named as in config.json's sparse_config.")
]
Rope = Annotated[
    str | None, typer.Option(metavar="128k", help="Replace LongRoPE's factors by the published ones for 128K.")
]
DraftFolder = Annotated[
    Path | None,
    typer.Option("--draft", metavar="FOLDER", help="An EAGLE draft of this model, for speculative decoding."),
]
Frspec = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Give the draft a head of these tokens only: freq_*.pt, or what edge freq wrote."
    ),
]
DraftWeights = Annotated[
    str | None,
    typer.Option(
        metavar="exact|fp16|w4a16", help="Format of the draft's weights. Default: w4a16 beside int4 or ternary ones."
    ),
]
DraftHead = Annotated[
    str | None, typer.Option(metavar="exact|int8|int4", help="Format of the draft's head. Default: as --head's.")
]
DraftWindow = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="What the draft sees of the context; 0 for all. Default: 1024.")
]
DraftScale = Annotated[
    float | None,
    typer.Option(
        "--draft-logit-scale",
        help="Factor on the draft's hidden state before its head; 1 makes it as sharp as CPM.cu's. Default: the "
        "model's own.",
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
    attention: Attention = None,
    sparse: Sparse = None,
    rope: Rope = None,
    draft: DraftFolder = None,
    frspec: Frspec = None,
    draft_weights: DraftWeights = None,
    draft_head: DraftHead = None,
    draft_window: DraftWindow = None,
    draft_scale: DraftScale = None,
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

      edge export MiniCPM4-8B --out bundle --draft MiniCPM4-8B-Eagle-FRSpec --frspec freq_32768.npy
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
    wishes = (draft_weights, draft_head, draft_window, draft_scale)
    drafting = _draft(draft, frspec, source, chosen, target, wishes)
    with progress_bar("exporting", quiet=json) as progress:
        options = ExportOptions(target, chosen, overwrite, long_context, kv, drafting)
        bundle = export_bundle(source, out, options, progress)
    report_bundle(bundle, ternary, as_json=json)


def _draft(
    folder: Path | None,
    frspec: Path | None,
    base: Checkpoint,
    base_weights: WeightFormat,
    target: str,
    wishes: tuple[str | None, str | None, int | None, float | None],
) -> DraftExport | None:
    """The draft that the user wants, opened. wishes: for its weights, head, window and logit scale."""
    from build_engine.draft_export import choose_draft

    names: tuple[str, ...] = ("kind", "head", "window", "logit_scale")
    given: dict[str, Any] = {name: wish for name, wish in zip(names, wishes, strict=True) if wish is not None}
    if folder is None:
        if given or frspec is not None:
            raise UsageError("options of a draft model need one; add --draft FOLDER, or leave them out")
        return None
    ids = None if frspec is None else read_frequencies(frspec, base.config.vocab_size)
    if ids is None and (lists := sorted(folder.glob("freq_*.pt"))):
        note(f"the draft's head is the whole one; --frspec {lists[0]} would make it smaller and faster")
    return choose_draft(folder, base, base_weights, target, ids, **given)


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
        if manifest.draft is not None:
            values["draft"] = manifest.to_dict()["draft"]
        print_json(values if ternary is None else values | {"ternary": ternary.to_dict()})
        return
    if ternary is not None:
        note(ternary.describe())
    what = f"{manifest.weights['description']}, {_attention(manifest.model)}"
    if manifest.draft is not None:
        what += f", draft {manifest.draft.name} ({manifest.draft.weights['description']})"
    note(f"{path}: {manifest.name} for {manifest.target}, {what}, {size / 2**20:.0f} MiB")
