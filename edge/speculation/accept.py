"""Which proposed tokens are kept: sample and match, which changes no output (proof in `accept`)."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

from edge.speculation.tree import TokenTree


@dataclass(frozen=True)
class Accepted:
    """path: the accepted nodes below the root, each the parent of the next. tokens: what is emitted.

    There is always one token more than nodes: the last token is not in the cache yet, as after a plain step. The rows
    whose keys and values stay are the root's and those of `path`.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]


def accept(
    tree: TokenTree, choose: Callable[[int], int], ends: Container[int] = (), limit: int | None = None
) -> Accepted:
    """Walk a verified tree from its root: draw the token after a node; if a child holds it, go on there, else stop.

    `choose(node)` draws from the model's own distribution after that node. It is called once for each emitted token,
    in order, and what the tree proposes only decides whether the walk goes on. So a sampler sees the same logits, draws
    and history as in plain decoding and gives the same tokens, whatever temperature, filters or penalties it applies.
    A deterministic tree loses nothing against rejection sampling: either accepts with the probability of its children.
    Nothing is emitted after a token of `ends`, or after `limit` tokens.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a step emits at least one token, the limit is {limit}")
    node = 0
    path: list[int] = []
    tokens: list[int] = []
    while True:
        token = choose(node)
        tokens.append(token)
        if token in ends or len(tokens) == limit:
            break
        match = next((child for child in tree.children(node) if tree.tokens[child] == token), None)
        if match is None:
            break
        node = match
        path.append(node)
    return Accepted(tuple(path), tuple(tokens))
