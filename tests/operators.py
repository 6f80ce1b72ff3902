"""One-operator ONNX models, run as functions or by one compiled library, for the tests of domain `edge`."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

import plugins
from plugins.ort import library

Feeds = dict[str, np.ndarray]

# Every instruction set that this processor can run, not only the best one.
KERNELS = [
    name
    for name, flags in library.INSTRUCTION_SETS.get(platform.machine(), {}).items()
    if library._cpu_flags().issuperset(flags)
]
HOW = ["function", *KERNELS]


def library_path(name: str) -> Path:
    """The library of one instruction set; its absence is a failure, not a skip."""
    path = Path(library.__file__).with_name(library.library_file(name))
    assert path.exists(), f"{path} was not built; install g++ and run `pip install -e .`"
    return path


@functools.cache
def session(how: str, model: bytes) -> ort.InferenceSession:
    """`how`: one of HOW. Two threads, so that races have a chance to show."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    if how != "function":
        options.register_custom_ops_library(str(library_path(how)))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def bind_pool(binding: ort.IOBinding, name: str, pool: np.ndarray) -> None:
    """One buffer as a pool's input and output, as the executor binds it; `pool` (perhaps bfloat16) is updated."""
    onnx_type = helper.np_dtype_to_tensor_dtype(pool.dtype)
    stored = pool.view(np.uint16) if pool.dtype == ml_dtypes.bfloat16 else pool
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(stored, onnx_type)
    binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output(f"{name}_out", value)


def _per_element(how: str, pool: np.ndarray) -> int:
    """Values along the summed dimension that share one element of a product."""
    if how != "x86_64_v4_bf16" or pool.dtype not in (ml_dtypes.bfloat16, np.int8):
        return 1
    if pool.dtype == np.int8:
        return 4 if pool.shape[-1] <= 256 else 1
    return 2 if pool.shape[-1] % 32 == 0 else 1


def _flip_keys(how: str, pool: np.ndarray) -> np.ndarray:
    """Keys of four to an element are kept plus 128."""
    if pool.dtype == np.int8 and _per_element(how, pool) == 4:
        pool[:, [plane for plane in range(pool.shape[1]) if plane != 1]] ^= np.int8(-128)
    return pool


def to_pages(how: str, pool: np.ndarray) -> np.ndarray:
    """A pool [pages, planes, Hkv, 64, d] as the kernels keep it inside a page (plugins/paged_attention/tile.h)."""
    if how == "function":
        return pool
    per, paged = _per_element(how, pool), pool.copy()
    for plane in range(pool.shape[1]):
        rows = pool[:, plane]
        *lead, tokens, dim = rows.shape
        if plane == 1:
            split = rows.reshape(*lead, tokens // per, per, dim).swapaxes(-1, -2)
        else:
            split = rows.reshape(*lead, tokens, dim // per, per).swapaxes(-2, -3)
        paged[:, plane] = split.reshape(rows.shape)
    return _flip_keys(how, paged)


def from_pages(how: str, pool: np.ndarray) -> np.ndarray:
    """The inverse of `to_pages`."""
    if how == "function":
        return pool
    per, plain = _per_element(how, pool), pool.copy()
    for plane in range(pool.shape[1]):
        *lead, tokens, dim = pool[:, plane].shape
        if plane == 1:
            joined = pool[:, plane].reshape(*lead, tokens // per, dim, per).swapaxes(-1, -2)
        else:
            joined = pool[:, plane].reshape(*lead, dim // per, tokens, per).swapaxes(-2, -3)
        plain[:, plane] = joined.reshape(pool[:, plane].shape)
    return _flip_keys(how, plain)


@functools.cache
def one_node(
    op_type: str, inputs: tuple[tuple[str, str, int], ...], outputs: tuple[tuple[str, str], ...], **a: Any
) -> bytes:
    """A model of one operator; inputs (name, dtype, rank), outputs (name, dtype)."""

    def info(name: str, dtype: str, rank: int | None = None) -> onnx.ValueInfoProto:
        shape = None if rank is None else [f"{name}{i}" for i in range(rank)]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    names = [name for name, *_ in inputs], [name for name, _ in outputs]
    node = helper.make_node(op_type, *names, domain="edge", plugin_namespace="", plugin_version="1", **a)
    graph = helper.make_graph([node], op_type, [info(*i) for i in inputs], [info(*o) for o in outputs])
    opsets = [helper.make_opsetid("", plugins.OPSET), helper.make_opsetid("edge", plugins.DOMAIN_VERSION)]
    model = helper.make_model(graph, functions=plugins.functions(), opset_imports=opsets, ir_version=10)
    return model.SerializeToString()
