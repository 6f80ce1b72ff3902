"""TensorRT's own classes for the operators; `api` is the tensorrt or tensorrt_rtx package (edge/tensorrt.py).

TensorRT asks a creator for a plugin, the plugin for types, shapes and workspace while it builds, and calls `enqueue`
when it runs. All that is the same for every operator; what differs is the operator's description (plugins/*/trt.py).
The methods below are called by the bindings from C++, which print exceptions and go on with a failure code, take any
return for success, and keep no reference to what they were given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np

from edge.errors import EdgeError
from plugins.infllmv2.trt import InfLLMv2Attention, InfLLMv2AttentionInt8
from plugins.linear.trt import PackedHead, PackedLinear
from plugins.paged_attention.trt import PagedAttention, PagedAttentionInt8
from plugins.plugin import (
    MOST_MULTIPROCESSORS,
    Call,
    OffloadingOperator,
    Operator,
    PluginHost,
    Tensor,
    attributes_of,
    element_of,
    place,
    prepare,
    takes_type,
)
from plugins.rms_norm.trt import AddRMSNorm, RMSNorm
from plugins.rope.trt import LongRopeTable, RopeTable
from plugins.swiglu.trt import SwiGLU

VERSION, NAMESPACE = "1", ""  # as on the graph's nodes (build_engine/graph.py)
OPERATORS: tuple[type[Operator], ...] = (
    RMSNorm,
    AddRMSNorm,
    SwiGLU,
    RopeTable,
    LongRopeTable,
    PagedAttention,
    PagedAttentionInt8,
    InfLLMv2Attention,
    InfLLMv2AttentionInt8,
    PackedLinear,
    PackedHead,
)


_registered: dict[str, list[Any]] = {}  # package -> creators, to which TensorRT has bare pointers


def register_plugins(api: Any, host: PluginHost) -> list[Any]:
    """Make the operators known to TensorRT; call it before a graph is parsed or an engine is loaded.

    From then on new plugins belong to `host`; those that exist keep theirs. -> the creators, which live on here.
    """
    registry = api.get_plugin_registry()
    for earlier in _registered.pop(api.__name__, []):
        registry.deregister_creator(earlier)
    creators = _registered[api.__name__] = plugin_creators(api, host)
    for creator in creators:
        if not registry.register_creator(creator, NAMESPACE):
            raise EdgeError(f"TensorRT refuses the plugin {creator.name}; another one of that name is registered")
    return creators


def plugin_creators(api: Any, host: PluginHost) -> list[Any]:
    """An IPluginCreatorV3One for each operator."""
    interfaces = (api.IPluginV3, api.IPluginV3OneCore, api.IPluginV3OneBuild, api.IPluginV3OneRuntime)
    plugin_class = type("Plugin", (_Plugin, *interfaces), {"api": api, "interfaces": interfaces})
    creator_class: Any = type("Creator", (_Creator, api.IPluginCreatorV3One), {})
    return [creator_class(api, host, operator, plugin_class) for operator in OPERATORS]


def dtype_name(api: Any, dtype: Any) -> str:
    """numpy's name of a TensorRT type; TensorRT's own for those that numpy lacks."""
    names = ("float32", "float16", "bfloat16", "int32", "int8")
    return {getattr(api, name): name for name in names}.get(dtype) or str(dtype)


class _Creator:
    """Makes the plugins of one operator; `plugin_creators` adds TensorRT's base class."""

    def __init__(self, api: Any, host: PluginHost, operator: type[Operator], plugin_class: type) -> None:
        api.IPluginCreatorV3One.__init__(self)
        self.host, self.operator, self.plugin_class = host, operator, plugin_class
        self.name, self.plugin_version, self.plugin_namespace = operator.NAME, VERSION, NAMESPACE
        self.kept_fields = _plugin_fields(api, operator, None)
        self.field_names = api.PluginFieldCollection(self.kept_fields)

    def create_plugin(self, name: str, plugin_fields: Any, phase: Any) -> Any:
        """A plugin with the attributes of a node or of an engine; None, TensorRT's failure, if one is missing."""
        try:
            values = {one.name: one.data for one in plugin_fields}
            return self.plugin_class(self.host, self.operator(**attributes_of(self.operator, values)))
        except EdgeError as error:
            self.host.errors.append(str(error))
            return None


def _plugin_fields(api: Any, operator: type[Operator], values: Operator | None) -> list[Any]:
    """The operator's attributes as TensorRT serialises them; without `values` only their names and types.

    A collection made of them copies pointers: the fields, which keep the arrays alive, must be kept beside it.
    """
    kinds = {"int": (np.int32, api.PluginFieldType.INT32), "float": (np.float32, api.PluginFieldType.FLOAT32)}
    made = []
    for attribute in fields(operator):  # type: ignore[arg-type]
        dtype, kind = kinds[str(attribute.type)]
        data = np.array([] if values is None else [getattr(values, attribute.name)], dtype)
        made.append(api.PluginField(attribute.name, data, kind))
    return made


