"""Runs an engine's graph where TensorRT cannot: without a GPU it builds engines but does not load them.

A stand-in for TensorRT's runtime API (`Runtime`, engine, execution context) over the bundle's own ONNX file. Plugin
nodes run the real plugin classes of tensorrt_rtx: creator, attach_to_context, enqueue with the real descriptions, on
memory of the emulated driver. The few standard operators between them run as host functions in the stream, where a
CUDA graph records them like a launch. The "engine file" holds the path of the graph.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorrt_rtx
from cuda.bindings import driver
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edge.cuda import DeviceArray, Pool, Stream
from edge.engine_file import Profile
from edge.errors import EdgeError
from plugins.plugin import ALIGNMENT
from plugins.tensorrt import OPERATORS

HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
NAME = "TensorRT stand-in"


def write_engine(graph: Path, profiles: Sequence[Profile], path: Path) -> None:
    """What the stand-in takes for an engine of a graph."""
    path.write_text(json.dumps({"graph": str(graph), "profiles": [profile.shapes for profile in profiles]}))


class Api:
    """tensorrt_rtx with another runtime and a registry of its own; all else is the real package."""

    def __init__(self) -> None:
        self.creators: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorrt_rtx, name)

    def get_plugin_registry(self) -> Api:
        return self

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators.get(name)

    def deregister_creator(self, creator: Any) -> bool:
        return self.creators.pop(creator.name, None) is not None

    def Runtime(self, logger: Any) -> Api:
        return self

    def deserialize_cuda_engine(self, data: bytes) -> Engine:
        values = json.loads(bytes(data))
        return Engine(self, Path(values["graph"]), values["profiles"])


def view(address: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """The emulated device's memory, which is the host's."""
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer((ctypes.c_ubyte * max(size, 1)).from_address(address), dtype, math.prod(shape)).reshape(shape)


@dataclass
class Engine:
    """The graph with its weights on the emulated device."""

    api: Api
    path: Path
    profiles: list[dict[str, Any]]
    limits: int = 1 << 26  # bytes of working memory

    def __post_init__(self) -> None:
        model = onnx.load(self.path)
        self.graph = model.graph
        self.io = [value.name for value in (*self.graph.input, *self.graph.output)]
        self.types = {v.name: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in self.graph.input}
        weights = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.pool = Pool(Pool.bytes_for([w.nbytes for w in weights.values()]))
        self.weights: dict[str, DeviceArray] = {}
        stream = Stream()
        for name, values in weights.items():
            self.weights[name] = self.pool.take(values.shape, values.dtype)
            stream.upload(self.weights[name], np.ascontiguousarray(values))
        stream.synchronize()

    @property
    def num_io_tensors(self) -> int:
        return len(self.io)

    def get_tensor_name(self, index: int) -> str:
        return self.io[index]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return self.limits

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy == tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)


@dataclass
class Context:
    """Runs the nodes one after another; intermediate values lie one after another in the working memory."""

    engine: Engine
    addresses: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)  # host functions and what they use: graphs replay them
    runs: int = 0

    def __post_init__(self) -> None:
        operators = {operator.NAME: operator for operator in OPERATORS}
        self.plugins: dict[str, Any] = {}
        for node in self.engine.graph.node:
            if node.domain == "edge":
                creator = self.engine.api.creators[node.op_type]
                plugin = creator.create_plugin(node.name, _fields(node, operators[node.op_type]), None)
                self.plugins[node.name] = plugin.attach_to_context(None)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = self.engine.profiles[index]
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self.working, self.working_end = address, address + size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.profile[name]
        self.shapes[name] = tuple(shape)
        return all(low <= n <= high for low, n, high in zip(smallest, shape, largest, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        free = self.working
        arrays = dict(self.engine.weights)
        for name, dtype in self.engine.types.items():
            arrays[name] = DeviceArray(self.addresses[name], self.shapes[name], dtype)
        for node in self.engine.graph.node:
            inputs = [arrays[name] for name in node.input]
            outputs = self._plugin_outputs(node, inputs) if node.domain == "edge" else _standard_outputs(node, inputs)
            for name, (shape, dtype) in zip(node.output, outputs, strict=True):
                address = self.addresses.get(name)
                if address is None:
                    address, free = free, free + -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
                arrays[name] = DeviceArray(address, shape, dtype)
            made = [arrays[name] for name in node.output]
            if node.domain != "edge":
                self._queue_standard(node, inputs, made, stream)
            elif not self._enqueue(node, inputs, made, free, stream):
                return False
            assert free < self.working_end
        return True

    def _plugin_outputs(self, node: onnx.NodeProto, inputs: list[DeviceArray]) -> list[tuple[Any, np.dtype]]:
        operator = self.plugins[node.name].operator
        shapes = operator.shapes(dict(zip(operator.INPUTS, (a.shape for a in inputs), strict=True)))
        types = operator.types()
        element = next((a.dtype for n, a in zip(operator.INPUTS, inputs, strict=True) if types[n] == "element"), None)
        return [
            (tuple(shapes[name]), np.dtype(element if types[name] == "element" else types[name]))
            for name in operator.OUTPUTS
        ]

    def _enqueue(
        self, node: Any, inputs: list[DeviceArray], outputs: list[DeviceArray], free: int, stream: int
    ) -> bool:
        """False if the plugin fails: TensorRT's bindings turn its exception into a status."""
        described = [[_description(a) for a in arrays] for arrays in (inputs, outputs)]
        addresses = [[a.address for a in arrays] for arrays in (inputs, outputs)]
        try:
            self.plugins[node.name].enqueue(*described, *addresses, free, stream)
        except EdgeError:
            return False
        return True

    def _queue_standard(self, node: Any, inputs: list[DeviceArray], outputs: list[DeviceArray], stream: int) -> None:
        def compute(_: Any) -> None:
            results = _evaluate(node, [view(a.address, a.shape, a.dtype) for a in inputs])
            for array, result in zip(outputs, results, strict=True):
                view(array.address, array.shape, array.dtype)[...] = result

        function = HostFunction(compute)
        self.kept.append(function)
        address = ctypes.cast(function, ctypes.c_void_p).value
        (status,) = driver.cuLaunchHostFunc(driver.CUstream(stream), driver.CUhostFn(address), 0)
        assert status == driver.CUresult.CUDA_SUCCESS, status


