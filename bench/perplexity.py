"""What each format of weights and KV cache costs in perplexity, on a real model and prose that Python packages ship.

    python -m bench.perplexity                    # SmolLM2-135M-Instruct, 10,240 tokens; needs `make test` to have run

The text and the model are those of tests/test_smollm2.py, the calculation that of edge/perplexity.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.engine import open_engine
from edge.perplexity import perplexity
from edge.plan import EngineOptions
from edge.text import TextSettings, Tokenizer
from tests.synthetic import smollm2_gguf_path
from tests.text import english_text

# Weights and the type of the KV cache.
FORMATS = (
    (WeightFormat("exact"), "float32"),
    (WeightFormat("exact"), "float16"),
    (WeightFormat("exact"), "bfloat16"),
    (WeightFormat("exact"), "int8"),
    (WeightFormat("w4a16", 32, symmetric=False, head="int8"), "float16"),
    (WeightFormat("w4a16", 32, symmetric=False, head="int8"), "bfloat16"),
    (WeightFormat("w4a16", 32, symmetric=False, head="int8"), "int8"),
    (WeightFormat("w4a16", 32, symmetric=False, head="int4"), "bfloat16"),
    (WeightFormat("w4a16", 32, symmetric=True, head="int8"), "bfloat16"),
    (WeightFormat("w4a16", 64, symmetric=True, head="int8"), "bfloat16"),
)


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of text.")] = 10240,
    window: Annotated[int, typer.Option(help="Tokens a window; each starts without context.")] = 2048,
) -> None:
    """Print perplexity and its change against the exact weights, one format a line."""
    checkpoint = open_checkpoint(smollm2_gguf_path())
    exact = None
    for weights, kv in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            bundle = export_bundle(checkpoint, Path(folder) / "bundle", ExportOptions(weights=weights, kv=kv))
            engine = open_engine(bundle, EngineOptions(context=window + 1))
            settings = TextSettings.from_dict(engine.bundle.manifest.text or {})
            ids = Tokenizer.load(bundle, settings).encode(english_text()[: 8 * tokens], add_bos=False)[:tokens]
            value = perplexity(engine, ids, window)
        exact = exact or value
        print(f"{weights.describe():34} {kv:9} {value:8.4f}  {value / exact - 1:+.2%}", flush=True)


if __name__ == "__main__":
    typer.run(main)
