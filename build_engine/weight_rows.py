"""Rows of a checkpoint's matrices in chunks: as they are stored, as float32, or as codes and scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np

from build_engine.checkpoint import Checkpoint, Codes, LazyTensor, require_finite
from build_engine.quantize import quantize_symmetric
from edge.errors import EdgeError
from plugins.linear.meaning import ZEROS
from plugins.linear.pack import TILE_ROWS

CHUNK_BYTES = 64 << 20  # float32 bytes of weights in flight
Coded = tuple[np.ndarray, np.ndarray]  # codes and scales of some rows


def projections(checkpoint: Checkpoint) -> list[LazyTensor]:
    """The matrices that low-bit formats are for: q, k, v, o, gate, up and down of every layer, in file order."""
    return [tensor for name, tensor in checkpoint.tensors.items() if name.endswith("_proj.weight")]


def row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """The first axis in pieces of at most CHUNK_BYTES as float32."""
    step = max(1, CHUNK_BYTES // max(4 * int(np.prod(shape[1:], dtype=np.int64)), 1))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def row_chunks(source: LazyTensor) -> Iterator[np.ndarray]:
    """The tensor in chunks, checked for NaN and infinity."""
    for part in row_slices(source.shape):
        rows = source.read(part)
        require_finite(source.name, rows, part.start)
        yield rows
        source.release()


def float_rows(sources: list[LazyTensor]) -> Iterator[np.ndarray]:
    """The sources' rows one after another, float32, in chunks."""
    for source in sources:
        for rows in row_chunks(source):
            yield convert(source.name, rows, np.dtype(np.float32))


def stacked_shape(sources: list[LazyTensor]) -> tuple[int, int]:
    """(N, K) of the stacked rows."""
    return sum(source.shape[0] for source in sources), sources[0].shape[1]


def coded_rows(sources: list[LazyTensor], bits: int, group: int, block: int) -> Iterator[Coded]:
    """The sources' rows one after another as codes with zero ZEROS[bits], in chunks.

    group: inputs that share a scale; block: inputs for which one is stored, a divisor of group, or of any size if group
    is K. Gives codes [rows, K padded to whole blocks] uint8 and positive scales [rows, blocks] float32. Stored codes
    of no more bits, whose groups are whole multiples of `group` or rows, are taken over: the values are the
    checkpoint's own, to the last bit. Other weights are rounded to the nearest code.
    """
    for source in sources:
        k = source.shape[1]
        if takes_over(source, bits, group):
            assert source.codes is not None
            for codes, scales in _stored_rows(source, source.codes):
                shift = ZEROS[bits] - source.codes.zero
                padded = np.pad(codes + np.uint8(shift), ((0, 0), (0, -k % block)), constant_values=ZEROS[bits])
                yield padded, _spread(scales, source.codes.group, block, k)
        else:
            for rows in float_rows([source]):
                part = quantize_symmetric(rows, group, bits)
                flat, scales = part.codes.reshape(len(rows), -1), _spread(part.scales, group, block, k)
                missing = scales.shape[1] * block - flat.shape[1]
                yield np.pad(flat, ((0, 0), (0, missing)), constant_values=ZEROS[bits]), scales


def takes_over(source: LazyTensor, bits: int, group: int) -> bool:
    """Whether the source's stored codes fit an operator with so many bits and a scale for each `group` inputs."""
    codes = source.codes
    if codes is None or codes.bits > bits or codes.zero != ZEROS[codes.bits]:
        return False
    return codes.group == source.shape[1] or codes.group % group == 0


def _stored_rows(source: LazyTensor, stored: Codes) -> Iterator[Coded]:
    most = 2 if stored.bits == 2 else (1 << stored.bits) - 1
    for part in row_slices(source.shape):
        codes, scales = stored.read(part)
        sound = np.isfinite(scales) & (scales > 0)
        if not sound.all():
            row, group = np.argwhere(~sound)[0].tolist()
            raise EdgeError(
                f"tensor {source.name} has the scale {float(scales[row, group])} at row {part.start + row}, group "
                f"{group}, but scales must be positive numbers; download or convert the checkpoint again"
            )
        if codes.size and (largest := int(codes.max())) > most:
            raise EdgeError(
                f"tensor {source.name} holds the code {largest}, but codes of {stored.bits} bits end at {most}; "
                "download or convert the checkpoint again"
            )
        yield codes, scales
        source.release()


def _spread(scales: np.ndarray, group: int, block: int, k: int) -> np.ndarray:
    """[rows, K / group] -> [rows, ceil(K / block)]: every block with its group's scale."""
    return np.repeat(scales, -(-k // block) if scales.shape[1] == 1 else group // block, axis=1)


def whole_tiles(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The rows of `chunks` cut at multiples of TILE_ROWS, whatever their own lengths; only the last may be short."""
    rest: np.ndarray | None = None
    for chunk in chunks:
        rows = chunk if rest is None else np.concatenate([rest, chunk])
        whole = len(rows) // TILE_ROWS * TILE_ROWS
        if whole:
            yield rows[:whole]
        rest = rows[whole:]
    if rest is not None and len(rest):
        yield rest


def convert(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast, refusing values that overflow (bfloat16 weights over 65504 do not fit float16)."""
    if values.dtype == dtype:
        return values
    if values.dtype == ml_dtypes.bfloat16:
        values = values.astype(np.float32)
    with np.errstate(over="ignore"):  # found and named below
        converted = values.astype(dtype)
    if dtype == np.float16 and not np.isfinite(converted).all():
        raise EdgeError(
            f"{name}: the value {float(np.abs(values).max()):g} exceeds float16's 65504; export for onnxruntime with "
            "--weights exact, which keeps wider weights"
        )
    return converted


def half_scales(name: str, scales: np.ndarray) -> np.ndarray:
    """Scales as float16, all that TensorRT's groups have: positive there too, and a ternary bfloat16 one unchanged."""
    return np.maximum(convert(name, scales, np.dtype(np.float16)), np.finfo(np.float16).smallest_subnormal)
