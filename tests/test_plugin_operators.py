"""The operators that TensorRT gets from us: their nodes, their results, the memory they ask for, their refusals.

Results come through the plugins of the installed TensorRT-RTX and its own descriptors; only the device is host memory
on which the emulator runs the kernels. The parser and builder are TensorRT's.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import fields, replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

import plugins
from edge.errors import EdgeError
from edge.tensorrt import load_flavour
from plugins.launch import Launch
from plugins.linear.trt import PackedLinear
from plugins.paged_attention.launch import AttentionShape, attend, scratch, scratch_up_to
from plugins.paged_attention.trt import PagedAttention
from plugins.plugin import ALIGNMENT, MOST_MULTIPROCESSORS, Buffers, Operator, PluginHost, Tensor, place, prepare
from plugins.rms_norm.trt import RMSNorm
from plugins.tensorrt import OPERATORS, register_plugins
from tests.plugin_calls import EmulatedDevice, call, check_outputs, describe, input_ranges, make_plugin
from tests.plugin_samples import DTYPES, STEPS, Sample
from tests.plugin_samples import samples as make_samples

NAMES = [operator.NAME for operator in OPERATORS]
samples = functools.cache(make_samples)


@pytest.fixture(scope="module")
def api() -> Any:
    return load_flavour("rtx").api


# Nodes


@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
def test_an_operator_is_its_onnx_function(operator: type[Operator]) -> None:
    function = next(one for one in plugins.functions() if one.name == operator.NAME)
    assert tuple(function.input) == operator.INPUTS and tuple(function.output) == operator.OUTPUTS
    names = [name for name in function.attribute if not name.startswith("plugin_")]
    names += [one.name for one in function.attribute_proto]  # those with a default
    assert names == [one.name for one in fields(operator)]  # type: ignore[arg-type]
    kinds = {one.name: one.type for one in fields(operator)}  # type: ignore[arg-type]
    for node in function.node:
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                kind = {onnx.AttributeProto.INT: "int", onnx.AttributeProto.FLOAT: "float"}[attribute.type]
                assert kinds[attribute.ref_attr_name] == kind, attribute.ref_attr_name


def test_every_function_but_the_cpu_ones_has_a_plugin() -> None:
    of_cpu = {"BlockLinear", "BlockLinearOffsets", "TileLinear"}
    assert {one.name for one in plugins.functions()} - of_cpu == set(NAMES)


# Results


@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_results(api: Any, name: str, kind: str, element: str) -> None:
    sample, device = samples(kind, element)[name], EmulatedDevice()
    plugin = make_plugin(api, PluginHost(device), sample.operator)
    addresses = call(api, plugin, sample, device)
    device.run()
    check_outputs(sample, device, addresses)


@pytest.mark.parametrize("element", DTYPES)
def test_all_tactics_of_the_linear_layer(api: Any, element: str) -> None:
    """Every block size gives the same, exact, result for a decode step and for a prompt's chunk."""
    device = EmulatedDevice()
    calls, launched = [], set()
    for kind in STEPS:
        sample = samples(kind, element)["PackedLinear"]
        plugin = make_plugin(api, PluginHost(device), sample.operator)
        for tactic in plugin.get_valid_tactics():
            plugin.set_tactic(tactic)
            calls.append((sample, call(api, plugin, sample, device)))
    launched = {launch.kernel.symbol for launch, _ in device.queue}
    assert len(launched) == len(plugin.get_valid_tactics()) - 1  # all block sizes; the first tactic is one of them
    device.run()
    for sample, addresses in calls:
        check_outputs(sample, device, addresses)


def test_a_second_step_of_the_same_shape_takes_its_own_addresses(api: Any) -> None:
    sample, device = samples("decode", "float16")["PackedHead"], EmulatedDevice()
    plugin = make_plugin(api, PluginHost(device), sample.operator)
    other = replace(sample, inputs=sample.inputs | {"x": -sample.inputs["x"]})
    logits = -sample.expected["logits"]
    other = replace(other, expected={"logits": logits, "token": logits.argmax(1).astype(np.int32)})
    calls = [(one, call(api, plugin, one, device)) for one in (sample, other)]
    device.run()
    for one, addresses in calls:
        check_outputs(one, device, addresses)


