"""How often a real model finds the pages that it selects in memory: SmolLM2 on prose, InfLLM-V2's selection, --offload.

    python -m bench.page_hits                            # SmolLM2-135M-Instruct; needs `make test` to have run

bench.extreme has random weights, whose choice of blocks says nothing of a trained model's. Selection follows the text:
the next token wants nearly what the last one did, and that is in memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.long_context import LongContext
from edge.bundle import open_bundle
from edge.engine import Engine
from edge.executors.onnxruntime import OnnxRuntimeExecutor
from edge.memory.fit import make_plan
from edge.offload import Offload
from edge.plan import EngineOptions
from edge.scheduler import Sequence
from edge.text import TextSettings, Tokenizer
from tests.synthetic import smollm2_gguf_path
from tests.text import english_text

SETTINGS = {"topk": 16, "window_size": 512, "dense_len": -1}  # 24 blocks: 1 first, 9 local, 14 by score
WARM_UP = 10  # tokens


def main(
    context: Annotated[int, typer.Option(help="Tokens of the text before those that count.")] = 6144,
    tokens: Annotated[int, typer.Option(help="Tokens of the text that count, one a step.")] = 48,
    slots: Annotated[str, typer.Option(help="Pages of a layer in memory.")] = "24,32,48",
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
) -> None:
    """Print hits and bytes for each size of the cache in memory."""
    checkpoint = open_checkpoint(smollm2_gguf_path())
    weights = WeightFormat("w4a16", 32, symmetric=False, head="int8")
    long_context = LongContext("sparse", SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        options = ExportOptions(weights=weights, long_context=long_context, kv="bfloat16")
        bundle = open_bundle(export_bundle(checkpoint, Path(folder) / "bundle", options))
        settings = TextSettings.from_dict(bundle.manifest.text or {})
        text = english_text()[: 8 * (context + tokens)]
        ids = Tokenizer.load(bundle.path, settings).encode(text, add_bos=False)[: context + WARM_UP + tokens]
        plan = make_plan(bundle, EngineOptions(context=len(ids), threads=threads))
        assert plan.sparse is not None
        print(
            f"SmolLM2-135M, {context} tokens of prose, {plan.sparse.selected_blocks} of {plan.num_pages} blocks a token"
        )
        for resident in (int(n) for n in slots.split(",")):
            offload = Offload(Path(folder), resident)
            executor = OnnxRuntimeExecutor(bundle, plan.num_pages, threads, plan.sparse, offload=offload)
            engine = Engine(bundle, executor, plan, chunk=512)
            sequence = Sequence(engine.cache.open(), ids[:context], prompt_length=context)
            for count in (WARM_UP, tokens):
                executor.take_offload_counters()
                for _ in range(count):
                    engine.advance(sequence)
                    sequence.tokens.append(ids[len(sequence.tokens)])
            counters = executor.take_offload_counters()
            assert counters is not None
            share = counters.hits / (counters.hits + counters.misses)
            print(
                f"{resident:4} pages in memory: {share:.1%} hits, {counters.bytes_read / tokens / 1e6:.2f} MB a token"
            )


if __name__ == "__main__":
    typer.run(main)
