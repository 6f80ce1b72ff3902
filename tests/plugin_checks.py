"""What our plugins must do on the bindings of any TensorRT; each check takes its package."""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from edge.errors import EdgeError
from plugins.plugin import ALIGNMENT, MOST_MULTIPROCESSORS, PluginHost, Tensor
from plugins.tensorrt import OPERATORS, plugin_creators
from tests.plugin_calls import (
    EmulatedDevice,
    attribute_fields,
    call,
    describe,
    describe_range,
    input_ranges,
    keep,
    make_creator,
    make_plugin,
)
from tests.plugin_samples import DTYPES, Sample, samples

OPTIONAL = {"destroy"}  # methods of the interfaces that do nothing by default


def all_samples() -> Iterator[Sample]:
    for element in DTYPES:
        yield from samples("decode", element).values()


def check_creators(api: Any) -> None:
    creators = plugin_creators(api, PluginHost())
    assert [creator.name for creator in creators] == [operator.NAME for operator in OPERATORS]
    for creator, operator in zip(creators, OPERATORS, strict=True):
        assert isinstance(creator, api.IPluginCreatorV3One)
        assert (creator.plugin_version, creator.plugin_namespace) == ("1", "")
        assert [one.name for one in creator.field_names] == [one.name for one in fields(operator)]


def check_every_method_is_known(api: Any) -> None:
    """Ours are those of the interfaces, with as many parameters; where Python must return nothing, they do not."""
    creator = plugin_creators(api, PluginHost())[0]
    plugin = make_plugin(api, PluginHost(), next(all_samples()).operator)
    for one in (creator, plugin):
        ours, *interfaces = type(one).__bases__
        wanted = {}
        for interface in interfaces:
            for name in dir(interface):
                signature = (getattr(interface, name).__doc__ or "").splitlines()[:1]
                if name[0] != "_" and signature and signature[0].startswith(f"{name}(self"):
                    wanted[name] = signature[0]
        methods = {name: method for name, method in inspect.getmembers(ours, inspect.isfunction) if name[0] != "_"}
        assert set(methods) == set(wanted) - OPTIONAL, set(methods) ^ set(wanted)
        for name, method in methods.items():
            assert len(inspect.signature(method).parameters) == len(re.findall(r"\w+: ", wanted[name])), wanted[name]
            assert (method.__annotations__["return"] == "None") == wanted[name].endswith("-> None"), wanted[name]


def check_creation(api: Any) -> None:
    """A plugin has its node's attributes, and shows itself as each capability; clones are equal and apart."""
    for sample in all_samples():
        plugin = make_plugin(api, PluginHost(), sample.operator)
        assert isinstance(plugin, api.IPluginV3) and plugin.operator == sample.operator
        assert (plugin.plugin_name, plugin.num_outputs) == (sample.operator.NAME, len(sample.operator.OUTPUTS))
        kinds = api.PluginCapabilityType
        for kind, interface in (
            (kinds.CORE, api.IPluginV3OneCore),
            (kinds.BUILD, api.IPluginV3OneBuild),
            (kinds.RUNTIME, api.IPluginV3OneRuntime),
        ):
            assert isinstance(plugin.get_capability_interface(kind), interface)
        for copy in (keep(plugin.clone()), keep(plugin.attach_to_context(None))):
            assert copy is not plugin and isinstance(copy, api.IPluginV3)
            assert (copy.operator, copy.tactic, copy.host) == (plugin.operator, plugin.tactic, plugin.host)


def check_serialised_attributes_outlive_the_call(api: Any) -> None:
    """The bindings read a collection's pointers after `get_fields_to_serialize` has returned."""
    for sample in all_samples():
        host = PluginHost()
        plugin = make_plugin(api, host, sample.operator)
        collection = plugin.get_fields_to_serialize()
        gc.collect()
        overwrite = [np.full(1, -1, dtype) for dtype in (np.int32, np.float32) for _ in range(200)]
        assert [one.name for one in collection] == [one.name for one in fields(sample.operator)]
        creator = make_creator(api, host, sample.operator)
        restored = keep(creator.create_plugin("layer", collection, api.TensorRTPhase.RUNTIME))
        assert restored.operator == sample.operator and overwrite


def check_a_missing_attribute_is_one_sentence(api: Any) -> None:
    for sample in all_samples():
        names = [one.name for one in fields(sample.operator)]
        made, _ = attribute_fields(api, sample.operator)
        for name in names:
            host = PluginHost()
            creator = make_creator(api, host, sample.operator)
            rest = api.PluginFieldCollection([one for one in made if one.name != name])
            assert creator.create_plugin("node", rest, api.TensorRTPhase.BUILD) is None
            assert host.errors == [f"{sample.operator.NAME} lacks the attribute {name}; export the bundle again"]


