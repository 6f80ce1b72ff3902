"""Mean accept length of a draft on held-out prompts: tokens that a verification emits, greedy, with its bonus token.

Run from the repository's root: python -m tests.draft.evaluate
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tests.draft.acceptance import Shape, acceptance
from tests.draft.checkpoint import MODEL, load_draft
from tests.draft.corpus import chat_prompts, chat_tokenizer
from tests.draft.target import batched_target, open_target, write

SHAPES = {
    "tree, depth 3, top 4, 8 nodes": Shape(4, 3, 8),
    "tree, depth 4, top 4, 8 nodes": Shape(4, 4, 8),
    "chain of 3": Shape(1, 3, 4),
    "chain of 1": Shape(1, 1, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--prompts", type=int, default=56, help="how many held-out prompts")
    parser.add_argument("--tokens", type=int, default=96, help="of a reply, at most")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint, model = open_target()
    target = batched_target(checkpoint.config, model, torch.float32)
    prompts = chat_prompts(chat_tokenizer(checkpoint), "held-out", options.prompts)
    texts = write(target, prompts, options.tokens, 0.0, torch.Generator())
    draft = load_draft(options.draft)
    print(
        f"{len(texts)} held-out prompts, {sum(len(text.ids) - text.first for text in texts)} tokens of greedy replies"
    )
    print("| draft | mean accept length | verifications |\n|---|---|---|")
    for name, shape in SHAPES.items():
        result = acceptance(draft, checkpoint.config, target.embedding, texts, shape)
        print(f"| {name} | {result.mean:.2f} | {result.verifications} |", flush=True)


if __name__ == "__main__":
    main()
