"""Recall accuracy of a checkpoint in torch, dense and with InfLLM-V2 on every row of every layer.

Run from the repository's root: python -m tests.recall.evaluate tests/recall/model --queries 224
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edge.config import ModelConfig, SparseConfig
from tests.recall import task
from tests.recall.checkpoint import load_checkpoint
from tests.recall.model import Attention, Weights, dense_attention, forward, select_blocks, sparse_attention

NEEDLES = 32
SEED = 1000


@dataclass(frozen=True)
class Recall:
    """Shares of `queries`: first and second word right, both right.

    `selected`: share of the answer words outside init block and window whose block the last layer's KV heads
    chose; nan for dense attention.
    """

    queries: int
    first: float
    second: float
    both: float
    selected: float


@torch.inference_mode()
def recall(weights: Weights, config: ModelConfig, length: int, queries: int, sparse: SparseConfig | None) -> Recall:
    """Ask for all 32 needles of as many texts of `length` tokens as `queries` need; None is dense attention."""
    rng = np.random.default_rng(SEED + length)
    right: list[np.ndarray] = []
    selected: list[Tensor] = []
    for _ in range(-(-queries // NEEDLES)):
        example = task.example(rng, length, NEEDLES, NEEDLES)
        ids, rows, sources = (
            torch.from_numpy(array.reshape(1, -1)) for array in (example.ids, example.rows, example.sources)
        )
        attention = dense_attention if sparse is None else _watched(sparse, config, sources, selected)
        logits = forward(weights, config, ids, torch.arange(length)[None], rows, attention)
        right.append(logits.argmax(-1).numpy().reshape(example.answers.shape) == example.answers)
    words = np.concatenate(right)
    share = float(torch.cat(selected).float().mean()) if selected else float("nan")
    first, second = words.mean(0).tolist()
    return Recall(len(words), first, second, both=float(words.all(1).mean()), selected=share)


def _watched(sparse: SparseConfig, config: ModelConfig, sources: Tensor, selected: list[Tensor]) -> Attention:
    inner = sparse_attention(sparse)

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        if layer == config.num_hidden_layers - 1:
            selection = select_blocks(q, k, rows, sparse)
            target = (sources // sparse.block_size)[:, None, :, None].expand(-1, k.shape[1], -1, 1)
            free = ~selection.forced.expand_as(selection.chosen).gather(-1, target)
            selected.append(selection.chosen.gather(-1, target)[free])
        return inner(layer, q, k, v, rows)

    return attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--lengths", default="2048,8192,16384,32768", help="tokens, comma-separated")
    parser.add_argument("--queries", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config, weights = load_checkpoint(options.checkpoint)
    default = SparseConfig()
    budgets = (None, default, replace(default, topk=16, window_size=512))
    print("| context | attention (top-k / window) | queries | first word | second | both | block selected |")
    print("|---|---|---|---|---|---|---|")
    for length in map(int, options.lengths.split(",")):
        for sparse in budgets:
            r = recall(weights, config, length, options.queries, sparse)
            name = "dense" if sparse is None else f"sparse {sparse.topk}/{sparse.window_size}"
            chosen = "" if np.isnan(r.selected) else f"{r.selected:.1%}"
            print(
                f"| {length} | {name} | {r.queries} | {r.first:.1%} | {r.second:.1%} | {r.both:.1%} | {chosen} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
