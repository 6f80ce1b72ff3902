"""The recall test's model as a Hugging Face folder: config.json, float16 weights, a tokenizer of whole words."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from build_engine.hf_checkpoint import open_hf
from edge.config import ModelConfig
from tests.recall import task
from tests.recall.model import Weights
from tests.synthetic import hf_config


def save_checkpoint(folder: Path, config: ModelConfig, weights: Weights) -> None:
    """Write `folder`; weights are rounded to float16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config, "float16"), indent=1) + "\n")
    rounded = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in weights.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    bos, eos, unk = task.WORDS[task.BOS], task.WORDS[task.EOS], task.WORDS[task.UNK]
    # Metaspace marks the start of every word, so that decoding, token by token too, puts the spaces back.
    words = [word if word in (unk, bos, eos) else f"▁{word}" for word in task.WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, task.BOS)])
    tokenizer.add_special_tokens([unk, bos, eos])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"add_bos_token": True, "bos_token": bos, "eos_token": eos, "unk_token": unk}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def load_checkpoint(folder: Path) -> tuple[ModelConfig, Weights]:
    """The configuration, and the weights widened to float32."""
    tensors = load_file(folder / "model.safetensors")
    return open_hf(folder).config, {name: tensor.float() for name, tensor in tensors.items()}