# Memory


def sizes(buffers: Buffers) -> dict[str, int]:
    """Bytes of each."""
    return {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in buffers.items()}


def splits_of(launches: list[Launch]) -> int:
    """What a tile's blocks are dealt to; 0 where tiles are whole."""
    return launches[0].grid[0] if len(launches) == 2 else 0


attention_shapes = st.builds(
    AttentionShape,
    tokens=st.integers(1, 700) | st.integers(1, 9),
    sequences=st.integers(1, 64),
    table_width=st.integers(1, 2100) | st.integers(1, 40),
    heads=st.sampled_from([2, 4, 16, 32]),
    kv_heads=st.just(2),
    head_dim=st.sampled_from([64, 128]),
    limit=st.sampled_from([0, 1, 9, 96]),
    window=st.sampled_from([0, 0, 1, 16]),
)
fractions = st.floats(0, 1)
multiprocessor_counts = st.integers(1, MOST_MULTIPROCESSORS)


def smaller(most: int, fraction: float) -> int:
    return max(1, round(most * fraction))


@given(attention_shapes, fractions, fractions, fractions, multiprocessor_counts, multiprocessor_counts)
@settings(max_examples=400, deadline=None)
def test_scratch_of_the_largest_shapes_is_enough_for_all(
    largest: AttentionShape, tokens: float, sequences: float, width: float, built_for: int, device: int
) -> None:
    assume(device <= built_for)
    shape = replace(
        largest,
        tokens=smaller(largest.tokens, tokens),
        sequences=smaller(largest.sequences, sequences),
        table_width=smaller(largest.table_width, width),
    )
    planned, given_ = (sizes(scratch_up_to(*one)) for one in ((largest, built_for), (shape, device)))
    splits = splits_of(attend(shape, 1.0, device))
    needed = sizes(scratch(shape, max(splits, 1)))
    if not splits:
        needed = {"q": needed["q"]}
    assert all(size <= given_[name] for name, size in needed.items()), (needed, given_)
    assert all(size <= planned[name] for name, size in given_.items()), (given_, planned)


def tensors_of(sample: Sample, tokens: int, sequences: int, width: int) -> dict[str, Tensor]:
    """The sample's tensors in another step."""
    shapes = {name: array.shape for name, array in sample.inputs.items()}
    for name, shape in shapes.items():
        extents = {
            "page_table": (sequences, width),
            "query_start": (sequences + 1,),
            "switch_length": (sequences,),
            **dict.fromkeys(("x", "hidden", "branch", "gate_up", "qkv", "cos", "sin"), (tokens, *shape[1:])),
            **dict.fromkeys(("positions", "slots"), (tokens,)),
            "tree_start": (sequences,),
            "tree_mask": (tokens, 2),
        }
        shapes[name] = extents.get(name, shape)
    return {name: Tensor(shapes[name], sample.inputs[name].dtype.name) for name in sample.operator.INPUTS}


@given(
    st.sampled_from(NAMES),
    st.sampled_from(list(DTYPES)),
    st.tuples(st.integers(1, 600), st.integers(1, 16), st.integers(1, 2100)),
    st.tuples(fractions, fractions, fractions),
    multiprocessor_counts,
)
@settings(max_examples=300, deadline=None)
def test_a_workspace_holds_every_step_of_its_profile(
    name: str, element: str, most: tuple[int, int, int], step: tuple[float, float, float], device: int
) -> None:
    """Buffers are aligned and apart, and end inside what was planned without a GPU."""
    sample = samples("decode", element)[name]
    operator = sample.operator
    planned = place(operator.scratch(tensors_of(sample, *most), MOST_MULTIPROCESSORS))[1]
    now = tensors_of(sample, *map(smaller, most, step))
    buffers = operator.scratch(now, device)
    prepared = prepare(operator, tuple(now.values()), device, operator.tactics()[0])
    assert prepared.offsets.keys() == buffers.keys()
    end = 0
    for buffer, size in sizes(buffers).items():
        start = prepared.offsets[buffer]
        assert start % ALIGNMENT == 0 and start >= end
        end = start + size
    assert end <= planned
    used = {a for one in prepared.launches for a in one.launch.arguments if isinstance(a, str)}
    assert used <= {*operator.INPUTS, *operator.OUTPUTS, *buffers}


