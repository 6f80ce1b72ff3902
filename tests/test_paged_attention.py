"""`edge.PagedAttention`: meaning, ONNX function and every compiled kernel against dense attention in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from plugins import PAGE_TOKENS
from plugins.paged_attention import NO_TREE
from plugins.paged_attention.meaning import paged_attention
from tests.operators import HOW, KERNELS, Feeds, bind_pool, from_pages, one_node, session, to_pages

STEP = ("positions", "slots", "query_start", "page_table", "tree_start", "tree_mask")
RANKS = {"page_table": 2, "tree_mask": 2}


@dataclass(frozen=True)
class Ragged:
    """Sequence b has past[b] tokens in the cache and new[b] tokens in this step.

    Its last len(trees[b]) tokens, of the cache too, are a tree: trees[b][i] is the parent of its token i, an earlier
    one or -1, the token before the tree.
    """

    past: tuple[int, ...]
    new: tuple[int, ...]
    group: int = 2
    kv_heads: int = 2
    dim: int = 16
    pool: str = "float32"
    seed: int = 0
    magnitude: float = 1.0
    trees: tuple[tuple[int, ...], ...] = ()
    window: int = 0

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    def tree(self, b: int) -> tuple[int, ...]:
        return self.trees[b] if self.trees else ()

    def tree_start(self, b: int) -> int:
        return self.past[b] + self.new[b] - len(self.tree(b)) if self.tree(b) else NO_TREE

    def slots(self, b: int) -> np.ndarray:
        """Of the tokens of this step."""
        return np.arange(self.past[b], self.past[b] + self.new[b])

    def path(self, b: int, slot: int) -> list[int]:
        """The tree's slots that a token sees, itself first."""
        start, parents, found = self.tree_start(b), self.tree(b), []
        node = slot - start
        while node >= 0:
            found.append(start + node)
            node = parents[node]
        return found

    def position(self, b: int, slot: int) -> int:
        path = self.path(b, slot)
        return self.tree_start(b) - 1 + len(path) if path else slot

    def seen(self, b: int, slot: int) -> np.ndarray:
        """Which slots, of those up to it, a token sees."""
        before = np.arange(min(slot + 1, self.tree_start(b)))
        return np.array([*before, *sorted(self.path(b, slot))])


def step_feeds(case: Ragged) -> Feeds:
    """Where the step's tokens are kept, and what they see of trees."""
    rows = [(b, int(slot)) for b in range(len(case.new)) for slot in case.slots(b)]
    masks = [sum(1 << slot - case.tree_start(b) for slot in case.path(b, row)) for b, row in rows]
    return {
        "positions": np.array([case.position(b, slot) for b, slot in rows], np.int32),
        "slots": np.array([slot for _, slot in rows], np.int32),
        "query_start": np.cumsum([0, *case.new]).astype("i4"),
        "tree_start": np.array([case.tree_start(b) for b in range(len(case.new))], np.int32),
        "tree_mask": np.array(masks, np.uint64).view(np.int32).reshape(-1, 2),
    }


def attention_model(case: Ragged, dtype: str = "float32") -> bytes:
    inputs = [("qkv", dtype, 2), ("cos", "float32", 2), ("sin", "float32", 2), ("kv_pool", case.pool, 5)]
    inputs += [(name, "int32", RANKS.get(name, 1)) for name in STEP]
    return one_node(
        "PagedAttention",
        tuple(inputs),
        (("output", dtype), ("kv_pool_out", case.pool)),
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.dim,
        scale=case.dim**-0.5,
        **({"window": case.window} if case.window else {}),
    )


