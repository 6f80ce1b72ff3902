"""Text to calibration sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from build_engine.checkpoint import Checkpoint
from edge.errors import EdgeError, UsageError

SAMPLE = Path(__file__).with_name("sample.txt")


def calibration_sequences(checkpoint: Checkpoint, text: str, samples: int, length: int) -> np.ndarray:
    """`text` -> [S, length] token ids int32, S <= `samples`, spread evenly over the text.

    Every sequence begins as a prompt does, with the BOS token if the tokenizer adds one. A text shorter than `length`
    is one shorter sequence. UsageError for a checkpoint without a tokenizer, or a text without enough tokens.
    """
    assets = checkpoint.text
    if assets is None:
        raise UsageError(
            f"{checkpoint.path} has no tokenizer to read calibration text with; add tokenizer.json, or choose "
            "--method rtn, which needs no text"
        )
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    bos = tokenizer.encode("").ids  # the BOS token or nothing
    width = min(length - len(bos), len(ids))
    if width < 1:
        raise UsageError("the calibration text holds no tokens; give --calibration a file of ordinary text")
    if ids.max() >= checkpoint.config.vocab_size:
        raise EdgeError(
            f"{checkpoint.path}: the tokenizer gives token {ids.max()}, but the embedding has "
            f"{checkpoint.config.vocab_size} rows; tokenizer and weights are not of the same model"
        )
    windows = ids[: len(ids) // width * width].reshape(-1, width)
    count = min(samples, len(windows))
    chosen = windows[np.arange(count) * len(windows) // count]
    return np.concatenate([np.tile(np.array(bos, np.int32), (count, 1)), chosen], axis=1)
