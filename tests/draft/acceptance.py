"""How many tokens a verification emits, for greedy decoding: EAGLE-2's dynamic tree against the target's own reply.

The target's greedy reply is known beforehand, so that every place of it can be the root of a tree, all at once
(spec: quantization_and_speculation.md 4.4, 4.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edge.config import ModelConfig
from tests.draft.checkpoint import Draft
from tests.draft.model import Keys, finished, inputs, projected
from tests.draft.target import Text


@dataclass(frozen=True)
class Shape:
    """`top_k` candidates of a node, `depth` levels, `nodes` of the tree with its root."""

    top_k: int
    depth: int
    nodes: int


@dataclass(frozen=True)
class Trees:
    """One tree a root [R]: nodes but the root, by falling probability.

    `tokens` [R, n-1] ids of the target; `parents` [R, n-1] index of the parent among them, -1 for the root.
    """

    tokens: Tensor
    parents: Tensor


@dataclass(frozen=True)
class Acceptance:
    """`emitted` tokens in `verifications`, each bonus token included, the reply's first token (the prompt's) not."""

    emitted: int
    verifications: int

    @property
    def mean(self) -> float:
        """Mean accept length."""
        return self.emitted / self.verifications


@torch.inference_mode()
def acceptance(draft: Draft, config: ModelConfig, embedding: Tensor, texts: Sequence[Text], shape: Shape) -> Acceptance:
    """Walk through the reply of every text, a tree at a time."""
    emitted = verifications = 0
    for text in texts:
        lengths = accepted(grow(draft, config, embedding, text, shape), text)
        place = 0
        while place < len(lengths):
            place += int(lengths[place])
            verifications += 1
        # What lies beyond the end token is not emitted.
        emitted += min(place, len(lengths))
    return Acceptance(emitted, verifications)


def grow(draft: Draft, config: ModelConfig, embedding: Tensor, text: Text, shape: Shape) -> Trees:
    """A tree for every written token of `text` but the last, as the root."""
    w, k, ids = draft.weights, shape.top_k, text.ids.long()
    slots = torch.arange(len(ids) - 1)
    states, head = text.states.float(), embedding[draft.vocab]
    z = inputs(w, config, embedding[ids[1:]], states)
    q, past = projected(w, config, z, slots)
    mask = slots <= slots[:, None]
    y = finished(w, config, z, F.scaled_dot_product_attention(q, past.k, past.v, attn_mask=mask, enable_gqa=True))
    roots = torch.arange(text.first - 1, len(ids) - 2)  # slot of the root: its token is the next one
    best = F.linear(y[roots], head).log_softmax(-1).topk(k)
    sums, tokens = [best.values], [draft.vocab[best.indices]]  # the history
    parents = [torch.full_like(best.indices, -1)]
    beam = torch.arange(k).expand(len(roots), k)  # history indices of the nodes to go on from
    hidden, own, start = y[roots, None].expand(-1, k, -1), None, 0
    for level in range(1, shape.depth):
        z = inputs(w, config, embedding[_flat(tokens).gather(1, beam)], hidden)
        # Slots of a level are one apart in RoPE; [R, k, H] as k texts of one token.
        q, new = projected(w, config, z[:, :, None], (roots + level)[:, None, None])
        own = new if own is None else Keys(torch.cat([own.k, new.k], -2), torch.cat([own.v, new.v], -2))
        y = finished(w, config, z[:, :, None], _attend(q, past, own, roots))[:, :, 0]
        best = F.linear(y, head).log_softmax(-1).topk(k)
        candidates = (_flat(sums).gather(1, beam)[..., None] + best.values).flatten(1)
        sums.append(candidates)
        tokens.append(draft.vocab[best.indices].flatten(1))
        parents.append(beam.repeat_interleave(k, 1))
        start += k if level == 1 else k * k
        chosen = candidates.topk(k).indices
        beam, source = start + chosen, chosen // k
        rows = torch.arange(len(roots))[:, None]
        hidden, own = y[rows, source], Keys(own.k[rows, source], own.v[rows, source])
    return _ranked(_flat(sums), _flat(tokens), _flat(parents), shape.nodes - 1)


def _flat(levels: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(levels), 1)


def _attend(q: Tensor, past: Keys, own: Keys, roots: Tensor) -> Tensor:
    """Attention [R, k, Hq, 1, d] of q over the slots up to each root, and each node's own line of descent."""
    kv_heads, scale = past.k.shape[0], q.shape[-1] ** -0.5
    grouped = q.squeeze(-2).unflatten(-2, (kv_heads, -1))  # [R, k, Hkv, G, d]
    before = torch.einsum("rkhgd,htd->rkhgt", grouped, past.k) * scale
    before = before.masked_fill(torch.arange(past.k.shape[1]) > roots[:, None, None, None, None], -torch.inf)
    inside = torch.einsum("rkhgd,rkhtd->rkhgt", grouped, own.k) * scale
    shares = torch.cat([before, inside], -1).softmax(-1)
    shared, single = shares.split([before.shape[-1], inside.shape[-1]], -1)
    out = torch.einsum("rkhgt,htd->rkhgd", shared, past.v) + torch.einsum("rkhgt,rkhtd->rkhgd", single, own.v)
    return out.flatten(2, 3)[..., None, :]


def _ranked(sums: Tensor, tokens: Tensor, parents: Tensor, count: int) -> Trees:
    """The `count` likeliest of the history; a parent is never less likely than its child, and comes before it."""
    chosen = sums.sort(dim=1, descending=True, stable=True).indices[:, :count]
    place = torch.full_like(sums, -1, dtype=torch.long).scatter(1, chosen, torch.arange(count).expand_as(chosen))
    above = parents.gather(1, chosen)
    return Trees(tokens.gather(1, chosen), torch.where(above < 0, -1, place.gather(1, above.clamp(min=0))))


def accepted(trees: Trees, text: Text) -> Tensor:
    """Tokens that each root's verification emits [R]: the depth of the deepest node on the target's path, plus one."""
    ids = F.pad(text.ids.long(), (0, trees.tokens.shape[1] + 1), value=-1)
    roots = torch.arange(text.first, len(text.ids) - 1)
    depths = torch.zeros(len(roots), trees.tokens.shape[1] + 1, dtype=torch.long)  # last column: the root's
    right = torch.zeros_like(depths, dtype=torch.bool)
    right[:, -1] = True
    for node in range(trees.tokens.shape[1]):
        parent = trees.parents[:, node : node + 1]  # -1 is the last column
        parent = torch.where(parent < 0, depths.shape[1] - 1, parent)
        depth = depths.gather(1, parent)[:, 0] + 1
        depths[:, node] = depth
        right[:, node] = right.gather(1, parent)[:, 0] & (trees.tokens[:, node] == ids[roots + depth])
    return (depths * right).amax(1) + 1