def make_feeds(case: Ragged) -> Feeds:
    """One step's inputs. Pages are in random order; every slot that holds no past token is NaN."""
    rng = np.random.default_rng(case.seed)
    tokens, pages = sum(case.new), [-(-(p + n) // PAGE_TOKENS) for p, n in zip(case.past, case.new, strict=True)]
    order = rng.permutation(sum(pages) + 2)
    table = rng.integers(0, len(order), (len(pages), max(pages) + 1))  # short rows are padded with any page
    pool = np.full((len(order), 2, case.kv_heads, PAGE_TOKENS, case.dim), np.nan, case.pool)
    for b, (count, past) in enumerate(zip(pages, case.past, strict=True)):
        table[b, :count], order = order[:count], order[count:]
        for t in range(past):
            pool[table[b, t // PAGE_TOKENS], :, :, t % PAGE_TOKENS] = rng.standard_normal((2, case.kv_heads, case.dim))
    qkv = rng.standard_normal((tokens, case.heads + 2 * case.kv_heads, case.dim))
    qkv[:, : case.heads] *= case.magnitude
    angle = rng.uniform(0, 2 * np.pi, (tokens, case.dim // 2))
    step = {**step_feeds(case), "page_table": table.astype("i4")}
    return {
        "qkv": qkv.reshape(tokens, -1).astype(np.float32),
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
        "kv_pool": pool,
        **{name: step[name] for name in STEP},
    }


def rotated64(case: Ragged, feeds: Feeds) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v [T, heads, d] in float64; rotation as a product of complex numbers."""
    heads = feeds["qkv"].reshape(len(feeds["qkv"]), -1, case.dim).astype(np.float64)
    turn = (feeds["cos"].astype(np.float64) + 1j * feeds["sin"])[:, None]
    turned = (heads[..., : case.dim // 2] + 1j * heads[..., case.dim // 2 :]) * turn
    rotated = np.concatenate([turned.real, turned.imag], axis=-1)
    return rotated[:, : case.heads], rotated[:, case.heads : -case.kv_heads], heads[:, -case.kv_heads :]


def check_step(how: str, case: Ragged, feeds: Feeds, output: np.ndarray, pool: np.ndarray, tolerance: float) -> None:
    """The pool holds the new keys and values and is untouched elsewhere; the output is attention over that pool."""
    q, k, v = rotated64(case, feeds)
    expected_pool, touched = feeds["kv_pool"].copy(), np.zeros(feeds["kv_pool"].shape, bool)
    untouched = ~touched
    expected = np.empty_like(q)
    for b, (first, last) in enumerate(zip(feeds["query_start"], feeds["query_start"][1:], strict=False)):
        if first == last:
            continue
        table, slots = feeds["page_table"][b], case.slots(b)
        for row, slot in enumerate(slots, start=first):
            where = table[slot // PAGE_TOKENS], slice(None), slice(None), slot % PAGE_TOKENS
            expected_pool[where], touched[where], untouched[where] = np.stack([k[row], v[row]]), True, False
        every = np.arange(slots[-1] + 1)
        stored = pool[table[every // PAGE_TOKENS], :, :, every % PAGE_TOKENS].astype(np.float64)  # [n, 2, Hkv, d]
        hidden = np.ones((len(slots), len(every)), bool)
        for row, slot in enumerate(slots):
            hidden[row, case.seen(b, slot)] = False
            if case.window:
                hidden[row, : max(0, case.position(b, slot) // PAGE_TOKENS - case.window + 1) * PAGE_TOKENS] = True
        for h in range(case.heads):
            keys, values = stored[:, 0, h // case.group], stored[:, 1, h // case.group]
            scores = np.where(hidden, -np.inf, q[first:last, h] @ keys.T * case.dim**-0.5)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            expected[first:last, h] = weights @ values / weights.sum(axis=1, keepdims=True)
        if pool.dtype == "bfloat16" and slots[-1] % 2 == 0:  # the value that shares a pair is cleared, or not
            shared = table[slots[-1] // PAGE_TOKENS], 1, slice(None), slots[-1] % PAGE_TOKENS + 1
            untouched[shared] = False
    assert pool[untouched].tobytes() == feeds["kv_pool"][untouched].tobytes(), f"{how} wrote outside its slots"
    touched[:, 0] = False
    assert np.array_equal(pool[touched], expected_pool[touched]), f"{how}: values are rounded to nearest, nothing else"
    step = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}[pool.dtype.name]
    keys, expected_keys = pool[:, 0].astype(np.float32), expected_pool[:, 0].astype(np.float32)
    np.testing.assert_allclose(keys, expected_keys, rtol=step, atol=step, err_msg=f"{how}: keys")
    np.testing.assert_allclose(output, expected.reshape(output.shape), rtol=0, atol=tolerance, err_msg=how)


def run_in_place(how: str, case: Ragged, feeds: Feeds) -> tuple[np.ndarray, np.ndarray]:
    """(output, pool) with one buffer bound as kv_pool and kv_pool_out, as the executor does."""
    binding = session(how, attention_model(case)).io_binding()
    pool = to_pages(how, feeds["kv_pool"]).copy()
    for name, array in feeds.items():
        if name != "kv_pool":
            binding.bind_cpu_input(name, array)
    bind_pool(binding, "kv_pool", pool)
    binding.bind_output("output", "cpu")
    session(how, attention_model(case)).run_with_iobinding(binding)
    return binding.get_outputs()[-1].numpy(), from_pages(how, pool)


def run_meaning(case: Ragged, feeds: Feeds) -> tuple[np.ndarray, np.ndarray]:
    pool = feeds["kv_pool"].copy()
    inputs = [pool if name == "kv_pool" else array for name, array in feeds.items()]
    sizes = {"num_heads": case.heads, "num_kv_heads": case.kv_heads, "scale": case.dim**-0.5}
    return paged_attention(*inputs, **sizes, window=case.window), pool


@st.composite
def random_trees(draw: st.DrawFn, past: tuple[int, ...], new: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Of about every other sequence; some begin in an earlier step. The token before a tree is no part of it."""
    trees = []
    for p, n in zip(past, new, strict=True):
        most = min(64, p + n - 1, n + draw(st.sampled_from([0, 0, 5])))
        size = draw(st.integers(1, most)) if n and most > 0 and draw(st.booleans()) else 0
        rng = np.random.default_rng(draw(st.integers(0, 999)))
        trees.append(tuple(int(rng.integers(max(-1, i - 6), i)) for i in range(size)))
    return tuple(trees) if draw(st.booleans()) else ()


@st.composite
def ragged(
    draw: st.DrawFn, most_new: int, max_sequences: int = 4, pools: Sequence[str] = ("float32", "float16")
) -> Ragged:
    """Steps whose contexts begin and end around page edges, in every mix of prefill and decode."""
    edges = [0, 1, 63, 64, 65, 127, 128, 129]
    sequences = draw(st.integers(1, max_sequences))
    lengths = st.one_of(st.sampled_from([n for n in edges[1:] if n <= most_new]), st.integers(1, most_new))
    past = tuple(draw(st.one_of(st.sampled_from(edges), st.integers(0, 200))) for _ in range(sequences))
    new = (draw(lengths), *(draw(st.one_of(lengths, st.just(0))) for _ in range(sequences - 1)))
    return Ragged(
        past=past,
        new=new,
        trees=draw(random_trees(past, new)),
        window=draw(st.sampled_from([0, 0, 1, 2])),
        group=draw(st.sampled_from([1, 3, 4, 8, 16])),
        kv_heads=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([16, 32, 64, 128])),
        pool=draw(st.sampled_from(pools)),
        seed=draw(st.integers(0, 9999)),
        magnitude=draw(st.sampled_from([1.0, 1.0, 300.0])),
    )


def tolerance(case: Ragged) -> float:
    """Scores of magnitude 1 and 300 are exact to 1e-6 and 3e-4 in float32; products of bfloat16 to 2^-8."""
    if case.pool == "bfloat16":
        return 3e-2 if case.magnitude == 1 else 10.0  # which key wins may differ
    return 5e-6 * max(1.0, case.magnitude)


@pytest.mark.parametrize("how", KERNELS)
@settings(max_examples=40, deadline=None)
@given(case=ragged(most_new=200, pools=["float32", "float16", "bfloat16"]))
def test_kernels(how: str, case: Ragged) -> None:
    feeds = make_feeds(case)
    output, pool = run_in_place(how, case, feeds)
    check_step(how, case, feeds, output, pool, tolerance(case))
    if case.pool == "bfloat16":
        return  # numpy has no such array to pass
    paged = feeds | {"kv_pool": to_pages(how, feeds["kv_pool"])}
    copied_output, copied_pool = session(how, attention_model(case)).run(None, paged)
    assert np.array_equal(copied_output, output)
    assert from_pages(how, copied_pool).tobytes() == pool.tobytes()


@settings(max_examples=25, deadline=None)
@given(case=ragged(most_new=70, max_sequences=3))
def test_function_and_meaning(case: Ragged) -> None:
    feeds = make_feeds(case)
    check_step("meaning", case, feeds, *run_meaning(case, feeds), tolerance(case))
    check_step("function", case, feeds, *session("function", attention_model(case)).run(None, feeds), tolerance(case))
    if case.magnitude == 1 and case.pool == "float16":
        half = feeds | {"qkv": feeds["qkv"].astype(np.float16)}
        check_step("meaning16", case, half, *run_meaning(case, half), 6e-3)
        check_step(
            "function16", case, half, *session("function", attention_model(case, "float16")).run(None, half), 6e-3
        )


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("magnitude", [1.0, 300.0])
def test_a_long_context_is_split_over_threads(how: str, magnitude: float) -> None:
    """Single tokens with more blocks than one task takes: parts whose largest scores are far apart are merged."""
    case = Ragged(past=(3000, 1024, 1023), new=(1, 1, 1), group=4, magnitude=magnitude)
    feeds = make_feeds(case)
    check_step(how, case, feeds, *run_in_place(how, case, feeds), tolerance(case))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("how", "dtype", "magnitude"),
    [*((how, "float32", 3000.0) for how in HOW), ("function", "float16", 30.0)],
)
def test_softmax_of_huge_equal_scores_is_the_mean(how: str, dtype: str, magnitude: float, sign: int) -> None:
    """Scores of +-1e8 (float32) or +-1e4 (float16, whose unscaled products overflow) must not reach any limit."""
    case = Ragged(past=(0,), new=(70,), group=2, kv_heads=1, dim=128, pool=dtype)
    feeds = make_feeds(case)
    heads = feeds["qkv"].reshape(70, 4, 128)
    heads[:, :2], heads[:, 2] = sign * magnitude, magnitude
    feeds |= {"cos": np.ones_like(feeds["cos"]), "sin": np.zeros_like(feeds["sin"]), "qkv": feeds["qkv"].astype(dtype)}
    output, _ = session(how, attention_model(case, dtype)).run(None, feeds)
    mean = np.cumsum(heads[:, 3], axis=0, dtype=np.float64) / np.arange(1, 71)[:, None]
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(output.reshape(70, 2, 128), mean[:, None].repeat(2, axis=1), atol=tolerance)


@pytest.mark.parametrize("how", KERNELS)
def test_exponential_is_accurate_from_1_to_the_smallest_float(how: str) -> None:
    """Two keys whose scores are exactly -x and 0: the ratio of their weights is exp(-x)."""
    x = np.arange(0, 120, 1 / 8)
    case = Ragged(past=(1,) * len(x), new=(1,) * len(x), group=1, kv_heads=1, dim=16)
    feeds = make_feeds(case)
    axis = np.eye(16, dtype=np.float32)
    feeds["kv_pool"][feeds["page_table"][:, 0], 0, 0, 0] = axis[0]
    feeds["kv_pool"][feeds["page_table"][:, 0], 1, 0, 0] = axis[1]
    feeds["kv_pool"] = to_pages(how, feeds["kv_pool"])
    q, k, v = -4 * x[:, None] * axis[0], np.zeros((len(x), 16)), np.tile(axis[2], (len(x), 1))
    feeds["qkv"] = np.concatenate([q, k, v], axis=1, dtype=np.float32)
    feeds |= {"cos": np.ones_like(feeds["cos"]), "sin": np.zeros_like(feeds["sin"])}
    output, _ = session(how, attention_model(case)).run(None, feeds)
    np.testing.assert_allclose(output[:, 1] / output[:, 2], np.exp(-x), rtol=5e-7, atol=2e-38)


def test_onnx_reference_evaluator() -> None:
    case = Ragged(past=(60, 0), new=(6, 3), trees=((-1, 0, -1, 2), ()), window=1)  # it knows no defaults of attributes
    feeds = make_feeds(case)
    evaluator = ReferenceEvaluator(onnx.load_from_string(attention_model(case)))
    check_step("evaluator", case, feeds, *evaluator.run(None, feeds), 1e-5)