def check_types_and_formats(api: Any) -> None:
    """Each input and output takes its own type in linear order and no other; activations are all of one type."""
    types = [api.float32, api.float16, api.bfloat16, api.int32, api.int8]
    for sample in all_samples():
        operator, plugin = sample.operator, make_plugin(api, PluginHost(), sample.operator)
        dtypes = [sample.inputs[name].dtype for name in operator.INPUTS]
        outputs = [sample.output_dtype(name) for name in operator.OUTPUTS]
        wanted = [getattr(api, dtype.name) for dtype in (*dtypes, *outputs)]
        assert plugin.get_output_data_types(wanted[: len(dtypes)]) == wanted[len(dtypes) :]
        tensors = [describe_range(api, dtype, (1,), (1,)) for dtype in (*dtypes, *outputs)]
        names = (*operator.INPUTS, *operator.OUTPUTS)
        declared = [operator.types()[name] for name in names]
        for position, right in enumerate(wanted):
            is_first = declared[position] == "element" and "element" not in declared[:position]
            allowed = {api.float16, api.bfloat16} if is_first else {right}
            accepted = set()
            for dtype in types:
                _describe_as(tensors[position], dtype, api.TensorFormat.LINEAR)
                if plugin.supports_format_combination(position, tensors, len(dtypes)):
                    accepted.add(dtype)
            assert accepted == allowed, (operator.NAME, names[position])
            _describe_as(tensors[position], right, api.TensorFormat.CHW32)
            assert not plugin.supports_format_combination(position, tensors, len(dtypes))
            _describe_as(tensors[position], right, api.TensorFormat.LINEAR)


def _describe_as(dynamic: Any, dtype: Any, form: Any) -> None:
    desc = dynamic.desc
    desc.type, desc.format = dtype, form
    dynamic.desc = desc


def check_workspace(api: Any) -> None:
    """Planned for the largest shapes and the largest GPU if there is none, else for that one."""
    for sample in all_samples():
        operator = sample.operator
        tensors = {name: Tensor(sample.inputs[name].shape, sample.inputs[name].dtype.name) for name in operator.INPUTS}
        device = EmulatedDevice()
        for launcher, multiprocessors in ((None, MOST_MULTIPROCESSORS), (device, device.multiprocessors)):
            plugin = make_plugin(api, PluginHost(launcher), operator)
            assert plugin.configure_plugin(input_ranges(api, sample), []) is None
            size = plugin.get_workspace_size(input_ranges(api, sample), [])
            buffers = operator.scratch(tensors, multiprocessors)
            exact = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in buffers.values())
            assert exact <= size <= exact + ALIGNMENT * len(buffers)


def check_tactics(api: Any) -> None:
    for sample in all_samples():
        plugin = make_plugin(api, PluginHost(), sample.operator)
        tactics = plugin.get_valid_tactics()
        assert tactics == list(range(1, len(tactics) + 1))
        for tactic in tactics:
            plugin.set_tactic(tactic)
            assert keep(plugin.clone()).tactic == tactic
        plugin.set_tactic(0)
        assert plugin.tactic == tactics[0]


def check_launches(api: Any) -> None:
    """What is queued has the addresses that TensorRT gave; the numbers are in tests/test_plugin_operators.py."""
    for sample in all_samples():
        device = EmulatedDevice()
        plugin = keep(make_plugin(api, PluginHost(device), sample.operator).attach_to_context(None))
        shapes = [describe(api, array.shape, array.dtype) for array in sample.inputs.values()]
        assert plugin.on_shape_change(shapes, []) is None
        addresses = call(api, plugin, sample, device)
        passed = b"".join(arguments for _, arguments in device.queue)
        for name in (*sample.operator.INPUTS, *sample.operator.OUTPUTS):
            assert addresses[name].to_bytes(8, "little") in passed, (sample.operator.NAME, name)


def check_a_builder_runs_only_what_it_can_choose(api: Any) -> None:
    """Its inputs hold anything: page tables and positions would lead anywhere, weights and activations do not."""
    ran = set()
    for sample in all_samples():
        device = EmulatedDevice()
        plugin = make_plugin(api, PluginHost(device, building=True), sample.operator)
        call(api, plugin, sample, device)
        if device.queue:
            ran.add(sample.operator.NAME)
    assert ran == {"PackedLinear"}


def check_timings_are_shared_by_equals_only(api: Any) -> None:
    ids = {sample.operator: make_plugin(api, PluginHost(), sample.operator).timing_cache_id for sample in all_samples()}
    assert len(set(ids.values())) == len(ids)
    for operator, known in ids.items():
        assert make_plugin(api, PluginHost(), replace(operator)).timing_cache_id == known != ""


def check_errors(api: Any) -> None:
    """A failure in `enqueue` is an exception, since TensorRT takes any return for success, and a sentence."""
    sample = samples("decode", "float16")["PagedAttention"]
    host, device = PluginHost(), EmulatedDevice()
    with pytest.raises(EdgeError, match="where there is no GPU"):
        call(api, make_plugin(api, host, sample.operator), sample, device)
    assert host.errors == ["PagedAttention: its kernels cannot run here, where there is no GPU"]


CHECKS = (
    check_creators,
    check_every_method_is_known,
    check_creation,
    check_serialised_attributes_outlive_the_call,
    check_a_missing_attribute_is_one_sentence,
    check_types_and_formats,
    check_workspace,
    check_tactics,
    check_launches,
    check_a_builder_runs_only_what_it_can_choose,
    check_timings_are_shared_by_equals_only,
    check_errors,
)
