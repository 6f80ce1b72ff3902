"""`edge.InfLLMv2Attention`: meaning, ONNX function and every compiled kernel against a float64 model of the spec.

`expected_rows` follows spec: infllmv2.md 8 row by row over contiguous keys and shares no code with the meaning. Where
a block's score is within float32 noise of the last selected one, either choice of blocks is right (spec 9, item 18).
Edge cases of spec 9 are in test_infllmv2_edges.py, whose docstring says which test covers which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice

import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16
import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from plugins import PAGE_TOKENS
from plugins.infllmv2.meaning import infllmv2_attention
from tests.operators import HOW, KERNELS, Feeds, bind_pool, from_pages, one_node, session, to_pages
from tests.test_paged_attention import RANKS, STEP, Ragged, make_feeds, random_trees, rotated64

POOLS = ("kv_pool", "c1_pool", "c2_pool")
WINDOWS = {"c1_pool": (32, 16), "c2_pool": (128, 64)}
INDICES = (*STEP, "switch_length", "sparse_settings")
INPUTS = ("qkv", "cos", "sin", *POOLS, *INDICES)
Result = tuple[np.ndarray, ...]  # output, then the three pools


@dataclass(frozen=True)
class Sparse(Ragged):
    """A ragged step with sparse settings; `switch` defaults to the lengths after the step."""

    dense_len: int = -1
    init: int = 1
    local: int = 2
    selected: int = 5
    use_nope: bool = False
    switch: tuple[int, ...] | None = None


def model_bytes(case: Sparse, dtype: str = "float32") -> bytes:
    ranks = {"qkv": 2, "cos": 2, "sin": 2, "kv_pool": 5, "c1_pool": 4, "c2_pool": 4, **RANKS}
    types = {"qkv": dtype, "cos": "float32", "sin": "float32"} | dict.fromkeys(POOLS, case.pool)
    return one_node(
        "InfLLMv2Attention",
        tuple((name, types.get(name, "int32"), ranks.get(name, 1)) for name in INPUTS),
        (("output", dtype), *((f"{name}_out", case.pool) for name in POOLS)),
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.dim,
        scale=case.dim**-0.5,
        use_nope=int(case.use_nope),
        max_blocks=case.selected,
    )


def slots(table: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return table[tokens // PAGE_TOKENS], tokens % PAGE_TOKENS


def fill_windows(feeds: Feeds, name: str, table: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Average, in float64, the windows that end with the tokens `ends`; marks what it wrote."""
    window, stride = WINDOWS[name]
    ends = ends[(ends % stride == stride - 1) & (ends >= window - 1)]
    page, slot = slots(table, ends[:, None] - np.arange(window))
    keys = feeds["kv_pool"][page, 2 if feeds["kv_pool"].shape[1] == 3 else 0, :, slot].astype(np.float64)
    touched = np.zeros(feeds[name].shape, bool)
    where = table[ends // PAGE_TOKENS], slice(None), ends % PAGE_TOKENS // stride
    feeds[name][where], touched[where] = keys.mean(axis=1), True
    return touched


def sparse_feeds(case: Sparse) -> Feeds:
    """One step's inputs. Pages are in random order; every slot that holds no past token or window is NaN."""
    feeds = make_feeds(case)
    pool, rng = feeds["kv_pool"], np.random.default_rng(case.seed + 1)
    if case.use_nope:
        plain = np.where(np.isnan(pool[:, :1]), np.nan, rng.standard_normal(pool[:, :1].shape)).astype(case.pool)
        feeds["kv_pool"] = np.concatenate([pool, plain], axis=1)
    for name, (_, stride) in WINDOWS.items():
        shape = len(pool), case.kv_heads, PAGE_TOKENS // stride, case.dim
        feeds[name] = np.full(shape, np.nan, case.pool)
        for table, past, start in zip(feeds["page_table"], case.past, feeds["tree_start"], strict=True):
            fill_windows(feeds, name, table, np.arange(min(past, start)))
    lengths = case.switch or np.add(case.past, case.new)
    feeds["switch_length"] = np.asarray(lengths, np.int32)
    feeds["sparse_settings"] = np.array([case.dense_len, case.init, case.local, case.selected], np.int32)
    return {name: feeds[name] for name in INPUTS}


# The float64 model


def block_choices(scores: list[float], selected: int, margin: float) -> Iterator[tuple[int, ...]]:
    """The exact choice first: score descending, block ascending. Then every other that noise could make of it."""
    order = sorted(range(len(scores)), key=lambda b: (-scores[b], b))
    chosen = order[:selected]
    yield tuple(sorted(chosen))
    cut = scores[chosen[-1]]
    near = [b for b in order if np.isfinite(scores[b]) and abs(scores[b] - cut) <= margin * abs(cut) + 1e-36]
    if len({scores[b] for b in near}) > 1:
        certain = [b for b in chosen if b not in near]
        for some in islice(combinations(near, selected - len(certain)), 500):
            yield tuple(sorted([*certain, *some]))


def scores_of_blocks(case: Sparse, q: np.ndarray, c1: np.ndarray, c2: np.ndarray, i: int, n: int) -> list[float]:
    """Blocks 0..i // 64 of one KV head, by the windows among n tokens; q [G, d], c1 [n1, d], c2 [n2, d]."""
    own, v1, v2 = i // 64, max(0, (n - 32) // 16 + 1), max(0, (n - 128) // 64 + 1)
    s = np.zeros(max(len(c1), v1))
    if v2:
        z2 = q @ c2[:v2].T * case.dim**-0.5
        m = z2.max(axis=1, keepdims=True)
        total = np.exp(z2 - m).sum(axis=1, keepdims=True)
        s[:v1] = (np.exp(np.minimum(q @ c1[:v1].T * case.dim**-0.5 - m, 80)) / total).sum(axis=0)
    forced = [b < case.init or b >= own - case.local for b in range(own + 1)]
    windows = [s[max(0, 4 * b - 1) : 4 * b + 4] for b in range(own + 1)]
    return [np.inf if f else max(w, default=-np.inf) for f, w in zip(forced, windows, strict=True)]


def attend(case: Sparse, q: np.ndarray, k: np.ndarray, v: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    z = q @ k[tokens].T * case.dim**-0.5
    weights = np.exp(z - z.max(axis=1, keepdims=True))
    return weights @ v[tokens] / weights.sum(axis=1, keepdims=True)


def expected_rows(case: Sparse, feeds: Feeds, pools: Feeds, b: int) -> Iterator[tuple[int, int, Iterator[np.ndarray]]]:
    """(row, KV head, acceptable outputs [G, d]) of sequence b, from the keys and averages the step left in `pools`."""
    q, _, _ = rotated64(case, feeds)
    plain = feeds["qkv"].reshape(len(q), -1, case.dim)[:, : case.heads].astype(np.float64)
    scored = plain if case.use_nope else q
    table, length = feeds["page_table"][b], case.past[b] + case.new[b]
    page, slot = slots(table, np.arange(length))
    k, v = pools["kv_pool"][page, :2, :, slot].astype(np.float64).transpose(1, 2, 0, 3)  # [Hkv, n, d]
    averages = []
    for name, (window, stride) in WINDOWS.items():
        page, slot = slots(table, np.arange(window - 1, length, stride))
        averages.append(pools[name][page, :, slot // stride].astype(np.float64).swapaxes(0, 1))
    c1, c2 = averages
    margin = 0.05 if case.pool == "bfloat16" else 1e-4 * max(1, case.magnitude)
    sparse = case.dense_len < 0 or feeds["switch_length"][b] >= case.dense_len
    start = case.tree_start(b)
    for row, token in enumerate(range(case.past[b], length), start=feeds["query_start"][b]):
        i, seen = case.position(b, token), case.seen(b, token)
        in_tree = range(start // 64, token // 64 + 1) if token >= start else ()
        for g in range(case.kv_heads):
            heads = slice(g * case.group, (g + 1) * case.group)
            if sparse:
                scores = scores_of_blocks(case, scored[row, heads], c1[g], c2[g], i, min(i + 1, start))
                chosen = block_choices(scores, case.selected, margin)
                visible = (seen[np.isin(seen // 64, [*blocks, *in_tree])] for blocks in chosen)
            else:
                visible = iter([seen])
            yield row, g, (attend(case, q[row, heads], k[g], v[g], tokens) for tokens in visible)


def check_pools(how: str, case: Sparse, feeds: Feeds, pools: Feeds) -> None:
    """New keys, values and averages are there, rounded once; everything else has the bits it had."""
    _, k, v = rotated64(case, feeds)
    k_plain = feeds["qkv"].reshape(len(k), -1, case.dim)[:, case.heads : -case.kv_heads]
    planes = np.stack([k, v, k_plain], axis=1)[:, : 2 + case.use_nope].astype(case.pool)
    touched = {name: np.zeros(feeds[name].shape, bool) for name in POOLS}
    expected = {"kv_pool": feeds["kv_pool"].copy()}
    for b, (first, last) in enumerate(zip(feeds["query_start"], feeds["query_start"][1:], strict=False)):
        page, slot = slots(feeds["page_table"][b], feeds["slots"][first:last])
        expected["kv_pool"][page, :, :, slot] = planes[first:last]
        touched["kv_pool"][page, :, :, slot] = True
    expected |= {name: feeds[name].copy() for name in WINDOWS}
    averaged = expected | {"kv_pool": pools["kv_pool"]}
    for b, (first, last) in enumerate(zip(feeds["query_start"], feeds["query_start"][1:], strict=False)):
        for name in WINDOWS:
            plain = feeds["slots"][first:last][feeds["slots"][first:last] < feeds["tree_start"][b]]
            touched[name] |= fill_windows(averaged, name, feeds["page_table"][b], plain)
    for name in POOLS:
        untouched = ~touched[name]
        assert pools[name][untouched].tobytes() == feeds[name][untouched].tobytes(), f"{how} wrote outside its {name}"
        step = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}[case.pool]
        kept, right = pools[name].astype(np.float32), expected[name].astype(np.float32)
        np.testing.assert_allclose(kept, right, rtol=step, atol=step, err_msg=f"{how}: {name}")
    exact = touched["kv_pool"]
    exact[:, 0] = False
    assert np.array_equal(pools["kv_pool"][exact], expected["kv_pool"][exact]), f"{how}: rounded to nearest, no more"


def check_step(how: str, case: Sparse, feeds: Feeds, result: Result, tolerance: float = 0) -> None:
    tolerance = tolerance or 5e-6 * max(1, case.magnitude)  # scores of magnitude 1 are exact to 1e-6 in float32
    pools = dict(zip(POOLS, result[1:], strict=True))
    check_pools(how, case, feeds, pools)
    output = result[0].astype(np.float64).reshape(-1, case.kv_heads, case.group, case.dim)
    assert np.isfinite(output).all(), how
    for b in range(len(case.new)):
        for row, g, acceptable in expected_rows(case, feeds, pools, b):
            error = np.inf
            for expected in acceptable:
                error = min(error, np.abs(output[row, g] - expected).max())
                if error <= tolerance:
                    break
            assert error <= tolerance, f"{how}: row {row} of sequence {b}, KV head {g} is {error:.1e} off"


# Implementations


def run_in_place(how: str, case: Sparse, feeds: Feeds) -> Result:
    """Every pool is one buffer bound as input and output, as the executor does."""
    binding = session(how, model_bytes(case)).io_binding()
    binding.bind_output("output", "cpu")
    pools = {name: feeds[name].copy() for name in POOLS} | {"kv_pool": to_pages(how, feeds["kv_pool"])}
    for name, array in feeds.items():
        if name in POOLS:
            bind_pool(binding, name, pools[name])
        else:
            binding.bind_cpu_input(name, array)
    session(how, model_bytes(case)).run_with_iobinding(binding)
    output = binding.get_outputs()[0].numpy()
    return output, from_pages(how, pools["kv_pool"]), pools["c1_pool"], pools["c2_pool"]


def run_copied(how: str, case: Sparse, feeds: Feeds) -> Result:
    paged = feeds | {"kv_pool": to_pages(how, feeds["kv_pool"])}
    output, kv_pool, *averages = session(how, model_bytes(case)).run(None, paged)
    return output, from_pages(how, kv_pool), *averages


def run_meaning(case: Sparse, feeds: Feeds) -> Result:
    inputs = {name: array.copy() for name, array in feeds.items()}
    sizes = {"num_heads": case.heads, "num_kv_heads": case.kv_heads, "scale": case.dim**-0.5}
    output = infllmv2_attention(**inputs, **sizes, use_nope=case.use_nope)
    return output, *(inputs[name] for name in POOLS)


def run(how: str, case: Sparse, feeds: Feeds) -> Result:
    """`how`: "meaning" or one of HOW."""
    if how == "meaning":
        return run_meaning(case, feeds)
    return (run_copied if how == "function" else run_in_place)(how, case, feeds)


EVERY = ["meaning", *HOW]


@st.composite
def sparse_steps(draw: st.DrawFn, most_new: int, max_sequences: int = 3) -> Sparse:
    """Contexts that begin and end around strides, pages and windows, in every mix of prefill, decode and idle."""
    edges = [0, 1, 15, 16, 31, 32, 63, 64, 65, 126, 127, 128, 191, 192, 255, 256, 640]
    sequences = draw(st.integers(1, max_sequences))
    decode = draw(st.booleans())
    longest = 1 if decode else most_new
    lengths = st.one_of(st.sampled_from([n for n in edges[1:] if n <= longest]), st.integers(1, longest))
    past = tuple(draw(st.one_of(st.sampled_from(edges), st.integers(0, 900))) for _ in range(sequences))
    new = (draw(lengths), *(draw(st.one_of(lengths, st.just(0))) for _ in range(sequences - 1)))
    return Sparse(
        past=past,
        new=new,
        trees=draw(random_trees(past, new)),
        group=draw(st.sampled_from([1, 3, 4, 8, 16])),
        kv_heads=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([16, 32, 64])),
        pool=draw(st.sampled_from(["float32", "float16"])),
        seed=draw(st.integers(0, 9999)),
        magnitude=draw(st.sampled_from([1.0, 5.0, 30.0])),
        dense_len=draw(st.sampled_from([-1, -1, 0, 200, 10000])),
        init=draw(st.sampled_from([0, 1, 1, 2, 20])),
        local=draw(st.sampled_from([0, 1, 2, 3, 40])),
        selected=draw(st.integers(2, 7)),
        use_nope=draw(st.booleans()),
    )


# As many tokens as sequences, and yet no step of decoding.
IDLE_BESIDE_TWO_TOKENS = Sparse(
    past=(127, 0), new=(2, 0), group=1, kv_heads=1, dim=16, pool="float32", init=0, local=0, selected=2
)


@pytest.mark.parametrize("how", KERNELS)
@settings(max_examples=40, deadline=None)
@given(case=sparse_steps(most_new=200))
@example(IDLE_BESIDE_TWO_TOKENS)
def test_kernels(how: str, case: Sparse) -> None:
    feeds = sparse_feeds(case)
    result = run_in_place(how, case, feeds)
    check_step(how, case, feeds, result)
    for copied, bound in zip(run_copied(how, case, feeds), result, strict=True):
        assert copied.tobytes() == bound.tobytes()


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("new", [(2, 0, 2), (2, 4, 130)])
@pytest.mark.parametrize("dim", [16, 64])
def test_bfloat16_pools(how: str, new: tuple[int, ...], dim: int) -> None:
    """Even lengths: kernels that multiply pairs clear the second value of one that is not there yet."""
    case = Sparse((700, 70, 410), new, pool="bfloat16", dim=dim, group=8, selected=6, use_nope=dim == 64)
    feeds = sparse_feeds(case)
    check_step(how, case, feeds, run_in_place(how, case, feeds), 3e-2)


@settings(max_examples=30, deadline=None)
@given(case=sparse_steps(most_new=130))
def test_function_and_meaning(case: Sparse) -> None:
    feeds = sparse_feeds(case)
    check_step("meaning", case, feeds, run("meaning", case, feeds))
    check_step("function", case, feeds, run("function", case, feeds))


@pytest.mark.parametrize("new", [(1, 0, 1), (3, 0, 130)])
@pytest.mark.parametrize("use_nope", [False, True])
def test_half_activations(new: tuple[int, ...], use_nope: bool) -> None:
    case = Sparse((500, 70, 400), new, pool="float16", selected=4, local=1, use_nope=use_nope, group=4)
    feeds = sparse_feeds(case)
    # The scored queries are rounded to half before scores are taken: the model must start from the same ones.
    feeds |= {"qkv": feeds["qkv"].astype(np.float16), "cos": np.ones_like(feeds["cos"]), "sin": 0 * feeds["sin"]}
    check_step("meaning16", case, feeds, run("meaning", case, feeds), 6e-3)
    half = session("function", model_bytes(case, "float16")).run(None, feeds)
    check_step("function16", case, feeds, tuple(half), 6e-3)


@pytest.mark.parametrize(("new", "trees"), [((1, 1), ()), ((6, 3), ()), ((6, 3), ((-1, -1, 0), ()))])
def test_onnx_reference_evaluator(new: tuple[int, int], trees: tuple[tuple[int, ...], ...]) -> None:
    case = Sparse((410, 0), new, selected=4, local=1, trees=trees)
    feeds = sparse_feeds(case)
    evaluator = ReferenceEvaluator(onnx.load_from_string(model_bytes(case)))
    check_step("evaluator", case, feeds, tuple(evaluator.run(None, feeds)), 1e-5)
