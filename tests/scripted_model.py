"""A real model that says what it is told: its next token depends on the last one alone.

Every token has a direction of its own in the hidden state, both branches of every layer add nothing, and the head turns
a token's direction into that of the one to follow. Replies are single tokens of the vocabulary, so that the whole path,
from a checkpoint through export, engine and command, is the one of any model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from tests.synthetic import tiny_config, write_hf_checkpoint

_VOCABULARY, _HIDDEN, _END = 320, 384, 4
ASKED, TOLD = "<|asked|>", "<|told|>"
# The last token says whom the model answers: a person, or a tool.
_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{{ '<|told|>' if messages[-1]['role'] == 'tool' else '<|asked|>' }}{% endif %}"
)


def write_scripted_bundle(folder: Path, script: Mapping[str, str], *, context: int = 4096) -> Path:
    """A bundle of a model that answers ASKED and TOLD with the texts of the script, one token each, then stops."""
    texts = [ASKED, TOLD, *dict.fromkeys(script.values())]
    config = tiny_config(
        vocab_size=_VOCABULARY + len(texts),
        hidden_size=_HIDDEN,
        tie_word_embeddings=False,
        max_position_embeddings=context,
    )
    checkpoint = write_hf_checkpoint(folder / "checkpoint", config, dtype="float32")
    write_hf_checkpoint(folder / "words", tiny_config(), tokenizer=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "words" / "tokenizer.json"))
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in texts])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    settings = json.loads((folder / "words" / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": _TEMPLATE}))
    _write_weights(checkpoint, {tokenizer.token_to_id(a): tokenizer.token_to_id(b) for a, b in script.items()})
    return export_bundle(open_checkpoint(checkpoint), folder / "bundle", ExportOptions(weights=WeightFormat("exact")))


def _write_weights(checkpoint: Path, following: Mapping[int, int]) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    vocabulary = weights["lm_head.weight"].shape[0]
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            weight[:] = 0
        elif name.endswith("norm.weight"):
            weight[:] = 1
    weights["model.embed_tokens.weight"] = np.eye(vocabulary, _HIDDEN, dtype=np.float32)
    for token in range(vocabulary):
        weights["lm_head.weight"][following.get(token, _END), token] = 1
    save_file(weights, path, {"format": "pt"})
