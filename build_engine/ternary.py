"""Ternary checkpoints (BitCPM4): codes and scales out of tensors that hold -s, 0 and s, bit for bit.

Fake-quantised checkpoints store each weight as code times scale in a float type, so the codes are the signs and the
scale is the only magnitude of its group (spec: quantization_and_speculation.md 1.1, 1.4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from build_engine.checkpoint import Checkpoint, Codes, LazyTensor, require_finite
from build_engine.weight_rows import projections, row_chunks, row_slices
from edge.errors import EdgeError, UsageError
from plugins.linear.meaning import ZEROS

ARITHMETICS = ("bf16", "fp32")
# Rounding at half the mean magnitude leaves about 31 % zeros of near-Gaussian weights; a tensor with more than this is
# no product of it.
MOST_ZEROS = 0.9
_GROUPS = (256, 128, 64, 32)
_ZERO = ZEROS[2]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TernaryReport:
    """What one matrix holds. group: inputs that share a scale; zeros: share of the codes; scales: least and largest;
    empty_groups: those without a scale of their own, for all their codes are 0. error: the root mean square of what
    requantising changed, as a share of the weights' own; 0 for weights that were ternary.
    """

    group: int
    is_whole_tensor: bool
    zeros: float
    scales: tuple[float, float]
    empty_groups: int
    error: float = 0.0


@dataclass(frozen=True)
class Mixed:
    """Two magnitudes in one group of a matrix that is not ternary: inputs first..first + group - 1 of the row."""

    row: int
    first: int
    group: int
    magnitudes: tuple[float, float]


@dataclass(frozen=True)
class Ternary:
    """A checkpoint whose projections have ternary `codes`, and a report on each of them.

    disagreement: the share of codes that bfloat16 and float32 arithmetic round differently; None if they were stored.
    """

    checkpoint: Checkpoint
    reports: dict[str, TernaryReport]
    disagreement: float | None = None

    def describe(self) -> str:
        """One line: 'ternary in 14 matrices: a scale for a row in 14, 31 % zeros (30 to 32), scales 0.01 to 0.05'."""
        reports = list(self.reports.values())
        shapes = [self.checkpoint.tensors[name].shape for name in self.reports]
        groups: dict[str, int] = {}
        for report, (_, inputs) in zip(reports, shapes, strict=True):
            what = "tensor" if report.is_whole_tensor else f"{report.group} inputs" if report.group < inputs else "row"
            groups[what] = groups.get(what, 0) + 1
        zeros = [100 * report.zeros for report in reports]
        words = [f"a scale for each {what} in {count}" for what, count in groups.items()]
        mean = np.average(zeros, weights=[n * k for n, k in shapes])
        words.append(f"{mean:.1f} % zeros ({min(zeros):.1f} to {max(zeros):.1f})")
        least, largest = min(r.scales[0] for r in reports), max(r.scales[1] for r in reports)
        words.append(f"scales {least:.3g} to {largest:.3g}, {sum(r.empty_groups for r in reports)} groups of zeros")
        if self.disagreement is not None:
            error = max(report.error for report in reports)
            words.append(f"up to {error:.0%} error, {self.disagreement:.2%} of the codes hang on the arithmetic")
        return f"ternary in {len(reports)} matrices: {', '.join(words)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "disagreement": self.disagreement,
            "tensors": {name: asdict(report) for name, report in self.reports.items()},
        }


def is_ternary(checkpoint: Checkpoint) -> bool:
    """Whether the first layer's projections are ternary; `recover` then looks at all of them."""
    tensors = [tensor for tensor in projections(checkpoint) if tensor.name.startswith("model.layers.0.")]

    def holds(tensor: LazyTensor) -> bool:
        if tensor.codes is not None:
            return tensor.codes.bits == 2
        found = find_ternary(tensor)
        return isinstance(found, TernaryReport) and found.zeros <= MOST_ZEROS

    return all(map(holds, tensors))


def recover(checkpoint: Checkpoint, progress: Progress = lambda done, total, name: None) -> Ternary:
    """Find the codes of every projection, with the largest groups that have one scale; changes no value.

    EdgeError names a projection that is not ternary, or another tensor that is.
    """
    reports: dict[str, TernaryReport] = {}
    tensors = dict(checkpoint.tensors)
    names = {tensor.name for tensor in projections(checkpoint)}
    for done, (name, tensor) in enumerate(checkpoint.tensors.items(), start=1):
        if name in names:
            tensors[name], reports[name] = _recover_matrix(tensor)
        else:
            _refuse_ternary(tensor)
        progress(done, len(tensors), name)
    return Ternary(replace(checkpoint, tensors=tensors), reports)


def find_ternary(tensor: LazyTensor) -> TernaryReport | Mixed:
    """Read a matrix [N, K] in chunks, once if every row has one scale; see `candidate_groups` for smaller groups."""
    found: TernaryReport | Mixed | None = None
    for group in candidate_groups(tensor.shape[1]):
        found = _scan(tensor, group)
        if isinstance(found, TernaryReport):
            break
    assert found is not None
    return found