class _Plugin:
    """The plugin of any operator, its methods in the order in which TensorRT calls them."""

    api: ClassVar[Any]
    interfaces: ClassVar[tuple[Any, ...]]  # TensorRT's, which `plugin_creators` adds as base classes

    def __init__(self, host: PluginHost, operator: Operator, tactic: int | None = None) -> None:
        for interface in self.interfaces:
            interface.__init__(self)
        self.host, self.operator = host, operator
        self.tactic = operator.tactics()[0] if tactic is None else tactic
        self.plugin_name, self.plugin_version, self.plugin_namespace = operator.NAME, VERSION, NAMESPACE
        self.num_outputs = len(operator.OUTPUTS)
        self.timing_cache_id = repr(operator)  # plugins of equal attributes and shapes share what was timed
        self.kept_fields = _plugin_fields(self.api, type(operator), operator)
        self.serialized = self.api.PluginFieldCollection(self.kept_fields)

    def get_capability_interface(self, kind: Any) -> Any:
        """Core, build and runtime are one object."""
        return self

    def clone(self) -> Any:
        return type(self)(self.host, self.operator, self.tactic)

    # While an engine is built

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        types = self.operator.types()
        named = zip(self.operator.INPUTS, input_types, strict=True)
        element = element_of(self.operator, {name: dtype_name(self.api, dtype) for name, dtype in named})
        wanted = (types[name] for name in self.operator.OUTPUTS)
        return [getattr(self.api, str(element) if dtype == "element" else dtype) for dtype in wanted]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, expr_builder: Any) -> list[Any]:
        """Extents that are known become int for the operator, others pass through it as expressions."""
        known = {
            name: [d.get_constant_value() if d.is_constant() else d for d in (dims[i] for i in range(len(dims)))]
            for name, dims in zip(self.operator.INPUTS, inputs, strict=True)
        }
        shapes = self.operator.shapes(known)
        return [
            self.api.DimsExprs([expr_builder.constant(d) if isinstance(d, int) else d for d in shapes[name]])
            for name in self.operator.OUTPUTS
        ]

    def supports_format_combination(self, position: int, tensors: Sequence[Any], num_inputs: int) -> bool:
        """TensorRT tries types for one tensor after the other; those from `position` + 1 on are not decided."""
        names = (*self.operator.INPUTS, *self.operator.OUTPUTS)[: position + 1]
        types = {name: dtype_name(self.api, tensor.desc.type) for name, tensor in zip(names, tensors, strict=False)}
        dtype = types.pop(names[position])
        is_linear = tensors[position].desc.format == self.api.TensorFormat.LINEAR
        return is_linear and takes_type(self.operator, names[position], dtype, element_of(self.operator, types))

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Refuses what there are no kernels for: the bindings take an error in get_workspace_size for 0 bytes."""
        with self._reported():
            self.get_workspace_size(inputs, outputs)
            self.operator.launches(self._largest(inputs), self._multiprocessors(), self.tactic)

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Bytes of scratch for the largest shapes of a profile, which are enough for all of it."""
        return place(self.operator.scratch(self._largest(inputs), self._multiprocessors()))[1]

    def get_valid_tactics(self) -> list[int]:
        return list(self.operator.tactics())

    def get_fields_to_serialize(self) -> Any:
        return self.serialized

    # While it runs, and while its tactics are timed

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def set_tactic(self, tactic: int) -> None:
        """0 is TensorRT's for "none of them"."""
        self.tactic = tactic or self.operator.tactics()[0]

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        pass

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Queue the operator's kernels on addresses of device memory; an exception fails TensorRT's run."""
        operator, launcher = self.operator, self.host.launcher
        if self.host.building and len(operator.tactics()) == 1:
            return  # there is nothing to choose, and a page table of anything would lead anywhere
        with self._reported():
            if launcher is None:
                raise EdgeError("its kernels cannot run here, where there is no GPU")
            addresses = dict(zip((*operator.INPUTS, *operator.OUTPUTS), (*inputs, *outputs), strict=True))
            for output, source in operator.SAME_MEMORY.items():
                if addresses[output] != addresses[source]:
                    raise EdgeError(f"{output} must be bound to the memory of {source}, which it updates in place")
            tensors = self._tensors(input_desc, [tuple(d.dims) for d in input_desc])
            prepared = prepare(operator, tuple(tensors.values()), launcher.multiprocessors, self.tactic)
            addresses |= {name: workspace + offset for name, offset in prepared.offsets.items()}
            if self.host.offload is not None and isinstance(operator, OffloadingOperator):
                operator.run_offloaded(Call(tensors, addresses, launcher, stream), self.host.offload)
                return
            for one in prepared.launches:
                launcher.launch(one.launch, one.fill(addresses), stream)

    # What they share

    def _largest(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        return self._tensors([one.desc for one in inputs], [tuple(one.max) for one in inputs])

    def _tensors(self, descriptions: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        return {
            name: Tensor(shape, dtype_name(self.api, d.type))
            for name, d, shape in zip(self.operator.INPUTS, descriptions, shapes, strict=True)
        }

    def _multiprocessors(self) -> int:
        return MOST_MULTIPROCESSORS if self.host.launcher is None else self.host.launcher.multiprocessors

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except EdgeError as error:
            self.host.errors.append(f"{self.operator.NAME}: {error}")
            raise