# Refusals


@pytest.mark.parametrize("name", [name for name in NAMES if "Attention" in name])
def test_pools_must_be_updated_in_place(api: Any, name: str) -> None:
    sample = samples("decode", "float16")[name]
    operator = sample.operator
    for wrong in operator.SAME_MEMORY:
        host = PluginHost(device := EmulatedDevice())
        plugin = make_plugin(api, host, operator)
        addresses = {one: device.place(array) for one, array in sample.inputs.items()}
        addresses |= {output: addresses[source] for output, source in operator.SAME_MEMORY.items()}
        addresses["output"] = device.place(sample.expected["output"])
        addresses[wrong] = device.place(sample.expected[wrong])
        inputs = [describe(api, sample.inputs[one].shape, sample.inputs[one].dtype) for one in operator.INPUTS]
        bound = [[addresses[one] for one in names] for names in (operator.INPUTS, operator.OUTPUTS)]
        with pytest.raises(EdgeError, match=f"^{wrong} must be bound to the memory of {wrong.removesuffix('_out')}, "):
            plugin.enqueue(inputs, [], *bound, 0, 77)
        assert len(host.errors) == 1 and host.errors[0].startswith(f"{name}: {wrong} must be bound")
        assert not device.queue


@pytest.mark.parametrize(
    "operator,inputs,said",
    [
        (RMSNorm(1e-5), {"x": (1, 60), "weight": (60,)}, "hidden size 60"),
        (PackedLinear(4, 128, 16, 100), {"x": (1, 100), "weights": (1, 2, 32, 4), "scales": (1,)}, "100 inputs"),
        (
            PagedAttention(4, 2, 96, 0.1, 0),
            {"qkv": (1, 768), "kv_pool": (1, 2, 2, 64, 96), "page_table": (1, 1), "query_start": (2,)},
            "head_dim 96",
        ),
    ],
)
def test_what_no_kernel_can_do_stops_the_build(
    api: Any, operator: Operator, inputs: dict[str, tuple[int, ...]], said: str
) -> None:
    """In configure_plugin, where the bindings pass an error on; get_workspace_size would count as 0 bytes."""
    host = PluginHost()
    plugin = make_plugin(api, host, operator)
    arrays = {name: np.zeros(inputs.get(name, (1, 1)), np.float16) for name in operator.INPUTS}
    with pytest.raises(EdgeError, match=said):
        plugin.configure_plugin(input_ranges(api, Sample(operator, arrays, {})), [])
    assert len(host.errors) == 1 and said in host.errors[0]


# TensorRT's own parser, registry and builder


