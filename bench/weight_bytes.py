"""What a weight takes in our formats beside the ideal, and what that is of the bytes that a token reads.

    python -m bench.weight_bytes                  # MiniCPM4-0.5B shape, every format that bench.peers measures

"Ideal" is the code and a float16 scale for each group or row; a ternary code holds log2(3) = 1.585 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.checkpoints import write_safetensors
from bench.decode_bytes import bits_a_weight, ideal_bits, projection_shapes, weight_bytes
from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.ternary import recover
from edge.bundle import Bundle, open_bundle
from edge.models import MINICPM4_05B

INT4 = {
    "edge int4 g64": WeightFormat("w4a16", 64, symmetric=True, head="int4"),
    "edge int4 g128": WeightFormat("w4a16", 128, symmetric=True, head="int4"),
    "edge int4 g32": WeightFormat("w4a16", 32, symmetric=True, head="int4"),
    "edge int4 g32 asymmetric": WeightFormat("w4a16", 32, symmetric=False, head="int4"),
}
TERNARY = {
    "edge ternary": WeightFormat("ternary", 0, head="int8"),
    "edge ternary, int4 head": WeightFormat("ternary", 0, head="int4"),
}


def prepare_bundle(checkpoint: Path, out: Path, options: ExportOptions) -> Path:
    """The checkpoint's bundle `out`, exported once."""
    if out.exists():
        return out
    source = open_checkpoint(checkpoint)
    if options.weights.kind == "ternary":
        source = recover(source).checkpoint
    return export_bundle(source, out, options)


def print_table(formats: Mapping[str, tuple[WeightFormat, Bundle]]) -> None:
    """A row a format: bits of a projection's weight, stored and ideal; what a token reads, and of it a weight."""
    table = Table(title="weights, as stored", title_justify="left")
    for column in ("format", "bits a weight", "ideal", "MB a token", "projections", "bytes a weight, with the head"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for name, (weights, bundle) in formats.items():
        c, bits, size = bundle.config, bits_a_weight(bundle), weight_bytes(bundle)
        projections = sum(math.prod(shape) for shape in projection_shapes(c))
        multiplied = projections + c.vocab_size * c.hidden_size
        cells = (f"{bits:.3f}", f"{ideal_bits(weights, c):.3f}", f"{size / 1e6:.1f}")
        table.add_row(name, *cells, f"{bits / 8 * projections / size:.0%}", f"{size / multiplied:.3f}")
    Console(width=110, highlight=False).print(table)


def main(
    folder: Annotated[Path, typer.Option(help="Where the models are kept.")] = Path("build/bench"),
) -> None:
    """Export every format and print the table."""
    found: dict[str, tuple[WeightFormat, Bundle]] = {}
    for kind, formats in {"int4": INT4, "ternary": TERNARY}.items():
        checkpoint = folder / f"shapes-{kind}"
        if not checkpoint.exists():
            write_safetensors(checkpoint, MINICPM4_05B, ternary=kind == "ternary")
        for name, weights in formats.items():
            path = prepare_bundle(checkpoint, folder / f"sizes-{len(found)}", ExportOptions(weights=weights))
            found[name] = weights, open_bundle(path, verify=False)
    print_table(found)


if __name__ == "__main__":
    typer.run(main)
