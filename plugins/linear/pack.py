"""Packed weights (plugins/linear) from natural codes and scales, and back; nothing is lost either way."""

from __future__ import annotations

import numpy as np

from edge.errors import EdgeError
from plugins.linear.meaning import ZEROS

TILE_ROWS = 16
GROUPS = (0, 32, 64, 128)  # inputs that share a scale; 0: the whole row


def vector_inputs(bits: int) -> int:
    """Inputs of a tile whose codes fill 16 bytes of each lane."""
    return 256 // bits


def chunk_inputs(bits: int, group: int) -> int:
    """Inputs whose scales are stored together."""
    return 128 if group == 128 or bits == 2 else 64


def check_format(k: int, bits: int, group: int) -> None:
    """Raises EdgeError unless there are kernels for K inputs of this format."""
    if bits not in ZEROS:
        raise EdgeError(f"weights of {bits} bits have no CUDA kernels, use {', '.join(map(str, ZEROS))}")
    if group not in GROUPS:
        raise EdgeError(f"group size {group} has no CUDA kernels, use 32, 64, 128 or one scale a row (0)")
    if k <= 0 or k % chunk_inputs(bits, group):
        raise EdgeError(
            f"{k} inputs are not whole chunks of {chunk_inputs(bits, group)}: pad the weights with code {ZEROS[bits]}"
        )


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [N, K] uint8, natural order -> int32 [ceil(N / 16), K / vector, 32, 4]."""
    n, k = codes.shape
    check_format(k, bits, 0)
    limit = 3 if bits == 2 else 1 << bits
    if codes.size and (largest := int(codes.max())) >= limit:
        raise EdgeError(f"code {largest} is not one of the {limit} codes of {bits} bits")
    padded = np.pad(codes, ((0, -n % TILE_ROWS), (0, 0)), constant_values=ZEROS[bits])
    spans = vector_inputs(bits) // 32
    # Rows are (tile, r, g) with row 8r + g, inputs (vector, span, q, step, pair, half).
    split = padded.reshape(-1, 2, 8, k // vector_inputs(bits), spans, 4, 2, 2, 2)
    ordered = split.transpose(0, 3, 2, 5, 4, 6, 7, 1, 8)
    fields = ordered.reshape(*ordered.shape[:2], 32, 4, 16 // bits, 2)
    words = np.zeros(fields.shape[:4], np.uint32)
    for field in range(16 // bits):
        for half in range(2):
            words |= fields[..., field, half].astype(np.uint32) << (bits * field + 16 * half)
    return words.view(np.int32)


def unpack_codes(words: np.ndarray, bits: int, n: int) -> np.ndarray:
    """The inverse of pack_codes: [n, K] uint8."""
    unsigned, mask = words.view(np.uint32), (1 << bits) - 1
    fields = np.empty((*words.shape, 16 // bits, 2), np.uint8)
    for field in range(16 // bits):
        for half in range(2):
            fields[..., field, half] = (unsigned >> (bits * field + 16 * half)) & mask
    tiles, vectors = words.shape[:2]
    ordered = fields.reshape(tiles, vectors, 8, 4, vector_inputs(bits) // 32, 2, 2, 2, 2)
    split = ordered.transpose(0, 7, 2, 1, 4, 3, 5, 6, 8)
    return np.ascontiguousarray(split.reshape(tiles * TILE_ROWS, -1)[:n])


def pack_scales(scales: np.ndarray, k: int, bits: int) -> np.ndarray:
    """scales [N, K / group] or [N] -> packed float16 or float32 [ceil(N / 16) * 16]."""
    grouped = scales.ndim == 2
    group = k // scales.shape[1] if grouped else 0
    check_format(k, bits, group)
    with np.errstate(over="ignore"):
        packed = scales.astype(np.float16 if grouped else np.float32)
    if not np.array_equal(packed, scales):
        raise EdgeError(f"scales of type {scales.dtype} do not fit {packed.dtype}: round them first")
    padded = np.pad(packed, ((0, -len(scales) % TILE_ROWS),) + ((0, 0),) * (scales.ndim - 1))
    if not grouped:
        return padded
    split = padded.reshape(-1, 2, 8, k // chunk_inputs(bits, group), chunk_inputs(bits, group) // group)
    return np.ascontiguousarray(split.transpose(0, 3, 2, 4, 1))


def unpack_scales(packed: np.ndarray, n: int) -> np.ndarray:
    """The inverse of pack_scales: [n, K / group] or [n]."""
    if packed.ndim == 1:
        return packed[:n]
    tiles, chunks, _, groups, _ = packed.shape
    return packed.transpose(0, 4, 2, 1, 3).reshape(tiles * TILE_ROWS, chunks * groups)[:n]
