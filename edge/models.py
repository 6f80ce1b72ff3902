"""The published shapes (spec: infllmv2.md 1.1, quantization_and_speculation.md 1.5)."""

from __future__ import annotations

from dataclasses import replace

from edge.config import ModelConfig, SparseConfig

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
_CANN_1B = replace(MINICPM4_8B, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16)
_CANN_3B = replace(MINICPM4_8B, hidden_size=2560, intermediate_size=10240, num_attention_heads=20)

# By their makers' names; the 8B models attend sparsely once told to, as `edge export --attention sparse` does.
PUBLISHED = {
    "MiniCPM4-0.5B": MINICPM4_05B,
    "MiniCPM4-8B": replace(MINICPM4_8B, sparse=SparseConfig()),
    "MiniCPM4.1-8B": replace(MINICPM4_8B, max_position_embeddings=65536, sparse=SparseConfig()),
    "BitCPM4-0.5B": MINICPM4_05B,
    "BitCPM-CANN-1B": _CANN_1B,
    "BitCPM-CANN-3B": _CANN_3B,
    "BitCPM-CANN-8B": MINICPM4_8B,
}


def published(name: str) -> tuple[str, ModelConfig] | None:
    """A published model by name, whatever its case and its maker's name before it; None if there is none."""
    wanted = name.rpartition("/")[2].lower()
    return next(((known, config) for known, config in PUBLISHED.items() if known.lower() == wanted), None)
