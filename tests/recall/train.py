"""Train the recall test's model on a CPU: a curriculum with dense attention, then InfLLM-V2's selection in the loop.

Run from the repository's root: python -m tests.recall.train --out tests/recall/model
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edge.config import ModelConfig, SparseConfig
from tests.recall import task
from tests.recall.checkpoint import save_checkpoint
from tests.recall.model import (
    Attention,
    Weights,
    attend_selected,
    dense_attention,
    forward,
    init_weights,
    select_blocks,
)

CONFIG = ModelConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=len(task.WORDS),
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=64.0,
    bos_token_id=task.BOS,
    eos_token_ids=(task.EOS,),
    sparse=SparseConfig(),
)
LAST_LAYER = CONFIG.num_hidden_layers - 1
SEED = 0


@dataclass(frozen=True)
class Stage:
    """Texts of `length` tokens, `batch` at once."""

    length: int
    needles: int
    questions: int
    batch: int


# More needles than questions at first: otherwise the last question is answered by elimination, without its key.
CURRICULUM = (
    Stage(32, 4, 2, 128),
    Stage(64, 8, 4, 64),
    Stage(128, 12, 6, 48),
    Stage(256, 20, 12, 24),
    Stage(512, 24, 24, 12),
    Stage(1024, 32, 32, 8),
)
HINTED_LENGTH = 32
SPARSE_STAGE = Stage(2048, 32, 32, 2)
SPARSE_STEPS = 400


@dataclass(frozen=True)
class Batch:
    """Tensors of task.Example: `ids` and `positions` [B, T], `rows`, `answers` and `sources` [B, R]."""

    ids: Tensor
    positions: Tensor
    rows: Tensor
    answers: Tensor
    sources: Tensor


def make_batch(rng: np.random.Generator, stage: Stage) -> Batch:
    """Random examples whose positions jump up to four times, to at most the longest context and a little more."""
    examples = [task.example(rng, stage.length, stage.needles, stage.questions) for _ in range(stage.batch)]
    furthest = CONFIG.max_position_embeddings + 512
    positions = [
        task.jumping_positions(rng, e.ids, int(rng.integers(5)), int(rng.integers(stage.length, furthest)))
        for e in examples
    ]

    def stack(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack([a.ravel() for a in arrays]))

    return Batch(
        ids=stack([e.ids for e in examples]),
        positions=stack(positions),
        rows=stack([e.rows for e in examples]),
        answers=stack([e.answers for e in examples]),
        sources=stack([e.sources for e in examples]),
    )


def with_hints(batch: Batch) -> Batch:
    """Also ask for the first answer word one token early, at the question's key.

    There the key is the current token and not the one before, which is learned first and makes the real row easy.
    """
    first = slice(None, None, task.ANSWER_LENGTH)

    def more(values: Tensor, shift: int = 0) -> Tensor:
        return torch.cat([values, values[:, first] - shift], 1)

    return replace(batch, rows=more(batch.rows, 1), answers=more(batch.answers), sources=more(batch.sources))


def taught_dense(sources: Tensor, losses: list[Tensor]) -> Attention:
    """Dense attention that adds -log of the last layer's mean attention to the answer's place to `losses`."""

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        if layer == LAST_LAYER:
            keys = k.repeat_interleave(CONFIG.group_size, 1)
            z = q @ keys.transpose(2, 3) * CONFIG.head_dim**-0.5
            z = z.masked_fill(torch.arange(k.shape[2]) > rows[:, None, :, None], -torch.inf)
            found = z.softmax(-1).mean(1).gather(-1, sources[..., None])
            losses.append(-(found + 1e-6).log().mean())
        return dense_attention(layer, q, k, v, rows)

    return attention


def taught_sparse(sparse: SparseConfig, sources: Tensor, losses: list[Tensor]) -> Attention:
    """InfLLM-V2 in the last layer; adds the cross-entropy of its block scores to `losses`.

    The target is the block of the answer; forced blocks do not compete. Choosing blocks has no gradient, so
    this is what makes the pooled key of a needle stand out among those of the filler. Earlier layers look
    at most a few tokens back, always inside the window, and stay dense for speed.
    """

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        if layer != LAST_LAYER:
            return dense_attention(layer, q, k, v, rows)
        selection = select_blocks(q, k, rows, sparse)
        past = torch.arange(selection.scores.shape[-1]) <= (rows // sparse.block_size)[:, None, :, None]
        rival = (past & ~selection.forced).expand_as(selection.scores)
        target = (sources // sparse.block_size)[:, None, :, None].expand(-1, k.shape[1], -1, 1)
        ranked = (selection.scores + 1e-20).log().masked_fill(~rival, -torch.inf).log_softmax(-1)
        losses.append(-ranked.gather(-1, target)[rival.gather(-1, target)].mean())
        return attend_selected(q, k, v, rows, selection.chosen, sparse.block_size)

    return attention


def train_dense(weights: Weights, rng: np.random.Generator) -> Iterator[str]:
    """The curriculum: the next stage begins when the running accuracy passes 95 %. Yields progress."""
    optimizer = torch.optim.AdamW(weights.values(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    step = 0
    for stage in CURRICULUM:
        accuracy = 0.0
        while accuracy < 0.95:
            batch = make_batch(rng, stage)
            if stage.length <= HINTED_LENGTH:
                batch = with_hints(batch)
            losses: list[Tensor] = []
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50)
            loss, right = _step(weights, optimizer, batch, taught_dense(batch.sources, losses), losses, 0.5)
            accuracy = 0.9 * accuracy + 0.1 * right
            step += 1
            if step % 50 == 0 or accuracy >= 0.95:
                yield f"dense, {stage.length} tokens, step {step}: loss {loss:.3f}, accuracy {accuracy:.1%}"


def train_sparse(weights: Weights, rng: np.random.Generator) -> Iterator[str]:
    """Dense and sparse steps in turn, the sparse ones with budgets small enough to hurt. Yields progress."""
    optimizer = torch.optim.AdamW(weights.values(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(SPARSE_STEPS):
        batch = make_batch(rng, SPARSE_STAGE)
        sparse = replace(SparseConfig(), topk=int(rng.integers(4, 13)), window_size=int(rng.choice([128, 256])))
        losses: list[Tensor] = []
        is_sparse = step % 2 == 1
        attention = taught_sparse(sparse, batch.sources, losses) if is_sparse else taught_dense(batch.sources, losses)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1 - 0.95 * step / SPARSE_STEPS)
        loss, right = _step(weights, optimizer, batch, attention, losses, 0.3)
        if step % 10 < 2:
            kind = f"topk {sparse.topk}, window {sparse.window_size}" if is_sparse else "dense"
            yield f"sparse stage, step {step}: {kind}: loss {loss:.3f}, accuracy {right:.1%}"


def _step(
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    attention: Attention,
    extra_losses: list[Tensor],
    extra_weight: float,
) -> tuple[float, float]:
    """One update; returns the loss and the share of answer words that were right before it."""
    logits = forward(weights, CONFIG, batch.ids, batch.positions, batch.rows, attention)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten()) + extra_weight * sum(extra_losses)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
    optimizer.step()
    return loss.item(), float((logits.argmax(-1) == batch.answers).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint to write")
    parser.add_argument("--dense-out", type=Path, help="also keep the model as it is before the sparse stage")
    parser.add_argument("--seconds-budget", type=float, default=3600, help="give up after this long")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weights, rng, began = init_weights(CONFIG, options.seed), np.random.default_rng(options.seed), time.monotonic()
    for stage, folder in ((train_dense, options.dense_out), (train_sparse, options.out)):
        for progress in stage(weights, rng):
            seconds = time.monotonic() - began
            print(f"{seconds:5.0f} s  {progress}", flush=True)
            if seconds > options.seconds_budget:
                raise SystemExit(f"not done after {seconds:.0f} s; raise --seconds-budget")
        if folder is not None:
            save_checkpoint(folder, CONFIG, weights)


if __name__ == "__main__":
    main()
