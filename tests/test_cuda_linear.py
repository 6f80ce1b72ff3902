"""The linear layers' CUDA kernels by every route against plugins/linear/meaning.py.

With small whole numbers for x and powers of two for scales every product and sum is exact in float32, so outputs are
compared bit for bit: each tile edge, code, scale and token is then in its place.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edge.errors import EdgeError
from plugins.launch import Launch
from plugins.linear.launch import LinearShape, best_parts, gemm, gemv, head, linear, product_launches, row_tile_choices
from plugins.linear.meaning import ZEROS, argmax
from plugins.linear.meaning import linear as meaning
from plugins.linear.pack import pack_codes, pack_scales
from plugins.vectors import ELEMENTS, poisoned
from tests.cuda_cases import Case, run_cases
from tests.cuda_routes import ROUTES, SEEDS, run_route

FORMATS = tuple(itertools.product((2, 4, 8), (0, 32, 64, 128)))

# (tokens, n, k in chunks, row tiles): less than a tile, ragged tiles and blocks, fewer and more chunks than warps,
# several columns of tokens.
GEMV_SHAPES = ((1, 16, 1, 1), (2, 130, 9, 2), (7, 48, 3, 4), (8, 128, 2, 8), (9, 130, 5, 4), (3, 300, 17, 16))
# (tokens, n, k in chunks, tokens of a block): as many stages as are prefetched, fewer and more.
GEMM_SHAPES = ((9, 16, 1, 16), (17, 130, 5, 16), (63, 48, 2, 32), (64, 128, 3, 64), (65, 136, 4, 32), (130, 130, 7, 64))


def chunk(bits: int, group: int) -> int:
    return 128 if group == 128 or bits == 2 else 64


def random_codes(rng: np.random.Generator, shape: LinearShape) -> np.ndarray:
    return rng.integers(0, 3 if shape.bits == 2 else 1 << shape.bits, (shape.n, shape.k)).astype(np.uint8)


def packed_case(launch: Launch, shape: LinearShape, x: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> Case:
    inputs = {
        "x": x.astype(ELEMENTS[shape.element]),
        "weights": pack_codes(codes, shape.bits),
        "scales": pack_scales(scales, shape.k, shape.bits),
    }
    output = {"y": ((shape.tokens, shape.n), ELEMENTS[shape.element])}
    return Case(f"{launch.kernel.body} {shape}", launch, inputs, output)


def exact_case(launch: Launch, shape: LinearShape, seed: int) -> tuple[Case, np.ndarray]:
    """x of |x| <= 8, scales of powers of two; and the exact y."""
    rng = np.random.default_rng(seed)
    x, codes = rng.integers(-8, 9, (shape.tokens, shape.k)), random_codes(rng, shape)
    grid = (shape.n, shape.k // shape.group) if shape.group else (shape.n,)
    exponents = rng.integers(-4, 2, grid) - (4 if shape.bits == 8 else 0)  # float16 holds the largest y
    scales = np.exp2(exponents).astype(np.float16 if shape.group else np.float32)
    case = packed_case(launch, shape, x, codes, scales)
    return case, meaning(case.inputs["x"], codes, scales, shape.bits).astype(ELEMENTS[shape.element])


def exact_cases(bits: int, group: int, element: str, every: int = 1, first: int = 0) -> list[tuple[Case, np.ndarray]]:
    """Of both lists of shapes every `every`-th, from `first` on."""
    cases = []
    for tokens, n, chunks, row_tiles in GEMV_SHAPES[first::every]:
        shape = LinearShape(tokens, n, chunks * chunk(bits, group), bits, group, element)
        if row_tiles in row_tile_choices(bits, group):
            cases.append(exact_case(gemv(shape, row_tiles), shape, n))
    for tokens, n, chunks, block in GEMM_SHAPES[first::every] if bits != 8 else ():
        shape = LinearShape(tokens, n, chunks * chunk(bits, group), bits, group, element)
        cases.append(exact_case(gemm(shape, block), shape, n))
    return cases


def check_exact(route: str, seed: int, cases: list[tuple[Case, np.ndarray]]) -> None:
    for (case, want), result in zip(cases, run_cases(route, [case for case, _ in cases], seed), strict=True):
        got = result.outputs["y"]
        assert got.tobytes() == want.tobytes(), (case.name, np.argwhere(got != want)[:5])


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ROUTES)
def test_whole_numbers_are_exact(route: str, element: str) -> None:
    # Half of the shapes for each of the likelier formats; everything is in the long sweep.
    likely = {"half": ((4, 128), (2, 0), (4, 32), (2, 128), (8, 0)), "bf16": ((2, 0), (4, 128), (2, 32), (8, 128))}
    cases = []
    for i, (bits, group) in enumerate(likely[element]):
        cases += exact_cases(bits, group, element, every=2, first=i % 2)
    for seed in SEEDS[route]:
        check_exact(route, seed, cases)


@pytest.mark.long
@pytest.mark.parametrize("bits,group", FORMATS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_whole_numbers_are_exact_in_every_format(element: str, bits: int, group: int) -> None:
    cases = exact_cases(bits, group, element)
    for n, tokens in itertools.product((16, 48, 128, 130, 4608), (1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 130)):
        for k in (64, 128, 192, 320, 1024):
            if k % chunk(bits, group) == 0:
                shape = LinearShape(tokens, n, k, bits, group, element)
                cases.append(exact_case(linear(shape), shape, n + tokens + k))
    for route in ROUTES:
        check_exact(route, 1, cases if route == "fast" else cases[: len(GEMV_SHAPES) + len(GEMM_SHAPES)])


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ["fast", "ptx"])
def test_every_code_in_every_position(route: str, element: str) -> None:
    """x is the identity, so y is W; over the tiles each place of a tile takes each code."""
    cases = []
    for bits in ZEROS:
        values, k = 3 if bits == 2 else 1 << bits, chunk(bits, 0)
        codes = np.add.outer(np.arange(16 * values) // 16 + np.arange(16 * values) % 16, np.arange(k)) % values
        shape = LinearShape(k, 16 * values, k, bits, 0, element)
        launches = [gemv(shape, 1)] + ([gemm(shape, 64)] if bits != 8 else [])
        for launch in launches:
            case = packed_case(launch, shape, np.eye(k), codes.astype(np.uint8), np.ones(shape.n, np.float32))
            cases.append((case, (codes.T - ZEROS[bits]).astype(ELEMENTS[element])))
    check_exact(route, 0, cases)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ["fast", "ptx"])
def test_real_numbers(route: str, element: str) -> None:
    """Against float64, beside half a unit in the last place of y.

    gemv's weights are exact and only float32 sums round. gemm rounds each weight (code times scale) to T: by 2^-12 or
    2^-11 of its size in half, which over many products stays below a thousandth of y's RMS. bf16 has three bits
    fewer: eight times that, and as much again because the scale is rounded too, in the worst case by 2^-9 of a y of
    four times the RMS. A ternary weight's scale a row comes after the sum, exactly like gemv's.
    """
    dtype, cases = ELEMENTS[element], []
    half_unit = 2.0**-11 if element == "half" else 2.0**-8
    for bits, group in ((4, 128), (4, 32), (2, 0), (2, 128), (8, 0)):
        for make, tokens in ((gemv, 5), (gemm, 33)):
            if make is gemm and bits == 8:
                continue
            shape = LinearShape(tokens, 80, 2048, bits, group, element)
            rng = np.random.default_rng(bits + group)
            x, codes = rng.standard_normal((tokens, shape.k)), random_codes(rng, shape)
            grid = (shape.n, shape.k // group) if group else (shape.n,)
            scales = np.exp(rng.standard_normal(grid) - 4).astype(np.float16 if group else np.float32)
            case = packed_case(make(shape, 2 if make is gemv else 32), shape, x, codes, scales)
            want = meaning(case.inputs["x"], codes, scales, bits)
            rounded = make is gemm and group
            tolerance = (1e-3 if element == "half" else 1.6e-2) if rounded else 1e-5
            cases.append((case, want, tolerance))
    for (case, want, tolerance), result in zip(cases, run_cases(route, [c for c, _, _ in cases]), strict=True):
        got, rms = result.outputs["y"].astype(np.float64), np.sqrt(np.mean(want * want, axis=-1, keepdims=True))
        assert result.outputs["y"].dtype == dtype
        excess = (np.abs(got - want) - half_unit * np.abs(want)) / rms
        assert excess.max() <= tolerance, (case.name, excess.max())


@pytest.mark.parametrize("route", ["fast", "ptx"])
def test_a_token_of_nan_stays_alone(route: str) -> None:
    for tokens in (8, 20):
        shape = LinearShape(tokens, 48, 256, 4, 128, "half")
        case, want = exact_case(linear(shape), shape, tokens)
        case.inputs["x"][3] = np.nan
        want[3] = np.nan
        (result,) = run_cases(route, [case])
        np.testing.assert_array_equal(result.outputs["y"], want)


@pytest.mark.parametrize("bits,group", [(4, 128), (4, 32), (2, 0), (2, 128), (8, 0)])
def test_decoding_reads_everything_once(bits: int, group: int) -> None:
    """Codes and scales exactly; with x, which every block reads again, within 5 %."""
    shape = LinearShape(1, 4096, 4096, bits, group, "half")
    case, want = exact_case(linear(shape), shape, 1)
    (result,) = run_cases("race", [case])
    assert result.outputs["y"].tobytes() == want.tobytes()
    assert result.read["weights"] == case.inputs["weights"].nbytes
    assert result.read["scales"] == case.inputs["scales"].nbytes
    assert sum(result.read.values()) <= 1.05 * sum(array.nbytes for array in case.inputs.values())
    assert result.written["y"] == want.nbytes


def head_buffers(shape: LinearShape, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The head's buffers, and exact logits with ties, infinities and NaN; the last token's are all NaN."""
    rng = np.random.default_rng(seed)
    x, codes = rng.integers(-1, 2, (shape.tokens, shape.k)).astype(ELEMENTS[shape.element]), random_codes(rng, shape)
    codes[shape.n // 2 :] = codes[: shape.n - shape.n // 2]  # every logit twice
    x[-1] = np.nan
    scales = np.ones(shape.n if not shape.group else (shape.n, shape.k // shape.group), np.float32)
    packed = pack_scales(scales, shape.k, shape.bits)
    if not shape.group:
        scales[::7], scales[5::31] = np.nan, -np.inf
        packed[: shape.n] = scales
    with np.errstate(invalid="ignore"):
        unscaled = meaning(x, codes, np.ones(shape.n), shape.bits)
        want = (unscaled * scales if not shape.group else unscaled).astype(np.float32)
    buffers = {
        "x": x,
        "weights": pack_codes(codes, shape.bits),
        "scales": packed,
        "logits": poisoned(want.shape, np.dtype(np.float32)),
        "best": poisoned((shape.tokens, best_parts(shape.n), 2), np.dtype(np.int32)),
        "token": poisoned((shape.tokens,), np.dtype(np.int32)),
    }
    return buffers, want


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ROUTES)
def test_head(route: str, element: str) -> None:
    for tokens, n, bits, group in ((1, 48, 8, 0), (3, 1000, 8, 0), (11, 330, 4, 128)):
        shape = LinearShape(tokens, n, 256, bits, group, element)
        for seed in SEEDS[route]:
            buffers, want = head_buffers(shape, seed)
            run_route(route, head(shape), buffers, seed)
            np.testing.assert_array_equal(buffers["logits"], want)
            np.testing.assert_array_equal(buffers["token"], argmax(want))


@pytest.mark.parametrize("route", ["fast", "ptx"])
@pytest.mark.parametrize("worse,better,first", [(1, 1, 0), (np.nan, -1, 123), (-np.inf, 2, 499), (np.nan, -np.inf, 0)])
def test_of_equal_logits_the_first_wins(route: str, worse: float, better: float, first: int) -> None:
    """All rows of weights are equal; `better` scales them from token `first` on."""
    shape = LinearShape(1, 500, 64, 8, 0, "half")
    buffers, _ = head_buffers(shape, 0)
    buffers["x"][:] = 1
    buffers["weights"] = pack_codes(np.full((shape.n, shape.k), 129, np.uint8), 8)
    buffers["scales"][: shape.n] = [worse] * first + [better] * (shape.n - first)
    run_route(route, head(shape), buffers)
    assert buffers["token"][0] == first


def test_the_launch_suits_the_shape() -> None:
    def of(tokens: int, n: int = 4096, bits: int = 4, group: int = 128, sms: int = 16) -> Launch:
        return linear(LinearShape(tokens, n, 4096, bits, group, "bf16"), sms)

    bodies = {tokens: of(tokens).kernel.body for tokens in (1, 8, 9, 17, 64, 1000)}
    assert all(bodies[tokens].startswith("gemv<bf16, 4, 128, ") for tokens in (1, 8))
    assert bodies[9] == "gemm<bf16, 4, 128, 16>"
    assert bodies[17] == "gemm<bf16, 4, 128, 32>"
    assert bodies[64] == bodies[1000] == "gemm<bf16, 4, 128, 64>"
    assert of(64, n=1024).kernel.body == "gemm<bf16, 4, 128, 32>"  # 8 blocks of 64 tokens would leave SMs idle
    assert of(12, n=1024).grid[1] == 2  # too little for gemm: gemv, twice
    assert of(100, bits=8, group=0).grid[1] == 13
    blocks = [of(1, sms=sms).grid[0] for sms in (8, 16, 128)]
    assert blocks == sorted(blocks)
    assert blocks[-1] >= 128
    for n in (16, 130, 4608, 73448):
        for tokens in (1, 5, 8):
            grid = of(tokens, n=n).grid
            rows = int(of(tokens, n=n).kernel.body.split(", ")[3]) * 16
            assert (grid[0] - 1) * rows < n <= grid[0] * rows


def test_shapes_without_kernels_are_refused() -> None:
    for k, bits, group in ((100, 4, 32), (192, 2, 0), (192, 4, 128), (0, 4, 128), (128, 4, 16), (128, 5, 32)):
        with pytest.raises(EdgeError, match=r"inputs are not whole chunks|group size 16|weights of 5 bits"):
            linear(LinearShape(1, 16, k, bits, group, "half"))


def test_product_launches_are_distinct_and_cover_decoding() -> None:
    launches = product_launches()
    assert {"linear_8b_gate_up_w4_1", "linear_0.5b_down_w2_1024", "head_8b_w8", "argmax_8b_w8"} <= set(launches)
    for launch in launches.values():
        assert launch.shared_bytes <= 99 << 10  # of sm_86, sm_89 and sm_120
