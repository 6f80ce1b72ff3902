"""A whole model on the kernels alone: prompt, decode steps and sampling, nothing between the launches of a step.

A random two-layer model with int4 projections (ternary ones in the feed-forward), int8 head and block-sparse
attention; the oracle is the operators' numpy meanings in float32 on the same weights.
"""

from __future__ import annotations

import numpy as np
import pytest

from plugins import PAGE_TOKENS
from plugins.embedding.launch import scaled_rows
from plugins.infllmv2.launch import compress, score_coarse, score_fine, select
from plugins.infllmv2.launch import scratch as sparse_scratch
from plugins.infllmv2.meaning import infllmv2_attention
from plugins.launch import Launch
from plugins.linear.launch import LinearShape, best_parts, head, linear
from plugins.linear.meaning import weights as weights_of
from plugins.linear.pack import pack_codes, pack_scales
from plugins.paged_attention import NO_TREE
from plugins.paged_attention.launch import AttentionShape, append, attend_split, attend_tiles, combine, scratch
from plugins.rms_norm.launch import add_rms_norm, rms_norm
from plugins.rms_norm.meaning import rms_norm as rms_norm_meaning
from plugins.rope.launch import rope_table
from plugins.rope.meaning import rope_table as rope_meaning
from plugins.rope.meaning import rope_tables
from plugins.sampling.launch import sample
from plugins.swiglu.launch import swiglu
from plugins.swiglu.meaning import swiglu as swiglu_meaning
from plugins.vectors import poisoned
from tests.cuda_routes import run_route

LAYERS, HIDDEN, WIDTH, VOCABULARY = 2, 128, 256, 301
HEADS, KV_HEADS, DIM, PAGES = 4, 2, 64, 6
EPSILON, RESIDUAL, EMBEDDING_SCALE, DIVISOR = 1e-5, 1.4 / LAYERS**0.5, 12.0, 4.0
SETTINGS = np.array([-1, 1, 1, 4], np.int32)  # always sparse: first block, own and one before, four in all
# name -> (outputs, inputs, bits, group)
LINEARS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, 4, 32),
    "o": (HIDDEN, HEADS * DIM, 4, 128),
    "gate_up": (2 * WIDTH, HIDDEN, 2, 0),
    "down": (HIDDEN, WIDTH, 2, 128),
    "head": (VOCABULARY, HIDDEN, 8, 64),
}


