"""What an engine can be asked to do, and the shapes that it must accept for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge.config import ModelConfig
from edge.engine_file import Profile, Shape
from edge.errors import UsageError
from edge.kv_cache import pages_for, pool_layout
from edge.tensorrt import TARGETS

TYPICAL_CONTEXT = 4096  # tokens; the length that shapes are tuned for
MOST_DRAFTED = 64  # tokens of a sequence's tree: a row has a bit for each
MOST_ELEMENTS = 2**31 - 1  # of a tensor, in TensorRT
Range = tuple[int, int, int]  # min, opt, max


@dataclass(frozen=True)
class BuildOptions:
    """What `edge build` decides. target: None is the bundle's own; max_context in tokens (None: the model's); chunk:
    prompt tokens a step; batch: sequences a step; compute capabilities: the GPUs that an engine for rtx is compiled for
    (RTX 30, 40, 50); plugins: use them, or compile the operators' functions; verify: tokens a sequence that a step of
    speculative decoding computes, the last accepted one and the drafted ones after it (0: none); memory: bytes that
    compiling may take (None: what is free)."""

    target: str | None = None
    max_context: int | None = None
    chunk: int = 512
    batch: int = 8
    compute_capabilities: tuple[str, ...] = ("sm86", "sm89", "sm120")
    plugins: bool = True
    verify: int = 0
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self.target not in TARGETS:
            raise UsageError(f"unknown target {self.target!r}; engines are built for {', '.join(TARGETS)}")
        for name in ("max_context", "chunk", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.verify < 0:
            raise UsageError(f"--verify is {self.verify}; it must be at least 0")
        if self.verify > 1 + MOST_DRAFTED:
            raise UsageError(
                f"--verify is {self.verify}; it can be at most {1 + MOST_DRAFTED}: a tree's root and {MOST_DRAFTED} "
                "drafted tokens"
            )


def build_profiles(config: ModelConfig, options: BuildOptions, kv: str = "float16") -> tuple[Profile, ...]:
    """Prefill: up to `chunk` prompt tokens beside decoding sequences, `batch` sequences in all. Decode: a token each.
    Verify: up to `verify` tokens each, a root and a tree, which all have logits.

    The inputs are those of graph.graph_inputs; kv: the type of its cache. How many pages a pool has is decided when the
    engine is run: any number that fits in a tensor.
    """
    context = options.max_context or config.max_position_embeddings
    chunk, batch = min(options.chunk, context), options.batch
    sequences = (1, 1, batch)
    profiles = [
        _profile("prefill", config, kv, context, (1, chunk, chunk + batch), sequences, sequences),
        _profile("decode", config, kv, context, sequences, sequences, sequences),
    ]
    if options.verify:
        tokens = (1, options.verify, options.verify * batch)
        profiles.append(_profile("verify", config, kv, context, tokens, sequences, tokens))
    return tuple(profiles)


def _profile(
    name: str, config: ModelConfig, kv: str, context: int, tokens: Range, sequences: Range, rows: Range
) -> Profile:
    def shapes(*dimensions: Range) -> tuple[Shape, Shape, Shape]:
        smallest, typical, largest = zip(*dimensions, strict=True)
        return smallest, typical, largest

    pages = (1, pages_for(min(TYPICAL_CONTEXT, context)), pages_for(context))
    inputs = {
        "input_ids": shapes(tokens),
        "positions": shapes(tokens),
        "slots": shapes(tokens),
        "query_start": shapes((sequences[0] + 1, sequences[1] + 1, sequences[2] + 1)),
        "page_table": shapes(sequences, pages),
        "tree_start": shapes(sequences),
        "tree_mask": shapes(tokens, (2, 2, 2)),
        "logits_rows": shapes(rows),
    }
    if config.switches_on_length:
        inputs["switch_length"] = shapes(sequences)
    pools = {name: page.shape for name, page in pool_layout(config, {"activation": "float16", "kv": kv}).items()}
    most = MOST_ELEMENTS // max(math.prod(page) for page in pools.values())
    for pool, page in pools.items():
        for layer in range(config.num_hidden_layers):
            inputs[f"{pool}.{layer}"] = shapes((1, min(pages[1], most), most), *((size,) * 3 for size in page))
    return Profile(name, inputs)
