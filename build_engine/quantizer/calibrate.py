"""Text to calibration sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from build_engine.checkpoint import Checkpoint
from edge.errors import EdgeError, UsageError

SAMPLE = Path(__file__).with_name("sample.txt")
_WHOLE = 4 << 20  # characters that are tokenised as they are; a tokenizer holds a hundred bytes and more for each token
_CHARACTERS_A_TOKEN = 16  # more than any prose takes


def calibration_sequences(checkpoint: Checkpoint, text: str, samples: int, length: int) -> np.ndarray:
    """`text` -> [S, length] token ids int32, S <= `samples`, spread evenly over the text.

    Every sequence begins as a prompt does, with the BOS token if the tokenizer adds one. A text shorter than `length`
    is one shorter sequence. Of a text far longer than what is asked for, `samples` excerpts are tokenised. UsageError
    for a checkpoint without a tokenizer, a text without tokens, or sequences beyond the model's positions.
    """
    assets = checkpoint.text
    if assets is None:
        raise UsageError(
            f"{checkpoint.path} has no tokenizer to read calibration text with; add tokenizer.json, or choose "
            "--method rtn, which needs no text"
        )
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    excerpts = _excerpts(text, samples, _CHARACTERS_A_TOKEN * length)
    parts = [np.array(tokenizer.encode(part, add_special_tokens=False).ids, np.int32) for part in excerpts]
    ids = np.concatenate(parts)
    bos = tokenizer.encode("").ids  # the BOS token or nothing
    width = min(length - len(bos), len(ids))
    if width < 1:
        raise UsageError("the calibration text holds no tokens; give --calibration a file of ordinary text")
    if (positions := checkpoint.config.max_position_embeddings) < width + len(bos):
        raise UsageError(
            f"--length {length} is beyond the {positions} positions of {checkpoint.path}; give a smaller one"
        )
    if ids.max() >= checkpoint.config.vocab_size:
        raise EdgeError(
            f"{checkpoint.path}: the tokenizer gives token {ids.max()}, but the embedding has "
            f"{checkpoint.config.vocab_size} rows; tokenizer and weights are not of the same model"
        )
    windows = ids[: len(ids) // width * width].reshape(-1, width)
    count = min(samples, len(windows))
    chosen = windows[np.arange(count) * len(windows) // count]
    return np.concatenate([np.tile(np.array(bos, np.int32), (count, 1)), chosen], axis=1)


def _excerpts(text: str, count: int, size: int) -> list[str]:
    """The text, or if it is very long `count` pieces of `size` characters from all over it."""
    if len(text) <= max(_WHOLE, count * size):
        return [text]
    starts = (len(text) - size) * np.arange(count) // max(count - 1, 1)
    return [text[start : start + size] for start in starts]
