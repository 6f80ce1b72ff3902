"""append.cu against numpy: rotated queries, and keys and values in their pages, 16-bit and bytes, every route."""

from __future__ import annotations

import numpy as np
import pytest

from plugins.paged_attention.launch import AttentionShape, append
from plugins.paged_attention.meaning import quantise, rotate
from plugins.paged_attention.pages import Step, from_device, make_step, to_device
from plugins.vectors import ELEMENTS, UNIT, poisoned
from tests.cuda_pages import past_pool
from tests.cuda_routes import ROUTES, SEEDS, run_route

PAGE = 64


def run_append(route: str, seed: int, shape: AttentionShape, step: Step, pool: np.ndarray, qkv: np.ndarray) -> dict:
    angles = np.random.default_rng(5).uniform(-3, 3, (shape.tokens, shape.head_dim // 2))
    buffers = {
        "qkv": qkv.copy(),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "q": poisoned((shape.tokens, shape.heads, shape.head_dim), qkv.dtype),
        **step.buffers,
        **to_device(pool, shape.kv_element),
    }
    run_route(route, [append(shape)], buffers, seed)
    return buffers


def close(actual: np.ndarray, expected: np.ndarray, element: str) -> bool:
    """A compiler may contract a rotation's multiply and add: one unit of the element's last place, rarely."""
    a, b = actual.astype(np.float32), expected.astype(np.float32)
    return bool((np.abs(a - b) <= UNIT[element] * np.maximum(np.abs(b), 1e-3)).all() and (a == b).mean() > 0.98)


@pytest.mark.parametrize("kv", ["same", "int8"])
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("route", ROUTES)
def test_append(route: str, element: str, kv: str) -> None:
    for index, (head_dim, heads, kv_heads, use_nope) in enumerate([(64, 6, 2, False), (128, 3, 1, True)]):
        rng = np.random.default_rng(index)
        sequences = [(60, 9), (0, 0), (63, 1), (0, 2), (128, 1)]
        step = make_step(rng, sequences, trees=[(-1, 0, -1, 2, 1, 1, 1)])  # a tree over two pages
        kv_element = "uint8_t" if kv == "int8" else element
        tokens = len(step.positions)
        shape = AttentionShape(
            tokens, 5, step.page_table.shape[1], heads, kv_heads, head_dim, element, kv_element, use_nope=use_nope
        )
        pool = past_pool(rng, step, shape.planes, kv_heads, head_dim, ELEMENTS[element])
        qkv = rng.normal(size=(tokens, heads + 2 * kv_heads, head_dim)).astype(ELEMENTS[element])
        qkv[3, heads] = 0  # a key of nothing but zeros has no largest value to scale by
        for seed in SEEDS[route]:
            check(shape, step, pool, qkv, run_append(route, seed, shape, step, pool, qkv))


def check(shape: AttentionShape, step: Step, pool: np.ndarray, qkv: np.ndarray, buffers: dict) -> None:
    q, k, v = np.split(qkv, [shape.heads, shape.heads + shape.kv_heads], axis=1)
    assert close(buffers["q"], rotate(q, buffers["cos"], buffers["sin"]), shape.element)
    expected = pool.astype(np.float32)
    new = np.zeros((pool.shape[0], PAGE), bool)
    rotated = rotate(k, buffers["cos"], buffers["sin"])
    for b in range(step.sequences):
        for row in step.rows(b):
            page, slot = step.page_table[b, step.slots[row] // PAGE], step.slots[row] % PAGE
            new[page, slot] = True
            planes = [rotated[row], v[row], k[row]][: shape.planes]
            expected[page, :, :, slot] = np.stack(planes).astype(np.float32)
    held = from_device(buffers).swapaxes(1, 3)  # [pages, slots, Hkv, planes, d]
    wanted = expected.swapaxes(1, 3)
    if shape.is_byte:
        codes, scales = quantise(wanted[new])  # scales [tokens, Hkv, planes]
        as_bytes = codes * scales[..., None]
        assert np.array_equal(held[new][:, :, 1:], as_bytes[:, :, 1:])
        # A rotation that was contracted moves the scale by one unit of the element's last place, and a byte by one.
        assert np.allclose(buffers["kv_scales"].swapaxes(1, 3)[new], scales, rtol=UNIT[shape.element])
        keys, wanted_keys = held[new][:, :, 0], as_bytes[:, :, 0]
        slack = scales[:, :, 0, None] + UNIT[shape.element] * np.abs(wanted_keys)
        assert (np.abs(keys - wanted_keys) <= 1.01 * slack).all()
        assert (np.abs(keys - wanted_keys) <= 0.01 * slack).mean() > 0.95
    else:
        assert close(held[new], wanted[new], shape.element)
    past = ~new & ~np.isnan(wanted).any(axis=(2, 3, 4))
    untouched = from_device(to_device(pool, shape.kv_element)).swapaxes(1, 3)
    assert np.array_equal(held[past], untouched[past])
    assert np.array_equal(np.isnan(held[~new]), np.isnan(untouched[~new]))


def test_the_oracle_of_bytes_round_trips() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2, 1, PAGE, 64)).astype(np.float32)
    held = from_device(to_device(x, "uint8_t"))
    assert np.abs(held - x).max() <= 0.5 * np.abs(x).max() / 127 + 1e-6
    assert np.array_equal(from_device(to_device(x, "half")), x)
