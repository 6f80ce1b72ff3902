"""The trained draft as a folder of the published layout: config.json, model.safetensors in float16, FR-Spec ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge.config import ModelConfig
from tests.draft.model import Weights

MODEL = Path(__file__).parent / "model"


@dataclass(frozen=True)
class Draft:
    """`weights` float32; `vocab` [V'] int64: the target's ids of the draft's tokens, most frequent first."""

    weights: Weights
    vocab: Tensor


def save_draft(folder: Path, config: ModelConfig, draft: Draft) -> None:
    """Write `folder`; `config` is the target's. Weights are rounded to float16."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "num_hidden_layers": 1,
        "frspec_vocab_size": len(draft.vocab),
        "eos_token_id": list(config.eos_token_ids),
    }
    shared = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings", "scale_emb", "scale_depth",
        "dim_model_base", "bos_token_id",
    )  # fmt: skip
    values |= {name: getattr(config, name) for name in shared}
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    rounded = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in draft.weights.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    np.save(folder / f"freq_{len(draft.vocab)}.npy", draft.vocab.numpy().astype(np.int32))


def load_draft(folder: Path) -> Draft:
    """The draft with its weights widened to float32."""
    size = json.loads((folder / "config.json").read_text())["frspec_vocab_size"]
    vocab = np.load(folder / f"freq_{size}.npy", allow_pickle=False)
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    return Draft(weights, torch.from_numpy(vocab.astype(np.int64)))
