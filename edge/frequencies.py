"""FR-Spec's frequent tokens: the rows of the head that a draft model has (spec: quantization_and_speculation.md 4.8).

A file holds their ids, the most frequent first: `freq_*.pt` as published (a list, or a tensor of integers), .npy,
.json, or .txt with one a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from edge.errors import EdgeError, UsageError
from edge.text import Tokenizer
from edge.torch_file import load_torch_file

SUFFIXES = (".pt", ".npy", ".json", ".txt")
_PIECE, _BATCH = 1 << 14, 64  # characters that are encoded in one go, and how many of such pieces side by side


def read_frequencies(path: Path, vocab_size: int) -> np.ndarray:
    """The ids of a file, int32 [n] in its order; EdgeError unless they are different tokens of the vocabulary."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} is no list of frequent tokens; give a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError(f"{path} does not exist; make one with edge freq, or give the draft's own freq_*.pt")
    ids = _whole_numbers(_read(path), path)
    if not ids.size:
        raise EdgeError(f"{path} lists no tokens; make it again with edge freq")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise EdgeError(
            f"{path} lists token {outside[0]}, but the model has the tokens 0 to {vocab_size - 1}; use a list that was "
            "made with its tokenizer"
        )
    unique, counts = np.unique(ids, return_counts=True)
    if unique.size < ids.size:
        raise EdgeError(f"{path} lists token {unique[counts > 1][0]} more than once; make it again with edge freq")
    return ids.astype(np.int32)


def _read(path: Path) -> Any:
    if path.suffix == ".pt":
        return load_torch_file(path)
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else [int(line) for line in text.split()]
    except (ValueError, EOFError, RecursionError) as error:  # damaged JSON, UTF-8 and .npy files are ValueErrors, too
        raise EdgeError(f"{path} cannot be read ({error}); make it again with edge freq") from None


def _whole_numbers(values: Any, path: Path) -> np.ndarray:
    """int64 [n]."""
    if isinstance(values, np.ndarray) and values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
        return values.astype(np.int64)
    if isinstance(values, list) and all(type(value) is int and value.bit_length() < 64 for value in values):
        return np.array(values, np.int64)
    raise EdgeError(f"{path} holds something else than one list of token ids; make it again with edge freq")


def check_name(path: Path) -> None:
    """UsageError unless `write_frequencies` can tell the format from the name."""
    if path.suffix not in (".npy", ".json", ".txt"):
        raise UsageError(f"{path} is no name for a list of tokens; end it in .npy, .json or .txt")


def write_frequencies(path: Path, ids: np.ndarray) -> None:
    """As .npy, .json or .txt, by the file's name."""
    if path.suffix == ".npy":
        np.save(path, ids.astype(np.int32))
    else:
        numbers = ids.tolist()
        path.write_text((json.dumps(numbers) if path.suffix == ".json" else "\n".join(map(str, numbers))) + "\n")


def control_tokens(tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> set[int]:
    """Tokens that a reply needs however rare they are in texts: those that end it, all that were added to the
    vocabulary (special tokens, tools, thinking), and what the chat template writes around messages.
    """
    model, settings = tokenizer.model, tokenizer.settings
    named = (settings.bos_token, settings.eos_token)
    ids = {*eos_token_ids, *model.get_added_tokens_decoder(), *(model.token_to_id(n) for n in named if n is not None)}
    try:
        chat = tokenizer.render_chat([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])
    except EdgeError:  # no template, or one for other conversations: it adds nothing that is known
        chat = ""
    return {token for token in (*ids, *tokenizer.encode(chat, add_bos=False)) if token is not None}


@dataclass(frozen=True)
class Frequencies:
    """ids [n] int32, the most frequent first; tokens: how many were counted, and what share of them has its id here."""

    ids: np.ndarray
    tokens: int
    coverage: float


def most_frequent(counts: np.ndarray, size: int, always: Iterable[int]) -> Frequencies:
    """The `size` tokens of the highest counts [vocabulary], all of `always` among them; equal ones by their ids.

    Tokens of `always` that are too rare take the place of the rarest others.
    """
    kept = np.array(sorted(set(always)), np.int64)
    if size > counts.size:
        raise UsageError(f"--size {size} exceeds the vocabulary of {counts.size} tokens; ask for fewer")
    if size < kept.size:
        raise UsageError(f"--size {size} has no room for the {kept.size} control tokens of the model; ask for more")
    order = np.argsort(-counts, kind="stable")
    others = order[~np.isin(order, kept)][: size - kept.size]
    chosen = np.sort(np.concatenate([kept, others]))
    ids = chosen[np.argsort(-counts[chosen], kind="stable")]
    total = int(counts.sum())
    return Frequencies(ids.astype(np.int32), total, float(counts[ids].sum()) / max(total, 1))


def count_tokens(
    files: Sequence[Path], tokenizer: Tokenizer, vocab_size: int, progress: Callable[..., None] = lambda *_: None
) -> np.ndarray:
    """How often each token occurs in texts, int64 [vocabulary]; progress(bytes done, bytes in all, file).

    Texts are read in pieces that end with a line; what is no UTF-8 is left out.
    """
    counts = np.zeros(vocab_size, np.int64)
    total, before = sum(file.stat().st_size for file in files), 0
    for file in files:
        with file.open("rb") as binary, TextIOWrapper(binary, encoding="utf-8", errors="ignore") as stream:
            while pieces := [piece for _ in range(_BATCH) if (piece := _next_piece(stream))]:
                encoded = tokenizer.model.encode_batch(pieces, add_special_tokens=False)
                ids = np.concatenate([np.array(part.ids, np.int64) for part in encoded])
                counts += np.bincount(ids[ids < vocab_size], minlength=vocab_size)
                progress(min(total, before + binary.tell()), total, file.name)
        before += file.stat().st_size
    return counts


def _next_piece(stream: TextIO) -> str:
    """About _PIECE characters, up to the end of a line; of a line without end no more than as many again."""
    piece = stream.read(_PIECE)
    return piece + stream.readline(_PIECE) if piece else ""
