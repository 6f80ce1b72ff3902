"""GPTQ's int4 tensors, as they are published or repacked for Marlin, as matrices that keep their stored codes.

Of a linear layer [N, K]: qweight int32 (GPTQ [K / 8, N], Marlin [K / 16, 2 N]: its shape says which), scales
[K / g, N], qzeros int32 [K / g, N / 8] and g_idx int32 [K] (spec: quantization_and_speculation.md 3). Codes must be
symmetric, in groups of neighbouring inputs. That is all that qzeros and g_idx may say, so they may also be absent, as
in Marlin's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from build_engine import marlin
from build_engine.checkpoint import Codes, LazyTensor
from build_engine.quantize import unpack_nibbles
from edge.errors import EdgeError

GROUP_SIZES = (-1, 32, 64, 128)  # -1: one scale a row
STORED_ZEROS = {"gptq": 7, "gptq_v2": 8}  # checkpoint_format -> what qzeros holds where code 8 means 0
_ZERO = 8
_CODES_A_WORD = 8
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_REMEDY = "use the bf16 checkpoint, or one quantised symmetrically and without desc_act"


@dataclass(frozen=True)
class GptqFormat:
    """What a checkpoint's quantization_config says; the tensors are held to it.

    group_size: one of GROUP_SIZES; stored_zero: one of STORED_ZEROS; lm_head: whether it is quantised too.
    """

    group_size: int
    stored_zero: int
    desc_act: bool
    lm_head: bool


def open_gptq_tensors(
    found: Mapping[str, LazyTensor], gptq: GptqFormat, shapes: Mapping[str, tuple[int, ...]], source: Path
) -> dict[str, LazyTensor]:
    """`found` with the tensors of every int4 layer replaced by the matrix they mean, float32, with its `codes`.

    shapes: of all tensors of the model. Marlin's fused qkv_proj and gate_up_proj become the model's own layers. Reads
    g_idx, and no weights: zero points and scales are checked where they are read. EdgeError names the tensor that is
    not what `gptq` and `shapes` say.
    """
    modules = [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]
    if not modules:
        raise EdgeError(
            f"{source}: config.json has a quantization_config, but no tensor is int4 (*.qweight); remove "
            "quantization_config or download the checkpoint again"
        )
    linear = {name for name, shape in shapes.items() if len(shape) == 2 and name != "model.embed_tokens.weight"}
    tensors = dict(found)
    for module in modules:
        if module == "lm_head" and not gptq.lm_head:
            raise EdgeError(
                f"{source}: tensor lm_head.qweight is int4, but quantization_config does not say lm_head: true; "
                "correct config.json or download the checkpoint again"
            )
        leaf = module.rpartition(".")[2]
        parts = [f"{module.removesuffix(leaf)}{part}.weight" for part in _FUSED.get(leaf, (leaf,))]
        for part in parts:
            if part not in linear:
                raise EdgeError(
                    f"{source}: tensor {module}.qweight is int4, but the model has no linear layer {part}; weights and "
                    "configuration are not of the same model"
                )
            if part in tensors:
                raise EdgeError(f"{source}: tensor {part} is also stored as {module}.qweight; remove one of them")
        rows = [shapes[part][0] for part in parts]
        layer = _take_layer(module, tensors, sum(rows), shapes[parts[0]][1], gptq, source)
        for i, part in enumerate(parts):
            tensors[part] = _lazy_tensor(part, layer, sum(rows[:i]), rows[i])
    return tensors


@dataclass(frozen=True)
class _Layer:
    """The stored tensors of a linear layer [n, k], or of several whose rows are stacked."""

    n: int
    k: int
    group: int
    is_marlin: bool
    stored_zero: int
    qweight: LazyTensor
    scales: LazyTensor
    qzeros: LazyTensor | None
    source: Path


def _take_layer(module: str, tensors: dict[str, LazyTensor], n: int, k: int, gptq: GptqFormat, source: Path) -> _Layer:
    """The layer `module` [n, k], checked; its stored tensors leave `tensors`."""
    qweight = tensors.pop(f"{module}.qweight")
    scales, qzeros, g_idx = (tensors.pop(f"{module}.{kind}", None) for kind in ("scales", "qzeros", "g_idx"))
    if scales is None:
        raise EdgeError(f"{source}: tensor {module}.scales is missing; download the checkpoint again")
    group = k if gptq.group_size == -1 else gptq.group_size
    if k % group:
        raise EdgeError(
            f"{source}: the {k} inputs of {module} are not a multiple of quantization_config's group_size {group}; "
            "quantise again with a smaller one"
        )
    is_marlin = _is_marlin(qweight, n, k, source)
    _check_shape(scales, (k // group, n), gptq, k, source)
    if qzeros is not None:
        _check_shape(qzeros, (k // group, -(-n // _CODES_A_WORD)), gptq, k, source)
    if g_idx is not None:
        _check_group_index(g_idx, k, group, source)
    elif gptq.desc_act:
        raise EdgeError(
            f"{source}: desc_act is true, but tensor {module}.g_idx, the order of the inputs, is missing; {_REMEDY}"
        )
    return _Layer(n, k, group, is_marlin, gptq.stored_zero, qweight, scales, qzeros, source)


def _is_marlin(qweight: LazyTensor, n: int, k: int, source: Path) -> bool:
    """Whether qweight of a layer [n, k] is in Marlin's order; EdgeError if it is neither in that nor in GPTQ's."""
    plain, repacked = (k // _CODES_A_WORD, n), (k // marlin.TILE, 2 * n)
    if qweight.shape == plain and k % _CODES_A_WORD == 0:
        return False
    has_tiles = k % marlin.TILE == 0 and n % marlin.RUN_ROWS == 0
    if qweight.shape == repacked and has_tiles:
        return True
    for bits in (2, 3, 8):
        if qweight.shape == (k * bits // 32, n):
            raise EdgeError(
                f"{source}: tensor {qweight.name} has shape {list(qweight.shape)}, that of {bits}-bit codes, but "
                f"quantization_config says 4 bits; {_REMEDY} to 4 bits"
            )
    shapes = f"{list(plain)}, or {list(repacked)} in Marlin's order" if has_tiles else f"{list(plain)}"
    raise EdgeError(
        f"{source}: tensor {qweight.name} has shape {list(qweight.shape)}, but a layer of {n} outputs and {k} inputs "
        f"needs {shapes}; weights and configuration are not of the same model"
    )


def _check_shape(tensor: LazyTensor, wanted: tuple[int, int], gptq: GptqFormat, k: int, source: Path) -> None:
    """scales or qzeros, which have a row for every group."""
    if tensor.shape == wanted:
        return
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 0
    other = f", as group_size {k // rows} would have" if rows and k % rows == 0 and rows != wanted[0] else ""
    raise EdgeError(
        f"{source}: tensor {tensor.name} has shape {list(tensor.shape)}{other}, but quantization_config's group_size "
        f"{gptq.group_size} needs {list(wanted)}; correct config.json or download the checkpoint again"
    )


def _check_group_index(g_idx: LazyTensor, k: int, group: int, source: Path) -> None:
    """The tensor decides, not desc_act: with static groups, files that say true have their inputs in order."""
    if g_idx.shape != (k,):
        raise EdgeError(
            f"{source}: tensor {g_idx.name} has shape {list(g_idx.shape)}, but {k} inputs need [{k}]; weights and "
            "configuration are not of the same model"
        )
    stored, in_order = g_idx.read(slice(None)), np.arange(k) // group
    if np.array_equal(stored, in_order):
        return
    if np.array_equal(np.sort(stored), in_order):
        raise EdgeError(
            f"{source}: tensor {g_idx.name} orders the inputs by activation (desc_act), which is not supported; "
            f"{_REMEDY}"
        )
    at = int(np.argmax(stored != in_order))
    raise EdgeError(
        f"{source}: tensor {g_idx.name} puts input {at} in group {stored[at]}, but with group_size {group} it is in "
        f"{in_order[at]}; correct config.json or download the checkpoint again"
    )


def _lazy_tensor(name: str, layer: _Layer, offset: int, rows: int) -> LazyTensor:
    """The matrix `name`: `rows` of the layer's rows from `offset` on."""
    return LazyTensor(
        name,
        (rows, layer.k),
        np.dtype(np.float32),
        "Marlin int4" if layer.is_marlin else "GPTQ int4",
        partial(_read_values, layer, offset, rows),
        partial(_release, layer),
        Codes(4, layer.group, _ZERO, partial(_read_codes, layer, offset, rows)),
    )