def make_weights(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(device buffers, the same as float32 matrices)."""
    device, dense = {}, {}
    names = [(f"{name}{layer}", name) for layer in range(LAYERS) for name in LINEARS if name != "head"]
    for name, kind in [*names, ("head", "head")]:
        n, k, bits, group = LINEARS[kind]
        codes = rng.integers(0, 3 if bits == 2 else 1 << bits, (n, k), dtype=np.uint8)
        spread = {2: 0.8, 4: 4.6, 8: 74}[bits] * k**0.5  # of the codes: outputs of about 1 from inputs of about 1
        scales = rng.uniform(0.7, 1.3, (n, k // group) if group else n) / spread
        scales = scales.astype(np.float16 if group else np.float32)
        device[f"{name}.weights"], device[f"{name}.scales"] = pack_codes(codes, bits), pack_scales(scales, k, bits)
        dense[name] = weights_of(codes, scales, bits).astype(np.float32)
    norms = ["final", *(f"{norm}{layer}" for layer in range(LAYERS) for norm in ("input", "post"))]
    for name in norms:
        device[name] = rng.uniform(0.8, 1.2, HIDDEN).astype(np.float16)
        dense[name] = device[name].astype(np.float32)
    device["embedding"] = (rng.normal(size=(VOCABULARY, HIDDEN)) / EMBEDDING_SCALE).astype(np.float16)
    dense["embedding"] = device["embedding"].astype(np.float32)
    tables = rope_tables(10000.0, [1.0] * (DIM // 2), [1.0] * (DIM // 2))
    device |= {"inverse_short": tables.inverse_short, "frequency": tables.frequency}
    return device, dense


def linear_on(x: str, y: str, name: str, tokens: int) -> Launch:
    n, k, bits, group = LINEARS[name.rstrip("0123456789")]
    launch = linear(LinearShape(tokens, n, k, bits, group, "half"))
    return launch.bind({"x": x, "y": y, "weights": f"{name}.weights", "scales": f"{name}.scales"})


def attention(shape: AttentionShape, layer: int, splits: int) -> list[Launch]:
    scale = DIM**-0.5
    attend = (
        [attend_split(shape, scale, splits), combine(shape, scale, splits)] if splits else [attend_tiles(shape, scale)]
    )
    launches = [append(shape), compress(shape), score_coarse(shape, scale), score_fine(shape, scale), select(shape)]
    pools = {name: f"{name}{layer}" for name in ("kv_pool", "c1_pool", "c2_pool")}
    return [launch.bind(pools) for launch in [*launches, *attend]]


def step_launches(tokens: int, splits: int) -> list[Launch]:
    """From ids and positions on the device to the sampled token on the device."""
    shape = AttentionShape(tokens, 1, PAGES, HEADS, KV_HEADS, DIM, "half", "half", limit=int(SETTINGS[3]))
    launches = [
        rope_table(tokens, DIM // 2, 1),
        scaled_rows(tokens, HIDDEN, "half", EMBEDDING_SCALE, VOCABULARY).bind(
            {"table": "embedding", "index": "ids", "y": "hidden"}
        ),
        rms_norm(tokens, HIDDEN, "half", EPSILON).bind({"x": "hidden", "weight": "input0", "y": "normed"}),
    ]
    for layer in range(LAYERS):
        after = f"input{layer + 1}" if layer + 1 < LAYERS else "final"
        add = add_rms_norm(tokens, HIDDEN, "half", RESIDUAL, EPSILON).bind({"total": "hidden", "y": "normed"})
        launches += [
            linear_on("normed", "qkv", f"qkv{layer}", tokens),
            *attention(shape, layer, splits),
            linear_on("output", "branch", f"o{layer}", tokens),
            add.bind({"weight": f"post{layer}"}),
            linear_on("normed", "gate_up", f"gate_up{layer}", tokens),
            swiglu(tokens, WIDTH, "half").bind({"y": "gated"}),
            linear_on("gated", "branch", f"down{layer}", tokens),
            add.bind({"weight": after}),
        ]
    logits, argmax = head(LinearShape(1, VOCABULARY, HIDDEN, 8, 64, "half"))
    head_buffers = {"x": "last", "weights": "head.weights", "scales": "head.scales", "token": "best_token"}
    launches += [
        scaled_rows(1, HIDDEN, "half", 1 / DIVISOR, tokens).bind({"table": "normed", "index": "row", "y": "last"}),
        logits.bind(head_buffers),
        argmax.bind(head_buffers),
        sample(1, VOCABULARY),
    ]
    return launches


def step_buffers(ids: np.ndarray, start: int, splits: int) -> dict[str, np.ndarray]:
    """What a step reads, and poisoned room for what it writes."""
    tokens, half = len(ids), np.dtype(np.float16)
    shape = AttentionShape(tokens, 1, PAGES, HEADS, KV_HEADS, DIM, "half", "half", limit=int(SETTINGS[3]))
    room = {
        **scratch(shape, max(splits, 1)),
        **sparse_scratch(shape),
        "cos": ((tokens, DIM // 2), np.dtype(np.float32)),
        "sin": ((tokens, DIM // 2), np.dtype(np.float32)),
        **dict.fromkeys(("hidden", "normed", "branch"), ((tokens, HIDDEN), half)),
        "qkv": ((tokens, LINEARS["qkv"][0]), half),
        "output": ((tokens, HEADS * DIM), half),
        "gate_up": ((tokens, 2 * WIDTH), half),
        "gated": ((tokens, WIDTH), half),
        "last": ((1, HIDDEN), half),
        "logits": ((1, VOCABULARY), np.dtype(np.float32)),
        "best": ((1, best_parts(VOCABULARY), 2), np.dtype(np.int32)),
        "best_token": ((1,), np.dtype(np.int32)),
        "token": ((1,), np.dtype(np.int32)),
    }
    return {
        **{name: poisoned(*form) for name, form in room.items()},
        "ids": ids.astype(np.int32),
        "positions": np.arange(start, start + tokens, dtype=np.int32),
        "slots": np.arange(start, start + tokens, dtype=np.int32),
        "query_start": np.array([0, tokens], np.int32),
        "tree_start": np.array([NO_TREE], np.int32),
        "tree_mask": np.zeros((tokens, 2), np.int32),
        "page_table": np.random.default_rng(3).permutation(PAGES).astype(np.int32)[None],
        "switch_length": np.array([start + tokens], np.int32),
        "sparse_settings": SETTINGS,
        "row": np.array([tokens - 1], np.int32),
        "temperature": np.zeros(1, np.float32),
        "top_k": np.zeros(1, np.int32),
        "top_p": np.ones(1, np.float32),
        "min_p": np.zeros(1, np.float32),
        "seed": np.zeros(1, np.uint64),
        "step": np.array([start + tokens], np.int32),
    }


def device_pools() -> dict[str, np.ndarray]:
    """Pools in which nothing was ever written."""
    half, pools = np.dtype(np.float16), {}
    for layer in range(LAYERS):
        pools[f"kv_pool{layer}"] = poisoned((PAGES, 2, KV_HEADS, PAGE_TOKENS * DIM), half)
        pools[f"c1_pool{layer}"] = poisoned((PAGES, KV_HEADS, 4, DIM), half)
        pools[f"c2_pool{layer}"] = poisoned((PAGES, KV_HEADS, 1, DIM), half)
    return pools


class Oracle:
    """The model in float32."""

    def __init__(self, dense: dict[str, np.ndarray]) -> None:
        self.dense = dense
        shapes = [(PAGES, 2, KV_HEADS, PAGE_TOKENS, DIM), (PAGES, KV_HEADS, 4, DIM), (PAGES, KV_HEADS, 1, DIM)]
        self.pools = [[np.zeros(shape, np.float32) for shape in shapes] for _ in range(LAYERS)]

    def logits(self, step: dict[str, np.ndarray]) -> np.ndarray:
        """Of the last token, [vocabulary]."""
        dense, epsilon = self.dense, np.float32(EPSILON)
        tables = rope_tables(10000.0, [1.0] * (DIM // 2), [1.0] * (DIM // 2))
        cos, sin = rope_meaning(step["positions"], step["query_start"], None, tables, 0, 1.0)
        hidden = dense["embedding"][step["ids"]] * np.float32(EMBEDDING_SCALE)
        names = ("positions", "slots", "query_start", "page_table", "tree_start", "tree_mask")
        names += ("switch_length", "sparse_settings")
        for layer in range(LAYERS):
            normed = rms_norm_meaning(hidden, dense[f"input{layer}"], epsilon)
            attended = infllmv2_attention(
                normed @ dense[f"qkv{layer}"].T,
                cos,
                sin,
                *self.pools[layer],
                *(step[name] for name in names),
                num_heads=HEADS,
                num_kv_heads=KV_HEADS,
                scale=DIM**-0.5,
                use_nope=False,
            )
            hidden = hidden + np.float32(RESIDUAL) * (attended @ dense[f"o{layer}"].T)
            normed = rms_norm_meaning(hidden, dense[f"post{layer}"], epsilon)
            gated = swiglu_meaning(normed @ dense[f"gate_up{layer}"].T)
            hidden = hidden + np.float32(RESIDUAL) * (gated @ dense[f"down{layer}"].T)
        return rms_norm_meaning(hidden[-1:], dense["final"], epsilon)[0] / np.float32(DIVISOR) @ dense["head"].T


@pytest.mark.parametrize(("route", "seed"), [("fast", 0), ("fast", 3), ("race", 1), ("ptx", 0)])
def test_prompt_and_decode(route: str, seed: int) -> None:
    rng = np.random.default_rng(0)
    device, dense = make_weights(rng)
    pools, oracle = device_pools(), Oracle(dense)
    ids, start = rng.integers(0, VOCABULARY, 330), 0
    for splits in (0, 2, 1):  # a prompt over six pages, then two decode steps on its own tokens
        step = step_buffers(ids, start, splits)
        buffers = {**device, **pools, **step}
        run_route(route, step_launches(len(ids), splits), buffers, seed)
        expected = oracle.logits(step)
        assert np.abs(buffers["logits"][0] - expected).max() < 0.02 * np.abs(expected).max()
        token = int(buffers["token"][0])
        assert token == int(buffers["best_token"][0]) == int(buffers["logits"].argmax())
        assert expected[token] > expected.max() - 0.02 * np.abs(expected).max()
        start, ids = start + len(ids), np.array([token])
