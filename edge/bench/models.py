"""The published shapes that speed is measured and computed for (spec: infllmv2.md 1.1)."""

from __future__ import annotations

from dataclasses import replace

from edge.config import ModelConfig

MINICPM4_05B = ModelConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=73448,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=256.0,
    bos_token_id=1,
    eos_token_ids=(2, 73440),
)
MINICPM4_8B = replace(
    MINICPM4_05B,
    hidden_size=4096,
    intermediate_size=16384,
    num_hidden_layers=32,
    num_attention_heads=32,
    head_dim=128,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