def _read_values(layer: _Layer, offset: int, count: int, rows: slice) -> np.ndarray:
    """The product of a code of 4 and a scale of 11 bits is exact in float32 (and would not be in float16)."""
    codes, scales = _read_codes(layer, offset, count, rows)
    values = codes.astype(np.float32)
    values -= _ZERO
    groups = values.reshape(*scales.shape, layer.group)
    groups *= scales[..., None]
    return values


def _read_codes(layer: _Layer, offset: int, count: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Rows are columns of the mapped file: only those asked for are copied out of it."""
    start, stop, _ = rows.indices(count)
    first, last = offset + start, offset + max(start, stop)
    words, scales = layer.qweight.read(slice(None)), layer.scales.read(slice(None))
    if layer.is_marlin:
        codes, scales = marlin.unpack_codes(words, first, last), marlin.unpack_scales(scales, first, last)
    else:
        codes = unpack_nibbles(np.ascontiguousarray(words[:, first:last].T).view(np.uint8))
        scales = scales[:, first:last].T
    scales = np.ascontiguousarray(scales, np.float32)
    _require_positive(layer, scales, first)
    _require_symmetric(layer, first, last)
    return codes, scales


def _require_positive(layer: _Layer, scales: np.ndarray, first: int) -> None:
    bad = ~((scales > 0) & np.isfinite(scales))
    if bad.any():
        row, group = np.argwhere(bad)[0]
        raise EdgeError(
            f"{layer.source}: tensor {layer.scales.name} holds {scales[row, group]} for row {first + row}, group "
            f"{group}, but scales must be positive and finite; download or quantise the checkpoint again"
        )


def _require_symmetric(layer: _Layer, first: int, last: int) -> None:
    if layer.qzeros is None:
        return
    start = first // _CODES_A_WORD
    words = layer.qzeros.read(slice(None))[:, start : -(-last // _CODES_A_WORD)]
    zeros = unpack_nibbles(np.ascontiguousarray(words).view(np.uint8))[:, : layer.n - start * _CODES_A_WORD]
    bad = zeros != layer.stored_zero
    if bad.any():
        group, row = np.argwhere(bad)[0]
        raise EdgeError(
            f"{layer.source}: tensor {layer.qzeros.name} holds {zeros[group, row]} for row "
            f"{start * _CODES_A_WORD + row}, group {group}, but quantization_config's sym and checkpoint_format mean "
            f"{layer.stored_zero} everywhere (zero point 8); asymmetric weights are not supported: {_REMEDY}"
        )


def _release(layer: _Layer) -> None:
    for tensor in (layer.qweight, layer.scales, layer.qzeros):
        if tensor is not None:
            tensor.release()
