"""The small model that the TensorRT tests export, and the formats they export it in."""

from __future__ import annotations

from build_engine.formats import WeightFormat
from edge.config import LongRope
from tests.synthetic import tiny_config

# 16 query heads on 2 KV heads, and LongRoPE lists that differ, so that the graph has every input there is.
CONFIG = tiny_config(
    num_attention_heads=16,
    num_key_value_heads=2,
    max_position_embeddings=256,
    long_rope=LongRope((1.0,) * 8, tuple(1.0 + i for i in range(8)), original_max_position_embeddings=64),
)
FORMATS = {"exact": WeightFormat("exact"), "w4a16": WeightFormat("w4a16", 32, symmetric=True, head="exact")}
