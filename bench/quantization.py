"""What int4 costs in perplexity by the way it was rounded, and what an int8 head costs, on a real model and real prose.

    python -m bench.quantization                  # SmolLM2-135M-Instruct; half an hour on two cores
    python -m bench.quantization --samples 8 --only "prefix scale, prose"       # how much text GPTQ needs

Quantised checkpoints are made by the library behind `edge quantize`, exported with their exact values and run with
float32 activations and KV cache, so that nothing but the weights differs. The text is the beginning of the King James
Bible, that of calibration its last third (both from tests/text.py).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from build_engine.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.quantize import quantize_symmetric
from build_engine.quantizer.calibrate import SAMPLE, calibration_sequences
from build_engine.quantizer.run import QuantizeOptions, quantize_checkpoint
from edge.engine import open_engine
from edge.perplexity import perplexity
from edge.plan import EngineOptions
from edge.text import TextSettings, Tokenizer
from tests.synthetic import smollm2_gguf_path
from tests.text import english_text

EXACT = ExportOptions(weights=WeightFormat("exact"), kv="float32")
HEAD_GROUP = 64


def with_int8_head(checkpoint: Checkpoint) -> Checkpoint:
    """The model with an untied head of the values that int8 gives, all else as it was."""
    embedding = checkpoint.tensors["model.embed_tokens.weight"]
    values = quantize_symmetric(np.asarray(embedding.read(slice(None)), np.float32), HEAD_GROUP, bits=8).dequantize()
    head = LazyTensor("lm_head.weight", values.shape, values.dtype, "int8", values.__getitem__)
    config = replace(checkpoint.config, tie_word_embeddings=False)
    return replace(checkpoint, config=config, tensors={**checkpoint.tensors, head.name: head})


def quantized(
    checkpoint: Checkpoint, folder: Path, group: int, samples: int, length: int, only: str
) -> Iterator[tuple[str, Checkpoint]]:
    """One checkpoint after another, each with the name of its row; those whose names hold `only`."""
    prose = english_text()
    prose = prose[2 * len(prose) // 3 :]
    texts = {"prose": prose, "shipped sample": SAMPLE.read_text(encoding="utf-8")}
    rows = [
        ("rtn", "scale", "prose"),
        ("gptq", "scale", "prose"),
        ("pgptq", "scale", "prose"),
        ("pgptq", "omit", "prose"),
        ("gptq", "scale", "shipped sample"),
        ("pgptq", "scale", "shipped sample"),
    ]
    for number, (method, prefix, text) in enumerate(rows):
        options = QuantizeOptions(method, group, prefix=prefix)
        sequences = None if method == "rtn" else calibration_sequences(checkpoint, texts[text], samples, length)
        name = method if method != "pgptq" else f"pgptq, prefix {prefix}"
        if sequences is not None:
            name += f", {text}, {sequences.size} tokens"
        if only not in name:
            continue
        out = folder / str(number)
        quantize_checkpoint(checkpoint, out, options, sequences)
        yield name, open_checkpoint(out)


def measure(checkpoint: Checkpoint, folder: Path, tokens: int, window: int) -> float:
    """Perplexity of the checkpoint's exact values on the first `tokens` tokens of the text."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        bundle = export_bundle(checkpoint, Path(place) / "bundle", EXACT)
        engine = open_engine(bundle, EngineOptions(context=window + 1))
        settings = TextSettings.from_dict(engine.bundle.manifest.text or {})
        ids = Tokenizer.load(bundle, settings).encode(english_text()[: 8 * tokens], add_bos=False)[:tokens]
        return perplexity(engine, ids, window)


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of text.")] = 10240,
    window: Annotated[int, typer.Option(help="Tokens a window; each starts without context.")] = 2048,
    group: Annotated[int, typer.Option(help="Weights that share a scale; SmolLM2's 576 inputs allow 32 and 64.")] = 64,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a calibration sequence.")] = 512,
    only: Annotated[str, typer.Option(help="Which ways of rounding, by a part of their names.")] = "",
) -> None:
    """Print perplexity and its change against the exact weights, one way of rounding a line."""
    checkpoint = open_checkpoint(smollm2_gguf_path())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exact = measure(checkpoint, folder, tokens, window)
        print(f"{'exact':46} {exact:8.4f}", flush=True)
        head = measure(with_int8_head(checkpoint), folder, tokens, window)
        print(f"{f'exact, int8 head g{HEAD_GROUP}':46} {head:8.4f}  {head / exact - 1:+.3%}", flush=True)
        started = time.perf_counter()
        for name, rounded in quantized(checkpoint, folder, group, samples, length, only):
            seconds = time.perf_counter() - started
            value = measure(rounded, folder, tokens, window)
            print(f"{name:46} {value:8.4f}  {value / exact - 1:+.1%}  {seconds:.0f} s", flush=True)
            started = time.perf_counter()


if __name__ == "__main__":
    typer.run(main)