def _fields(node: onnx.NodeProto, operator: Any) -> list[Any]:
    """The node's attributes as TensorRT's parser would pass them: those that the creator asks for."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    kinds = {
        int: (np.int32, tensorrt_rtx.PluginFieldType.INT32),
        float: (np.float32, tensorrt_rtx.PluginFieldType.FLOAT32),
    }
    made = []
    for name in (attribute.name for attribute in fields(operator)):
        dtype, kind = kinds[type(values[name])]
        made.append(tensorrt_rtx.PluginField(name, np.array([values[name]], dtype), kind))
    return made


def _description(array: DeviceArray) -> Any:
    description = tensorrt_rtx.PluginTensorDesc()
    description.dims = tensorrt_rtx.Dims(list(array.shape))
    names = {"float16": "float16", "float32": "float32", "int32": "int32", "int8": "int8"}
    description.type = getattr(tensorrt_rtx, names[array.dtype.name])
    description.format = tensorrt_rtx.TensorFormat.LINEAR
    return description


_EVALUATORS: dict[bytes, ReferenceEvaluator] = {}


def _evaluate(node: onnx.NodeProto, inputs: list[np.ndarray]) -> list[np.ndarray]:
    key = node.SerializeToString()
    if key not in _EVALUATORS:
        ins = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), None)
            for n, a in zip(node.input, inputs, strict=True)
        ]
        outs = [helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in node.output]
        graph = helper.make_graph([node], "node", ins, outs)
        _EVALUATORS[key] = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    return _EVALUATORS[key].run(None, dict(zip(node.input, inputs, strict=True)))


def _standard_outputs(node: onnx.NodeProto, inputs: list[DeviceArray]) -> list[tuple[Any, np.dtype]]:
    zeros = [np.zeros(a.shape, a.dtype) for a in inputs]
    return [(result.shape, result.dtype) for result in _evaluate(node, zeros)]
