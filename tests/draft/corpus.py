"""The draft's training text: what the target itself writes.

Run from the repository's root: python -m tests.draft.corpus --out FOLDER
Its greedy replies to the training prompts of tests/draft/prompts.py, and whole chats: given the opening of a user's
turn, the target writes the user's prompt too, sampled, and replies to that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from build_engine.checkpoint import Checkpoint
from edge.text import TextSettings, TokenDecoder
from edge.text import Tokenizer as ChatTokenizer
from tests.draft.prompts import prompts
from tests.draft.target import Target, Text, batched_target, open_target, write

BATCH = 256
SEED = 0
PROMPT_TOKENS = 64  # at most, of a user's turn that the target writes
REPLY_TOKENS = 160  # at most


@dataclass(frozen=True)
class Part:
    """`count` texts; `own` prompts are written by the target."""

    name: str
    count: int
    own: bool


PARTS = (Part("prompts", 3584, False), Part("own", 1536, True))


def chat_tokenizer(checkpoint: Checkpoint) -> ChatTokenizer:
    """The target's tokenizer with its chat template."""
    text = checkpoint.text
    assert text is not None
    model = Tokenizer.from_str(text.tokenizer_json)
    settings = TextSettings(text.add_bos, text.bos_token, text.eos_token, text.chat_template)
    return ChatTokenizer(model, settings, TokenDecoder.of(model))


def chat_prompts(tokenizer: ChatTokenizer, split: str, count: int) -> list[list[int]]:
    """The split's prompts as token ids, by the chat template."""
    return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in prompts(split, count)]


def own_prompts(
    target: Target, tokenizer: ChatTokenizer, count: int, generator: torch.Generator
) -> Iterator[list[list[int]]]:
    """Batches of chats, up to the reply, whose user's turn the target writes; `count` in all.

    Turns that find no end within PROMPT_TOKENS are dropped.
    """
    marker = "\x00"
    whole = tokenizer.render_chat([{"role": "user", "content": marker}])
    before, after = (tokenizer.encode(part, add_bos=False) for part in whole.split(marker))
    (end, *rest), made = after, 0
    while made < count:
        texts = write(target, [before] * BATCH, PROMPT_TOKENS, 1.0, generator)
        full = [[*text.ids.tolist(), *rest] for text in texts if text.ids[-1] == end]
        yield full[: count - made]
        made += len(full)


def batches(part: Part, target: Target, tokenizer: ChatTokenizer, generator: torch.Generator) -> Iterator[list[Text]]:
    """The texts of a part, some at a time."""
    if part.own:
        sources: Iterator[list[list[int]]] = own_prompts(target, tokenizer, part.count, generator)
    else:
        every = chat_prompts(tokenizer, "train", part.count)
        sources = iter([every[i : i + BATCH] for i in range(0, len(every), BATCH)])
    for some in sources:
        yield write(target, some, REPLY_TOKENS, 0.0, generator)


def save_texts(path: Path, texts: list[Text]) -> None:
    """One .npz of many texts, end to end."""
    np.savez(
        path,
        ids=torch.cat([text.ids for text in texts]).numpy(),
        states=torch.cat([text.states for text in texts]).numpy(),
        lengths=np.array([len(text.ids) for text in texts]),
        first=np.array([text.first for text in texts]),
    )


def load_texts(folder: Path, most_files: int | None = None) -> list[Text]:
    """All texts of a folder, in a fixed order."""
    texts = []
    for path in sorted(folder.glob("*.npz"))[:most_files]:
        with np.load(path) as file:
            ids, states = torch.from_numpy(file["ids"]), torch.from_numpy(file["states"])
            lengths, first = file["lengths"].tolist(), file["first"].tolist()
        # Every id but the last has a state.
        for text, hidden, start in zip(ids.split(lengths), states.split([n - 1 for n in lengths]), first, strict=True):
            texts.append(Text(text, hidden, start))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the texts, about 1.3 GB")
    parser.add_argument("--parts", nargs="*", default=[part.name for part in PARTS], help="default: all")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint, model = open_target()
    target, tokenizer = batched_target(checkpoint.config, model, torch.bfloat16), chat_tokenizer(checkpoint)
    going = {
        part.name: batches(part, target, tokenizer, torch.Generator().manual_seed(options.seed + index))
        for index, part in enumerate(PARTS)
        if part.name in options.parts
    }
    began, tokens, number = time.monotonic(), 0, 0
    while going:  # in turn, so that the first files of a folder are a corpus too
        for name in list(going):
            if (texts := next(going[name], None)) is None:
                del going[name]
                continue
            save_texts(options.out / f"{number:03}-{name}.npz", texts)
            number, tokens = number + 1, tokens + sum(len(text.ids) - text.first for text in texts)
            print(f"{time.monotonic() - began:5.0f} s  {name}: {tokens} tokens in all", flush=True)


if __name__ == "__main__":
    main()