def candidate_groups(inputs: int) -> list[int]:
    """Groups that a scale may belong to, largest first: a row, its shares in tensor-parallel training, 256 to 32."""
    shares = {inputs // parts for parts in (2, 4, 8) if inputs % parts == 0 and inputs // parts >= _GROUPS[-1]}
    return sorted({inputs, *shares, *(group for group in _GROUPS if inputs % group == 0)}, reverse=True)


def _scan(tensor: LazyTensor, group: int) -> TernaryReport | Mixed:
    """Whether every group has at most one magnitude besides 0."""
    zeros = empty = row = 0
    least, largest = np.inf, 0.0
    for values in row_chunks(tensor):
        magnitudes = _magnitudes(values).reshape(len(values), -1, group)
        highest = magnitudes.max(-1, keepdims=True)
        is_zero = magnitudes == 0
        different = magnitudes != highest
        different &= ~is_zero
        if different.any():
            place = np.unravel_index(np.argmax(different), different.shape)
            both = np.array([magnitudes[place], highest[place[:2]][0]]).view(values.dtype).astype(float)
            return Mixed(row + int(place[0]), int(place[1]) * group, group, (float(both[0]), float(both[1])))
        zeros += int(np.count_nonzero(is_zero))
        empty += int(np.count_nonzero(highest == 0))
        if (scales := highest[highest != 0].view(values.dtype).astype(np.float64)).size:
            least, largest = min(least, float(scales.min())), max(largest, float(scales.max()))
        row += len(values)
    is_whole_tensor = group == tensor.shape[1] and least == largest
    share = zeros / max(tensor.shape[0] * tensor.shape[1], 1)
    return TernaryReport(group, is_whole_tensor, share, (least if largest else 0.0, largest), empty)


def _magnitudes(values: np.ndarray) -> np.ndarray:
    """The bits without the sign, so that -0.0 is 0."""
    if values.itemsize == 2:
        return values.view(np.uint16) & np.uint16(0x7FFF)
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)


def _recover_matrix(tensor: LazyTensor) -> tuple[LazyTensor, TernaryReport]:
    if tensor.stored_as == "Q4_0":
        raise EdgeError(
            f"tensor {tensor.name} is stored as Q4_0, which is lossy for ternary weights: its levels are -8 to 7, so "
            "one sign of a group ends at 7/8 of the other; use a TQ2_0 or TQ1_0 file or the bf16 checkpoint"
        )
    found = find_ternary(tensor)
    if isinstance(found, Mixed):
        last = found.first + found.group - 1
        raise EdgeError(
            f"tensor {tensor.name} is not ternary: inputs {found.first} to {last} of row {found.row} hold the "
            f"magnitudes {found.magnitudes[0]:.9g} and {found.magnitudes[1]:.9g}; choose --weights w4a16, or "
            "--requantize bf16 if these are the unquantised weights of ternary training"
        )
    if found.zeros > MOST_ZEROS:
        raise EdgeError(
            f"tensor {tensor.name} is {found.zeros:.1%} zeros, and ternary training leaves about a third; download the "
            "checkpoint again, or choose --weights exact to store it as it is"
        )
    codes = Codes(2, found.group, _ZERO, partial(_read_codes, tensor, found.group))
    return replace(tensor, codes=codes), found


def _refuse_ternary(tensor: LazyTensor) -> None:
    """Embedding, head and norms have 16 bits in every ternary model; if not, names do not fit the weights."""
    if len(tensor.shape) == 2:
        ternary = isinstance(find_ternary(tensor), TernaryReport)
    else:
        values = tensor.read(slice(None))
        require_finite(tensor.name, values)
        ternary = np.unique(_magnitudes(values)[values != 0]).size <= 1 and not (values == values[0]).all()
    if ternary:
        raise EdgeError(
            f"tensor {tensor.name} is ternary ({tensor.stored_as}), but a ternary model keeps 16 bits for all but its "
            "projections, so the names do not fit the weights; choose --weights exact to run them as they are"
        )


