"""Train the draft of SmolLM2-135M-Instruct on a CPU, on texts of tests/draft/corpus.py.

Run from the repository's root: python -m tests.draft.train --corpus FOLDER --out tests/draft/model
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edge.config import ModelConfig
from tests.draft.checkpoint import Draft, load_draft, save_draft
from tests.draft.corpus import load_texts
from tests.draft.model import init_weights, unrolled
from tests.draft.target import Text, open_target

SEED = 0
VOCAB = 8192
STEP_WEIGHTS = (1.0, 0.8, 0.64)  # of the draft steps
BATCH_SLOTS = 3072  # of a batch's replies, padded
WARM_UP = 20  # batches
DECAY = 0.5  # the last share of the batches, in which the rate falls to zero
COUNTED_ROWS = 10_000  # whose full distribution the FR-Spec ids are counted from
CHUNK = 256  # rows whose logits exist at once
RIDGE = 1e-2


@dataclass(frozen=True)
class Batch:
    """Texts whose replies begin at the same slot, padded on both sides: `ids` [B, T + 1] and `states` [B, T, H].

    `pads` [B] slots on the left. The first slot whose output counts is `begin`: with the reply's first token it
    predicts the second. `rows` [R]: flat indices into [B, T - begin] of those whose output has a state to be compared
    with, the next one; `weights` [S, R], 0 where a draft of s steps would have begun before `begin`.
    """

    ids: Tensor
    states: Tensor
    pads: Tensor
    begin: int
    rows: Tensor
    weights: Tensor


def make_batch(texts: Sequence[Text], steps: int) -> Batch:
    """Pad and align, for so many draft steps."""
    begin = max(text.first for text in texts) - 1
    pads = torch.tensor([begin + 1 - text.first for text in texts])
    length = max(int(pad) + len(text.states) for text, pad in zip(texts, pads, strict=True))
    ids = torch.zeros(len(texts), length + 1, dtype=torch.long)
    states = torch.zeros(len(texts), length, texts[0].states.shape[1])
    for row, (text, pad) in enumerate(zip(texts, pads.tolist(), strict=True)):
        ids[row, pad : pad + len(text.ids)] = text.ids
        states[row, pad : pad + len(text.states)] = text.states
    ends = torch.tensor([len(text.states) - text.first for text in texts])  # compared slots
    slot = torch.arange(length - begin)
    rows = (slot < ends[:, None]).flatten().nonzero()[:, 0]
    since = rows % len(slot)
    weights = torch.stack([weight * (since >= number) for number, weight in enumerate(STEP_WEIGHTS[:steps])])
    return Batch(ids, states, pads, begin, rows, weights)


class SoftCrossEntropy(torch.autograd.Function):
    """Mean over rows of the cross-entropy between the target's and the draft's distribution over the draft's tokens.

    The logits of all rows would not fit the cache, so that loss and gradient are computed together, some rows at once.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, states: Tensor, weights: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        """`outputs` [S, R, H] bfloat16, `states` [R, H], `weights` [S, R], `head` [V', H] bfloat16.

        Returns the loss, and for every step the share of the first rows whose likeliest token is the target's.
        """
        steps, count = weights.shape
        gradient, loss, right = torch.empty_like(outputs), torch.zeros(()), torch.zeros(steps)
        for rows in torch.arange(count).split(CHUNK):
            chunk = slice(int(rows[0]), int(rows[-1]) + 1)
            wanted = F.linear(states[chunk].to(head.dtype), head).float().softmax(-1)
            for step in range(steps):
                found = F.linear(outputs[step, chunk], head).float().log_softmax(-1)
                weight = weights[step, chunk] / count
                loss -= ((found * wanted).sum(-1) * weight).sum()
                if chunk.start == 0:
                    right[step] = (found.argmax(-1) == wanted.argmax(-1))[weight > 0].float().mean()
                gradient[step, chunk] = ((found.exp_() - wanted) * weight[:, None]).to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None


@torch.inference_mode()
def frequent_tokens(texts: Sequence[Text], config: ModelConfig, embedding: Tensor, size: int, seed: int) -> Tensor:
    """The `size` tokens that the target is likeliest to write, most frequent first; end tokens are always among them.

    Expected counts (the target's probabilities, summed) know far more words than so small a corpus has.
    """
    counts = torch.zeros(config.vocab_size)
    head = embedding.to(torch.bfloat16)
    states = torch.cat([text.states[text.first - 1 :] for text in texts])
    rows = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))[:COUNTED_ROWS]
    for some in rows.split(CHUNK):
        counts += F.linear(states[some].to(torch.bfloat16), head).float().softmax(-1).sum(0)
    counts *= len(states) / len(rows)
    for text in texts:
        counts += torch.bincount(text.ids[text.first :].long(), minlength=config.vocab_size)
    counts[list(config.eos_token_ids)] += len(texts)
    return counts.argsort(descending=True, stable=True)[:size]