def one_of_each() -> bytes:
    """A model with a node of every operator, of dynamic steps; inputs and outputs are called as 'RMSNorm.x'."""
    nodes, inputs, outputs = [], [], []
    for name, sample in samples("prefill", "float16").items():
        operator = sample.operator
        ends = [[f"{name}.{one}" for one in names] for names in (operator.INPUTS, operator.OUTPUTS)]
        attributes = {one.name: getattr(operator, one.name) for one in fields(operator)}  # type: ignore[arg-type]
        nodes.append(
            helper.make_node(name, *ends, domain="edge", plugin_namespace="", plugin_version="1", **attributes)
        )
        for one, array in sample.inputs.items():
            shape = dynamic_shape(name, one, array.shape)
            inputs.append(helper.make_tensor_value_info(f"{name}.{one}", onnx_type(array.dtype), shape))
        for one in operator.OUTPUTS:
            outputs.append(helper.make_tensor_value_info(f"{name}.{one}", onnx_type(sample.output_dtype(one)), None))
    graph = helper.make_graph(nodes, "one_of_each", inputs, outputs)
    opsets = [helper.make_opsetid("", plugins.OPSET), helper.make_opsetid("edge", plugins.DOMAIN_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def onnx_type(dtype: np.dtype) -> int:
    return helper.np_dtype_to_tensor_dtype(dtype)


def dynamic_shape(operator: str, name: str, shape: tuple[int, ...]) -> list[int | str]:
    """Constants have their extents; of all else the first changes, and of a page table both."""
    if name in ("weight", "weights", "scales", "inverse_short", "inverse_long", "frequency", "sparse_settings"):
        return list(shape)
    dynamic: list[int | str] = [f"{operator}.{name}.{i}" for i in range(len(shape))]
    return dynamic if name == "page_table" else [dynamic[0], *shape[1:]]


class Logger:
    """Mixed into an ILogger: keeps what TensorRT says of errors."""

    def __init__(self, api: Any) -> None:
        api.ILogger.__init__(self)
        self.api, self.said = api, list[str]()

    def log(self, severity: Any, message: str) -> None:
        if severity <= self.api.ILogger.ERROR:
            self.said.append(message)


@pytest.fixture
def network(api: Any) -> tuple[Any, Any, Any, PluginHost]:
    """(logger, builder, an empty network, the host of the plugins registered last)."""
    logger = type("ErrorLogger", (Logger, api.ILogger), {})(api)
    builder = api.Builder(logger)
    register_plugins(api, PluginHost())
    host = PluginHost()
    register_plugins(api, host)
    flag = api.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    return logger, builder, builder.create_network(1 << int(flag)), host


def test_tensorrt_builds_an_engine_of_every_operator(api: Any, network: tuple[Any, Any, Any, PluginHost]) -> None:
    """Output shapes and types are inferred from the plugins, and the engine has the attributes that it was built of."""
    logger, builder, net, host = network
    parser = api.OnnxParser(net, logger)
    assert parser.parse(one_of_each()), logger.said
    prefill = samples("prefill", "float16")
    for i in range(net.num_outputs):
        output = net.get_output(i)
        name, _, one = output.name.partition(".")
        assert output.dtype == getattr(api, prefill[name].output_dtype(one).name), output.name
        assert tuple(output.shape) == (-1, *prefill[name].expected[one].shape[1:]), output.name
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    for i in range(net.num_inputs):
        tensor = net.get_input(i)
        name, _, one = tensor.name.partition(".")
        least = tuple(extent if extent > 0 else 2 for extent in tensor.shape)
        most = tuple(map(max, least, prefill[name].inputs[one].shape))
        profile.set_shape(tensor.name, least, most, most)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(api.ComputeCapability.SM86, 0)
    engine = builder.build_serialized_network(net, config)
    assert engine is not None, logger.said
    assert not host.errors
    content = bytes(memoryview(engine))
    for sample in prefill.values():
        for one in fields(sample.operator):  # type: ignore[arg-type]
            kind = np.int32 if one.type == "int" else np.float32
            value = kind(getattr(sample.operator, one.name)).tobytes()
            # As TensorRT serialises a plugin's field: its name, type, length and value.
            assert re.search(re.escape(one.name.encode()) + rb"\0.{8}" + re.escape(value), content, re.DOTALL), one.name


def test_a_missing_attribute_stops_the_parser_with_a_sentence(
    api: Any, network: tuple[Any, Any, Any, PluginHost]
) -> None:
    """The plugins that were registered last count."""
    logger, _, net, host = network
    model = onnx.load_model_from_string(one_of_each())
    attributes = next(node for node in model.graph.node if node.op_type == "PackedHead").attribute
    attributes.remove(next(one for one in attributes if one.name == "bits"))
    parser = api.OnnxParser(net, logger)
    assert not parser.parse(model.SerializeToString())
    assert set(host.errors) == {"PackedHead lacks the attribute bits; export the bundle again"}
