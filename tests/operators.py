"""One-operator ONNX models, run as functions or by one compiled library, for the tests of domain `edge`."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

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