@torch.inference_mode()
def linear_guess(texts: Sequence[Text], embedding: Tensor) -> Tensor:
    """fc [H, 2H] that is the best linear guess of the next state: ridge regression on both inputs, normed."""
    hidden = embedding.shape[1]
    square, product = torch.zeros(2 * hidden, 2 * hidden), torch.zeros(2 * hidden, hidden)
    for some in (texts[i : i + 64] for i in range(0, len(texts), 64)):
        first, states = torch.cat([text.ids[text.first : -1] for text in some]).long(), [text.states for text in some]
        given = torch.cat([state[text.first - 1 : -1] for text, state in zip(some, states, strict=True)]).float()
        wanted = torch.cat([state[text.first :] for text, state in zip(some, states, strict=True)]).float()
        x = torch.cat([F.rms_norm(embedding[first], (hidden,)), F.rms_norm(given, (hidden,))], 1)
        square += x.T @ x
        product += x.T @ wanted
    square += RIDGE * square.diagonal().mean() * torch.eye(2 * hidden)
    return torch.linalg.solve(square, product).T.contiguous()


def epochs(texts: Sequence[Text], count: int, seed: int) -> Iterator[list[Text]]:
    """Batches of texts whose replies are of like length, in random order, each text `count` times."""
    generator = torch.Generator().manual_seed(seed)
    replies = [len(text.ids) - text.first for text in texts]
    for _ in range(count):
        noise = torch.rand(len(texts), generator=generator) * 24
        order = sorted(range(len(texts)), key=lambda i: float(replies[i] + noise[i]))
        batches: list[list[Text]] = [[]]
        for i in order:
            if (len(batches[-1]) + 1) * replies[i] > BATCH_SLOTS:
                batches.append([])
            batches[-1].append(texts[i])
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


@dataclass(frozen=True)
class Recipe:
    """Passes over the corpus, draft steps, rate of Muon and AdamW, weight of the loss on states, noise put on them."""

    epochs: int
    steps: int
    rate: float
    hidden_weight: float
    noise: float


def train(draft: Draft, config: ModelConfig, embedding: Tensor, texts: Sequence[Text], recipe: Recipe) -> Iterator[str]:
    """Update `draft.weights` in place. Yields progress after every batch."""
    w = draft.weights
    head = embedding[draft.vocab].to(torch.bfloat16)
    rms = state_rms(texts)
    matrices = torch.optim.Muon(
        [t for t in w.values() if t.ndim == 2], lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    norms = torch.optim.AdamW([t for t in w.values() if t.ndim == 1], lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    total = sum(1 for _ in epochs(texts, recipe.epochs, SEED))
    generator = torch.Generator().manual_seed(SEED)
    for number, some in enumerate(epochs(texts, recipe.epochs, SEED)):
        batch = make_batch(some, recipe.steps)
        rate = recipe.rate * min(1.0, (number + 1) / WARM_UP, (total - number) / (DECAY * total))
        with torch.autocast("cpu", torch.bfloat16):
            embedded = F.embedding(batch.ids[:, 1:], embedding)
            noise = torch.randn(batch.states.shape, generator=generator) * (recipe.noise * rms)
            steps = unrolled(w, config, embedded, batch.states + noise, batch.pads, batch.begin, recipe.steps)
            outputs = torch.stack([y.flatten(0, 1)[batch.rows] for y in steps])
        states = F.pad(batch.states[:, batch.begin + 1 :], (0, 0, 0, 1)).flatten(0, 1)[batch.rows]
        tokens_loss, right = SoftCrossEntropy.apply(outputs.to(torch.bfloat16), states, batch.weights, head)
        distance = F.smooth_l1_loss(outputs / rms, (states / rms).expand_as(outputs), reduction="none").mean(-1)
        hidden_loss = (distance * batch.weights).sum() / batch.weights.shape[1]
        (tokens_loss + recipe.hidden_weight * hidden_loss).backward()
        for optimizer in (matrices, norms):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        shares = ", ".join(f"{share:.1%}" for share in right.tolist())
        yield f"batch {number + 1}/{total}: loss {tokens_loss:.3f}, hidden {hidden_loss:.3f}, right {shares}"


def state_rms(texts: Sequence[Text]) -> float:
    """Root mean square of the hidden states of replies, by the first texts."""
    return float(torch.cat([text.states[text.first :] for text in texts[:64]]).float().square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that tests.draft.corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the draft to write")
    parser.add_argument("--start", type=Path, help="go on from this draft")
    parser.add_argument("--vocab", type=int, default=VOCAB, help="FR-Spec ids")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, choices=(1, 2, 3), help="draft steps unrolled")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--hidden-weight", type=float, default=10.0)
    parser.add_argument("--noise", type=float, default=0.3, help="on the states put in, relative to their size")
    parser.add_argument("--save-every", type=int, default=100, help="batches")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint, model = open_target()
    config, embedding = checkpoint.config, model.get_input_embeddings().weight.detach()
    texts = load_texts(options.corpus)
    if options.start is None:
        vocab = frequent_tokens(texts, config, embedding, options.vocab, SEED)
        draft = Draft(init_weights(config, linear_guess(texts, embedding), SEED), vocab)
    else:
        begun = load_draft(options.start)
        draft = Draft({name: tensor.requires_grad_() for name, tensor in begun.weights.items()}, begun.vocab)
    recipe = Recipe(options.epochs, options.steps, options.rate, options.hidden_weight, options.noise)
    began = time.monotonic()
    for number, progress in enumerate(train(draft, config, embedding, texts, recipe), 1):
        if number % 10 == 0:
            print(f"{time.monotonic() - began:5.0f} s  {progress}", flush=True)
        if number % options.save_every == 0:
            save_draft(options.out, config, draft)
    save_draft(options.out, config, draft)


if __name__ == "__main__":
    main()