def _read_codes(tensor: LazyTensor, group: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Codes of some rows, and that their values are the tensor's, which `find_ternary` has seen."""
    values = tensor.read(rows)
    magnitudes = _magnitudes(values)
    highest = magnitudes.reshape(len(values), tensor.shape[1] // group, group).max(-1)
    scales = _fill(highest.view(values.dtype).astype(np.float32))
    negative = magnitudes != values.view(magnitudes.dtype)
    codes = (_ZERO + (magnitudes != 0)).astype(np.uint8)
    codes -= 2 * (negative & (magnitudes != 0)).astype(np.uint8)
    if not np.array_equal(_values(codes, scales), values.astype(np.float32)):
        raise EdgeError(f"tensor {tensor.name} changed while it was read; export again")
    return codes, scales


def _values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """codes [rows, K], scales [rows, K / group] -> [rows, K] float32."""
    centred = codes.astype(np.float32) - np.float32(_ZERO)
    return centred * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


def _fill(scales: np.ndarray) -> np.ndarray:
    """[rows, groups]: a group of zeros takes the scale before it in its row, else 1; TensorRT wants positive ones."""
    last = np.maximum.accumulate(np.where(scales > 0, np.arange(scales.shape[1]), 0), axis=1)
    filled = np.take_along_axis(scales, last, axis=1)
    return np.where(filled > 0, filled, np.float32(1))


# Unquantised weights of ternary training


def requantize(
    checkpoint: Checkpoint,
    arithmetic: str,
    group: int | None = None,
    progress: Progress = lambda done, total, name: None,
) -> Ternary:
    """Ternary codes from the latent weights of ternary training, as its forward pass rounds them (spec: 1.1, 1.3).

    arithmetic: of mean, division and rounding (ties to even). bf16 is what the published models were trained with; in
    fp32 weights on the threshold round otherwise. group: inputs that share a scale, None or 0 for a row. UsageError if
    a projection is quantised already.
    """
    if arithmetic not in ARITHMETICS:
        raise UsageError(f"unknown --requantize {arithmetic!r}; choose bf16 or fp32")
    if group and group not in _GROUPS:
        sizes = ", ".join(map(str, sorted(_GROUPS)))
        raise UsageError(f"--requantize knows no groups of {group}; choose a --group-size of {sizes}, or 0 for a row")
    reports: dict[str, TernaryReport] = {}
    tensors, matrices, different = dict(checkpoint.tensors), projections(checkpoint), 0
    for done, tensor in enumerate(matrices, start=1):
        if tensor.codes is not None or isinstance(find_ternary(tensor), TernaryReport):
            raise UsageError(
                f"tensor {tensor.name} is quantised already, so its codes are known; leave out --requantize"
            )
        inputs = tensor.shape[1]
        if inputs % (group or inputs):
            raise UsageError(f"--group-size {group} does not divide the {inputs} inputs of tensor {tensor.name}")
        codes = Codes(2, group or inputs, _ZERO, partial(_round_rows, tensor, group or inputs, arithmetic))
        reports[tensor.name], other = _compare(tensor, codes, arithmetic)
        different += other
        tensors[tensor.name] = replace(
            tensor, codes=codes, dtype=np.dtype(np.float32), read=partial(_dequantize, codes)
        )
        progress(done, len(matrices), tensor.name)
    total = sum(tensor.shape[0] * tensor.shape[1] for tensor in matrices)
    return Ternary(replace(checkpoint, tensors=tensors), reports, different / total)


def _round_rows(tensor: LazyTensor, group: int, arithmetic: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """clamp(round(w / s), -1, 1) + 1 with s = mean |w| of a group, everything rounded to the arithmetic's type."""
    dtype = np.dtype(ml_dtypes.bfloat16 if arithmetic == "bf16" else np.float32)

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype).astype(np.float32)

    values = tensor.read(rows)
    require_finite(tensor.name, values, rows.indices(tensor.shape[0])[0])
    groups = rounded(values.astype(np.float32)).reshape(len(values), tensor.shape[1] // group, group)
    scales = rounded(np.abs(groups).mean(-1, dtype=np.float64))
    scales[scales == 0] = 1
    codes = np.clip(np.rint(rounded(groups / scales[..., None])), -1, 1) + _ZERO
    return codes.astype(np.uint8).reshape(values.shape), scales


def _dequantize(codes: Codes, rows: slice) -> np.ndarray:
    return _values(*codes.read(rows))


def _compare(tensor: LazyTensor, codes: Codes, arithmetic: str) -> tuple[TernaryReport, int]:
    """The report on requantised weights, and how many codes the other arithmetic rounds otherwise."""
    other = ARITHMETICS[1 - ARITHMETICS.index(arithmetic)]
    zeros = empty = different = 0
    squares, errors, least, largest = 0.0, 0.0, np.inf, 0.0
    for part in row_slices(tensor.shape):
        ours, scales = codes.read(part)
        different += int(np.count_nonzero(ours != _round_rows(tensor, codes.group, other, part)[0]))
        is_zero = ours == _ZERO
        zeros += int(np.count_nonzero(is_zero))
        empty += int(np.count_nonzero(is_zero.reshape(*scales.shape, -1).all(-1)))
        weights = tensor.read(part).astype(np.float64)
        squares += float(np.square(weights).sum())
        errors += float(np.square(_values(ours, scales) - weights).sum())
        least, largest = min(least, float(scales.min())), max(largest, float(scales.max()))
        tensor.release()
    rows, inputs = tensor.shape
    is_whole_tensor = codes.group == inputs and least == largest
    error = float(np.sqrt(errors / squares)) if squares else 0.0
    report = TernaryReport(codes.group, is_whole_tensor, zeros / (rows * inputs), (least, largest), empty, error)
    return report, different
